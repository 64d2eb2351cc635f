"""Thousands of seeded histories of whole federations, and proof that the simulation can fail."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.rows import AnswerRow, RegionRow
from controller.store import SqliteStore
from hierfl.errors import StaleEpoch, StoreDamaged
from hierfl.types import AttemptKey, RegionId, RunId, TaskKind
from tests.simulation.history import run_history
from tests.simulation.mutants import FOCUS, MUTANTS
from tests.simulation.stores import Memory, MemoryStore

REGRESSIONS = [int(line.split()[0]) for line in (Path(__file__).parent / "regressions.txt").read_text().splitlines()]
FAST, MANY, PART = 50, 2000, 10


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Garbage is collected after a test, not in it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _run(seeds: range | list[int]) -> None:
    for seed in seeds:
        history = run_history(seed)
        assert not history.problems, f"seed {seed} (python -m tests.simulation --seed {seed}): {history.problems}"


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_a_history_that_failed_once_is_right_now(seed: int) -> None:
    _run([seed])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("start", range(0, FAST, PART))
def test_the_accounts_are_right_in_every_history(start: int) -> None:
    _run(range(start, start + PART))


@pytest.mark.long
@pytest.mark.parametrize("start", range(FAST, FAST + MANY, PART))
def test_the_accounts_are_right_in_thousands_of_histories(start: int) -> None:
    _run(range(start, start + PART))


def test_the_same_seed_is_the_same_history() -> None:
    first, second = run_history(7), run_history(7)
    assert first == second
    assert first.steps > 100
    assert first != run_history(8)


@pytest.mark.long
@pytest.mark.xfail(strict=True, reason="the next round has the same base and task: it gets the same sums once more")
def test_an_update_is_counted_once_though_its_round_left_the_model_as_it_was() -> None:
    problems = [problem for seed in range(60) for problem in run_history(seed, stands_still=True).problems]
    assert not problems


def _found(name: str, within: int) -> list[str]:
    for seed in range(within):
        with MUTANTS[name]():
            history = run_history(seed, only=FOCUS.get(name, ()))
        if history.problems:
            return history.problems
    return []


QUICKLY_FOUND = {
    "a refusal is told without a record",
    "clients hear of a seal before it is durable",
}
WITHIN = 300


@pytest.mark.parametrize("name", [name for name in MUTANTS if name in QUICKLY_FOUND])
def test_a_broken_product_is_noticed(name: str) -> None:
    assert _found(name, 60)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in MUTANTS if name not in QUICKLY_FOUND])
def test_every_broken_rule_is_noticed(name: str) -> None:
    assert _found(name, WITHIN)


# ---------------------------------------------------------------- the store in memory

RUN, REGION = RunId("run"), RegionId("eu")
regions = st.builds(
    RegionRow, region=st.sampled_from(["eu", "us"]), region_epoch=st.integers(1, 3), store_id=st.just("s")
)
answers = st.builds(
    AnswerRow,
    run=st.just(RUN),
    task=st.just(TaskKind.TRAIN),
    round=st.integers(1, 2),
    attempt=st.integers(1, 2),
    region=st.sampled_from(["eu", "us"]),
    received_unix_ns=st.integers(1, 2),
    code=st.sampled_from(["late", "policy"]),
)
steps = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(-1, 0), st.lists(regions | answers, max_size=3))), max_size=12
)


@settings(max_examples=40, deadline=None)
@given(steps=steps)
def test_the_store_in_memory_answers_as_the_one_on_disk(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, list[AnswerRow | RegionRow]] | None]
) -> None:
    on_disk, in_memory = SqliteStore(tmp_path_factory.mktemp("store") / "store.sqlite", "fed"), MemoryStore(Memory())
    stores = (on_disk, in_memory)
    epochs = [0, 0]
    try:
        for step in steps:
            if step is None:
                epochs = [store.lead() for store in stores]
            else:
                behind, rows = step
                assert _outcome(on_disk, epochs[0] + behind, rows) == _outcome(in_memory, epochs[1] + behind, rows)
            assert epochs[0] == epochs[1]
            assert on_disk.regions() == in_memory.regions()
            for key in [AttemptKey(RUN, TaskKind.TRAIN, n, attempt) for n in (1, 2) for attempt in (1, 2)]:
                assert on_disk.answers(key) == in_memory.answers(key)
    finally:
        on_disk.close()


def _outcome(store: SqliteStore | MemoryStore, epoch: int, rows: list[AnswerRow | RegionRow]) -> type | None:
    try:
        store.write(epoch, *rows)
    except (StaleEpoch, StoreDamaged) as error:
        return type(error)
    return None
