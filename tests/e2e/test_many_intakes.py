"""Many intakes in one region, and a kit that names one of them: clients spread, move, fail over and take turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from federations import InProcess, job

from combiners.settings import IntakeSettings, RegionSettings
from hierfl.client import link
from hierfl.pki import Kit
from hierfl.rendezvous import preference

SITES = {"eu": [f"site-{number:02d}" for number in range(12)]}
QUICK = RegionSettings(settle_s=0.05, intake_silence_s=2.5, freeze_s=5.0)


@pytest.fixture(autouse=True)
def _moves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "SPREAD_S", 0.1)
    monkeypatch.setattr(link, "FIRST_HOMING_S", 0.2)


def kits(federation: InProcess) -> list[Kit]:
    return [Kit.load(federation.kit("sites", "eu", site, "client-00")) for site in SITES["eu"]]


def placed(federation: InProcess) -> dict[str, set[str]]:
    """Sites by the intake that they follow."""
    intakes = federation.combiners["eu"].intakes
    return {intake.desk.name: {session.client.site for session in intake.desk.followers} for intake in intakes}


def belonging(federation: InProcess) -> dict[str, set[str]]:
    """Sites by the intake that rendezvous hashing gives them."""
    names = [intake.desk.name for intake in federation.combiners["eu"].intakes]
    homes = {kit.identity.site: preference(kit.identity.uri, names)[0] for kit in kits(federation)}
    return {name: {site for site, home in homes.items() if home == name} for name in names}


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what nobody announces."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def hashes(federation: InProcess, seed: int = 3) -> list[str]:
    """Of the models of a run in which every site is counted in every round."""
    found = await federation.train(job(min_clients=12, seed=seed))
    assert found.summary.state == "finished", found.summary.reason
    trained = [item for item in found.rounds if item.task == 1]
    assert [item.num_updates for item in trained] == [12, 12, 12]
    return [item.model_hash for item in trained]


@pytest.fixture
async def plain(federate) -> list[str]:
    """What one intake makes of the same job."""
    async with federate(SITES) as federation:
        return await hashes(federation)


async def test_clients_spread_over_all_intakes_although_their_kits_name_one(federate, plain):
    async with federate(SITES, intakes=3, bootstrap=1, settings=QUICK) as federation:
        await until(lambda: placed(federation) == belonging(federation))
        assert all(placed(federation).values()), "each has some"
        assert await hashes(federation) == plain


async def test_an_added_intake_takes_its_share_without_a_change_at_any_site(federate, plain):
    async with federate(SITES, intakes=1, bootstrap=1, settings=QUICK) as federation:
        await federation.hear("connected to the combiner", times=12)
        before = [(kit.path / "kit.toml").read_bytes() for kit in kits(federation)]
        run = await federation.submit(job(min_clients=12))
        await federation.hear("counted in model version 1")
        added = await federation.combiners["eu"].add_intake()
        outcome = await federation.outcome(run)
        assert [item.model_hash for item in outcome.rounds if item.task == 1] == plain
        await until(lambda: placed(federation) == belonging(federation))
        assert len(placed(federation)["intake-1"]) == sum("moving to intake-1" in line for line in federation.said) > 0
        assert await hashes(federation, seed=4)
        assert added.desk.bytes_in > 0, "it takes updates"
        assert [(kit.path / "kit.toml").read_bytes() for kit in kits(federation)] == before


async def test_clients_of_an_intake_that_dies_fail_over_within_the_round(federate, plain):
    async with federate(SITES, intakes=3, bootstrap=1, settings=QUICK) as federation:
        await until(lambda: placed(federation) == belonging(federation))
        run = await federation.submit(job(min_clients=12))
        await federation.hear("training", times=4)
        await federation.combiners["eu"].kill_intake(1)
        outcome = await federation.outcome(run)
        assert [item.model_hash for item in outcome.rounds if item.task == 1] == plain
        assert {item.attempts for item in outcome.rounds} == {1}
        assert not placed(federation)["intake-1"]


async def test_clients_come_back_to_their_intake_when_it_does(federate):
    async with federate(SITES, intakes=3, bootstrap=1, settings=QUICK) as federation:
        await until(lambda: placed(federation) == belonging(federation))
        combiner = federation.combiners["eu"]
        await combiner.kill_intake(1)
        await until(lambda: sum(map(len, placed(federation).values())) == 12)
        await until(lambda: len(combiner.region.reception.lines) == 2)
        await combiner.restart_intake(1)
        await until(lambda: placed(federation) == belonging(federation))


async def test_a_restart_of_the_clients_does_not_need_the_kits_address(federate):
    async with federate(SITES, intakes=3, bootstrap=1, settings=QUICK) as federation:
        await until(lambda: placed(federation) == belonging(federation))
        await federation.stop_clients()
        await federation.combiners["eu"].kill_intake(0)
        federation.start_clients("eu")
        await until(lambda: sum(map(len, placed(federation).values())) == 12)


async def test_more_clients_than_may_follow_at_once_take_turns_and_all_are_counted(federate, plain):
    pace = IntakeSettings(max_following=4, least_turn_s=0.4, away_grace_s=5.0)
    async with federate(SITES, intakes=1, settings=QUICK, intake=pace) as federation:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, len(placed(federation)["intake-0"]))
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        assert await hashes(federation) == plain
        await federation.hear("counted in model version 3", times=12)
        watching.cancel()
        assert most == 4
        assert any("come back when it says" in line for line in federation.said)
