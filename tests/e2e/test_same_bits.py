"""Promise 1: the model's bits do not depend on grouping, order of arrival or number of intakes."""

from __future__ import annotations

import pytest
from federations import job, noisy_app

SITES = [f"site-{number:02d}" for number in range(12)]
REGIONS = ("eu-west", "us-east", "ap-south", "sa-east", "af-south", "me-central")


def split(num_regions: int) -> dict[str, list[str]]:
    size = len(SITES) // num_regions
    return {region: SITES[n * size : (n + 1) * size] for n, region in enumerate(REGIONS[:num_regions])}


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
