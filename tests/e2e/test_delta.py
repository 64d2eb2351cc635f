"""Models that go down as differences: the same bits as whole ones, over both hops, in a small part of the bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from federations import InProcess, job, noisy_app

from hierfl import delta
from hierfl.job import UpdateChoice

NUM_VALUES = 100_000
REGIONS = {"eu-west": ["a", "b"], "us-east": ["c", "d"]}
SPARSE = UpdateChoice(encoding="topk", options={"fraction": 0.01})
MODEL_BYTES = 4 * (NUM_VALUES + 15)
PROCESSES = len(REGIONS)
"""Of clients: those of one share what they fetch."""


class Down:
    """Bytes that each hop's fetches brought, call by call: the size of what came, without framing."""

    def __init__(self, federation: InProcess) -> None:
        self.to_regions: list[int] = []
        self.federation = federation
        for combiner in federation.combiners.values():
            combiner.region.models._fetch = self._noting(combiner.region.models._fetch)

    def _noting(self, fetch: Callable[..., Any]) -> Callable[..., Any]:
        async def noted(*arguments: Any) -> Any:
            fetched = await fetch(*arguments)
            self.to_regions.append(fetched.incoming.descriptor.length_bytes)
            return fetched

        return noted

    def to_clients(self) -> int:
        return sum(intake.desk.bytes_out for one in self.federation.combiners.values() for intake in one.intakes)


async def trained(federate: Any, updates: UpdateChoice, rounds: int = 3) -> tuple[list[str], Down, int]:
    async with federate(REGIONS, app=noisy_app(num_values=NUM_VALUES)) as federation:
        down = Down(federation)
        found = await federation.train(
            job(min_regions=2, min_clients=2, rounds=rounds, updates=updates, evaluate_every=0)
        )
        assert found.summary.state == "finished", found.summary.reason
        assert {item.num_updates for item in found.rounds} == {4}
        return [item.model_hash for item in found.rounds], down, down.to_clients()


@pytest.mark.timeout(120)
async def test_models_have_the_same_bits_as_differences_and_whole_and_differences_are_small(federate, monkeypatch):
    with_deltas, down, to_clients = await trained(federate, SPARSE)
    monkeypatch.setattr(delta, "MOST_CHANGED", -1)  # nothing is ever worth a difference
    without, whole_down, whole_to_clients = await trained(federate, SPARSE)
    assert with_deltas == without
    assert len(set(without)) == 3
    assert whole_down.to_regions == [MODEL_BYTES] * len(whole_down.to_regions)
    assert sorted(down.to_regions, reverse=True)[:2] == [MODEL_BYTES] * 2, "the first, whole"
    assert max(sorted(down.to_regions)[:-2]) < 0.06 * MODEL_BYTES, "4 clients, 1 % each"
    assert whole_to_clients > PROCESSES * 3 * MODEL_BYTES
    assert to_clients < PROCESSES * (1 + 2 * 0.06) * MODEL_BYTES


@pytest.mark.timeout(120)
async def test_after_dense_updates_models_go_whole(federate):
    _, down, to_clients = await trained(federate, UpdateChoice(), rounds=2)
    assert set(down.to_regions) == {MODEL_BYTES}
    assert to_clients > PROCESSES * 2 * MODEL_BYTES


@pytest.mark.timeout(120)
async def test_who_lost_its_models_gets_the_whole_one_and_goes_on(federate):
    """The clients of one region, and a combiner, start again between two rounds; the bits are those of a quiet run."""
    quiet, *_ = await trained(federate, SPARSE)
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(seed: int) -> None:
        del seed
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(60)

    app = noisy_app(num_values=NUM_VALUES, on_train=hold)
    async with federate(REGIONS, app=app) as federation:
        down = Down(federation)
        run = await federation.submit(job(min_regions=2, min_clients=2, updates=SPARSE, evaluate_every=0))
        await federation.hear("training", times=4)
        await federation.stop_clients("eu-west")
        await federation.restart_combiner("us-east")
        federation.start_clients("eu-west")
        gate.set()
        found = await federation.outcome(run)
        assert found.summary.state == "finished", found.summary.reason
    assert [item.model_hash for item in found.rounds if item.task == 1] == quiet
    assert min(down.to_regions) < 0.06 * MODEL_BYTES, "eu-west went on with differences"
