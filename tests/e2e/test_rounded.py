"""Partials that regions round: as near to the exact model as stated, and never called exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from federations import job, noisy_app

from hierfl import documents
from hierfl.cli.models import sums_of
from hierfl.cli.runs import _rounds_table
from hierfl.records import CommitRecord
from hierfl.types import RunId

SITES = [f"site-{number:02d}" for number in range(6)]
THREE = {"eu-west": SITES[:2], "us-east": SITES[2:4], "ap-south": SITES[4:]}
DROP = 28
STEP = 2.0 ** (DROP - 32)
"""Of a region's sum, in units of a value times its weight."""


async def models_of(federation, run: str) -> list[np.ndarray]:
    """All values of each version that rounds made."""
    async with federation.operator() as operator:
        found = sorted(await operator.models(RunId(run)), key=lambda model: model.version)
        vectors = [(await operator.fetch_model(model))[1] for model in found[1:]]
    return [np.concatenate([vector[name] for name in sorted(vector)]).astype(np.float64) for vector in vectors]


def record_of(federation, run: str, version: int) -> CommitRecord:
    row = federation.controller.leader.store.model(RunId(run), version)
    return documents.decode(row.record, CommitRecord, "commit record")


def hashes(found) -> list[str]:
    return [item.model_hash for item in found.rounds if item.task == 1]


def num_bytes(found) -> int:
    return sum(share.bytes_out for item in found.rounds if item.task == 1 for share in item.regions)


@pytest.mark.timeout(180)
async def test_the_model_is_within_the_stated_bound_of_the_exact_one_and_said_to_be_approximate(federate, capsys):
    found, models = {}, {}
    for drop_bits in (0, DROP):
        async with federate(THREE, app=noisy_app()) as federation:
            run = await federation.train(job(min_regions=3, min_clients=2, drop_bits=drop_bits))
            assert run.summary.state == "finished", run.summary.reason
            found[drop_bits], models[drop_bits] = run, await models_of(federation, run.summary.run)
            record = record_of(federation, run.summary.run, 1)
            async with federation.operator() as operator:
                listed = {sums_of(model) for model in await operator.models(RunId(run.summary.run)) if model.version}
            _rounds_table(run)
            said = capsys.readouterr().err
            approximate = drop_bits > 0
            assert record.exact_in_two_tiers is run.summary.exact_in_two_tiers is not approximate
            assert record.partial_encoding == (f"rounded-{DROP}" if approximate else "packed")
            assert ("approximate across regions" in said) is approximate
            assert (f"rounds its sums by {DROP} bits" in said) is approximate
            assert listed == {"approximate across regions" if approximate else "exact"}
            rows = [row.row() for row in federation.combiners["eu-west"].region.store.ledger.signed_rows()]
            crossings = [row.crossing for row in rows if row.crossing and row.crossing.key.task == "train"]
            assert len(crossings) == 3
            assert {row.exact_in_two_tiers for row in crossings} == {not approximate}
    weights = [item.weight for item in found[0].rounds if item.task == 1]
    assert weights == [item.weight for item in found[DROP].rounds if item.task == 1]
    for number, (exact, rounded) in enumerate(zip(models[0], models[DROP], strict=True)):
        off = np.abs(exact - rounded).max()
        carried = sum(3 * STEP / 2 * abs(1 / a - 1 / b) for a, b in itertools.pairwise(weights[: number + 1]))
        float32 = (number + 1) * 2.0**-21  # of parameters below 8, at the clients and here
        assert 0 < off <= 3 * STEP / 2 / weights[number] + carried + float32
    assert num_bytes(found[DROP]) < 0.4 * num_bytes(found[0])


@pytest.mark.timeout(180)
async def test_a_longer_job_on_the_same_models_goes_on_as_if_it_had_been_one(federate):
    """Its first rounds are sums that were sealed for another run; its own then begin with what those left over."""
    seals = {}
    async with federate(THREE, app=noisy_app()) as federation:
        short = await federation.train(job(rounds=2, min_regions=3, min_clients=2, drop_bits=DROP))
        longer = await federation.train(job(rounds=4, min_regions=3, min_clients=2, drop_bits=DROP))
        assert {short.summary.state, longer.summary.state} == {"finished"}, longer.summary.reason
        seals["in two runs"] = hashes(longer)
        assert hashes(longer)[:2] == hashes(short)
    async with federate(THREE, app=noisy_app()) as federation:
        whole = await federation.train(job(rounds=4, min_regions=3, min_clients=2, drop_bits=DROP))
        seals["at once"] = hashes(whole)
    assert seals["in two runs"] == seals["at once"]


@pytest.mark.timeout(180)
async def test_a_region_that_is_started_again_between_rounds_makes_the_same_models(federate):
    """Its residual is on its disk: rounds and restarts together give the bits of rounds alone."""
    made = []
    for restarts in (False, True):
        async with federate(THREE, app=noisy_app()) as federation:
            run = await federation.submit(job(rounds=3, min_regions=3, min_clients=2, drop_bits=DROP))
            if restarts:
                async with federation.operator() as operator:
                    async for snapshot in operator.follow(run):
                        if snapshot.HasField("committed"):
                            break
                await federation.restart_combiner("us-east")
            found = await federation.outcome(run)
            assert found.summary.state == "finished", found.summary.reason
            trained = [item for item in found.rounds if item.task == 1]
            made.append([(item.num_updates, item.model_hash) for item in trained])
    assert made[0] == made[1]
