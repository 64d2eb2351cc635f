"""Promise 1: the model's bits do not depend on grouping, order of arrival or number of intakes."""

from __future__ import annotations

import pytest
from federations import job, noisy_app

from combiners.settings import IntakeSettings
from hierfl.job import UpdateChoice

SITES = [f"site-{number:02d}" for number in range(12)]
REGIONS = ("eu-west", "us-east", "ap-south", "sa-east", "af-south", "me-central")


def split(num_regions: int, sites: list[str] = SITES) -> dict[str, list[str]]:
    size = len(sites) // num_regions
    return {region: sites[n * size : (n + 1) * size] for n, region in enumerate(REGIONS[:num_regions])}


@pytest.mark.timeout(120)
async def test_every_grouping_of_the_same_sites_makes_the_same_model(federate):
    models = {}
    for num_regions, intakes in ((1, 1), (3, 1), (6, 1), (3, 2)):
        app = noisy_app(delay_s=0.05)
        regions = split(num_regions)
        async with federate(regions, intakes=intakes, app=app) as federation:
            found = await federation.train(job(min_regions=num_regions, min_clients=12 // num_regions))
        assert found.summary.state == "finished", found.summary.reason
        trained = [item for item in found.rounds if item.task == 1]
        assert [item.num_updates for item in trained] == [12, 12, 12]
        models[num_regions, intakes] = [item.model_hash for item in trained]
    assert len({tuple(hashes) for hashes in models.values()}) == 1, models
    assert len(set(models[1, 1])) == 3, "each round makes another model"


ENCODINGS = [
    UpdateChoice(encoding="bfloat16"),
    UpdateChoice(encoding="int8", options={"block": 64}),
    UpdateChoice(encoding="int8", options={"rounding": "stochastic"}),
    UpdateChoice(encoding="topk", options={"fraction": 0.05}),
    UpdateChoice(encoding="randomk", options={"fraction": 0.1}),
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "updates", ENCODINGS, ids=lambda updates: "-".join(map(str, [updates.encoding, *updates.options]))
)
async def test_every_grouping_makes_the_same_model_from_encoded_updates(federate, updates):
    """With error feedback too: each update waits for the last word on the one before."""
    models = {}
    for num_regions, intakes in ((1, 1), (2, 2), (3, 1)):
        app, regions = noisy_app(delay_s=0.05), split(num_regions, SITES[:6])
        async with federate(regions, intakes=intakes, app=app) as federation:
            found = await federation.train(job(min_regions=num_regions, min_clients=6 // num_regions, updates=updates))
        assert found.summary.state == "finished", found.summary.reason
        trained = [item for item in found.rounds if item.task == 1]
        assert [item.num_updates for item in trained] == [6, 6, 6]
        assert found.summary.updates == updates.encoding
        assert not [line for line in federation.said if "no last word" in line]
        models[num_regions, intakes] = [item.model_hash for item in trained]
    assert len({tuple(hashes) for hashes in models.values()}) == 1, models
    assert len(set(models[1, 1])) == 3, "each round makes another model"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("updates", "drop_bits"),
    [(UpdateChoice(), 0), (ENCODINGS[1], 0), (ENCODINGS[3], 0), (UpdateChoice(), 12)],
    ids=["float32", "int8", "topk", "rounded partials"],
)
async def test_shards_make_the_model_that_their_intake_alone_would_make(federate, updates, drop_bits):
    models = {}
    for shards in (0, 1, 3):
        app, regions = noisy_app(delay_s=0.05, num_values=20_000), split(1, SITES[:4])
        async with federate(regions, app=app, intake=IntakeSettings(shards=shards)) as federation:
            found = await federation.train(job(min_clients=4, updates=updates, drop_bits=drop_bits))
            assert len(federation.combiners[REGIONS[0]].shards) == shards
        assert found.summary.state == "finished", found.summary.reason
        trained = [item for item in found.rounds if item.task == 1]
        assert [item.num_updates for item in trained] == [4, 4, 4]
        models[shards] = [item.model_hash for item in trained]
    assert models[0] == models[1] == models[3]
    assert len(set(models[0])) == 3, "each round makes another model"


async def test_the_same_job_submitted_twice_gets_the_same_bytes_and_trains_nobody(federate):
    trained: list[int] = []
    app = noisy_app(on_train=trained.append)
    async with federate(split(3), app=app) as federation:
        first = await federation.train(job(min_regions=3, min_clients=4))
        num_trained = len(trained)
        again = await federation.train(job(min_regions=3, min_clients=4))
    assert (first.summary.state, again.summary.state) == ("finished", "finished"), again.summary.reason
    assert num_trained == 36
    assert len(trained) == num_trained
    assert [item.model_hash for item in again.rounds] == [item.model_hash for item in first.rounds]
    collected_in = {share.collected_in for item in again.rounds for share in item.regions}
    assert collected_in == {first.summary.run}, "its rounds say whose updates they count"
