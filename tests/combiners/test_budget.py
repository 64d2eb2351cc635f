"""How much an intake lets in, and when its sums are sharded, follow from the memory that it may use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from combiners.budget import Need, machine_bytes, shards_needed, share, staging_bytes
from combiners.command import serve
from combiners.settings import IntakeSettings
from combiners.supervisor import CombinerSettings

MIB, GIB = 2**20, 2**30
needs = st.builds(Need, model=st.integers(0, 2**40), update=st.integers(0, 2**40))


@given(memory=st.integers(2**28, 2**42), open_ones=st.lists(needs, max_size=4))
def test_models_sums_and_updates_in_flight_fit_into_the_memory(memory, open_ones):
    staged = staging_bytes(memory, open_ones, is_given=True)
    assert staged >= 0
    assert not staged or 256 * MIB + staged + 3 * sum(need.model for need in open_ones) <= memory
    assert staging_bytes(memory, open_ones) <= staged


def test_more_updates_at_once_than_help_are_let_in_only_where_memory_is_given():
    small, large = Need(100 * MIB, 100 * MIB), Need(GIB, GIB)
    assert staging_bytes(16 * GIB, [small]) == 512 * MIB
    assert staging_bytes(16 * GIB, [large]) == 4 * GIB
    assert staging_bytes(16 * GIB, [small], is_given=True) == 16 * GIB - 256 * MIB - 300 * MIB
    assert staging_bytes(4 * GIB, [large]) == 4 * GIB - 256 * MIB - 3 * GIB


@given(memory=st.integers(2**29, 2**42), need=needs)
def test_as_many_shards_as_sums_and_one_update_take(memory, need):
    count = shards_needed(memory, need)
    room = memory - 256 * MIB
    if 3 * need.model + need.update <= room:
        assert count == 0
    else:
        assert count >= 2
        assert count == 64 or count * room >= 2 * need.model + need.update
        sharded = replace(need, shards=count)
        assert count == 64 or staging_bytes(memory, [sharded], is_given=True) >= need.update


def test_a_container_s_limit_counts_where_it_is_less_than_the_machine(tmp_path: Path):
    physical = machine_bytes(tmp_path)
    assert physical > 0
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/pod/one").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/one\n")
    (tmp_path / "sys/fs/cgroup/pod/one/memory.max").write_text("max\n")
    assert machine_bytes(tmp_path) == physical
    (tmp_path / "sys/fs/cgroup/pod/memory.max").write_text("12345\n")
    assert machine_bytes(tmp_path) == 12345
    (tmp_path / "sys/fs/cgroup/memory/old").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory/old/memory.limit_in_bytes").write_text("777\n")
    (tmp_path / "proc/self/cgroup").write_text("5:cpu:/none\n4:memory:/old\n")
    assert machine_bytes(tmp_path) == 777


def test_a_machine_is_shared_by_all_processes_of_the_combiner(tmp_path: Path):
    def made(**more: object) -> IntakeSettings:
        return CombinerSettings(kit=tmp_path, directory=tmp_path, **more).intake_settings  # type: ignore[arg-type]

    assert (made().actors, made().shards) == (2, 0)
    assert made(ray_address="auto").shards is None
    sharded = made(intakes=2, intake=IntakeSettings(shards=3))
    assert (sharded.actors, sharded.shards) == (9, 3)
    assert share(10 * GIB, 9) == int(0.6 * 10 * GIB) // 9


@pytest.mark.parametrize("size", ["8", "8GB", "-1GiB", "511MiB", "1.5GiB"])
def test_a_size_that_is_none_is_refused_with_an_example(size: str):
    told = CliRunner().invoke(serve, ["--kit", "kit", "--dir", "dir", "--memory", size])
    assert told.exit_code == 2
    assert "MiB" in told.output
