"""Regions as the controller knows them: starts, sessions, silence."""

from __future__ import annotations

import pytest

from controller.registry import Progress, Registry, Traffic
from hierfl.errors import NotFound, StaleEpoch
from hierfl.rounds import Presence
from hierfl.types import AttemptKey, RegionId, RunId, TaskKind
from hierfl.wire import hierfl_pb2 as pb

EU, US = RegionId("eu"), RegionId("us")
KEY = AttemptKey(RunId("r"), TaskKind.TRAIN, 1, 1)
VERDICT = pb.AttachResponse(verdict=pb.Verdict(reason="late"))


class Desk:
    """A registry with a clock of ours and a count of its news."""

    def __init__(self) -> None:
        self.now, self.news = 100.0, 0
        self.registry = Registry((EU, US), lambda: self.now, self._changed)

    def _changed(self) -> None:
        self.news += 1


@pytest.fixture
def desk():
    return Desk()


def test_a_region_is_expected_for_a_while_and_then_absent(desk):
    assert desk.registry.presence(EU, 6.0) is Presence.EXPECTED
    assert desk.registry.live_until(EU, 6.0) == 106.0
    desk.now = 106.0
    assert desk.registry.presence(EU, 6.0) is Presence.ABSENT


def test_an_attached_region_falls_silent_and_comes_back_by_a_report(desk):
    desk.registry.attach(EU, 1, "store")
    desk.now += 5.9
    assert desk.registry.presence(EU, 6.0) is Presence.ATTACHED
    desk.now += 0.2
    assert desk.registry.presence(EU, 6.0) is Presence.SILENT
    before = desk.news
    desk.registry.report(EU, {}, Traffic())
    assert desk.registry.presence(EU, 6.0) is Presence.ATTACHED
    assert desk.news == before + 1


def test_a_region_told_to_report_more_often_is_given_the_time_to_learn_it(desk):
    desk.registry.attach(EU, 1, "store")
    desk.now += 1.0
    assert desk.registry.presence(EU, 0.5) is Presence.SILENT
    desk.registry.excuse(2.5)
    desk.now += 2.4
    assert desk.registry.presence(EU, 0.5) is Presence.ATTACHED
    desk.now += 0.2
    assert desk.registry.presence(EU, 0.5) is Presence.SILENT


def test_an_older_start_of_a_region_is_refused_and_a_newer_one_ends_its_stream(desk):
    old = desk.registry.attach(EU, 3, "store")
    new = desk.registry.attach(EU, 4, "store")
    assert old.events.get_nowait() is None
    assert old.replaced_by == 4
    with pytest.raises(StaleEpoch):
        desk.registry.attach(EU, 3, "store")
    desk.registry.detach(old)
    desk.registry.send(EU, VERDICT)
    assert new.events.get_nowait() == VERDICT


def test_the_newest_start_is_remembered_over_a_restart_of_the_controller(desk):
    desk.registry.restore(EU, 7, "store")
    with pytest.raises(StaleEpoch):
        desk.registry.attach(EU, 6, "store")
    desk.registry.attach(EU, 7, "store")


def test_another_zone_store_counts_anew_but_not_beside_the_first(desk):
    first = desk.registry.attach(EU, 9, "store")
    with pytest.raises(StaleEpoch):
        desk.registry.attach(EU, 1, "other")
    desk.registry.detach(first)
    desk.registry.attach(EU, 1, "other")
    assert desk.registry.region_epoch(EU) == 1


def test_verdicts_wait_for_a_region_that_is_away_and_offers_do_not(desk):
    desk.registry.send(EU, pb.AttachResponse(offer=pb.Offer()))
    desk.registry.send(EU, VERDICT)
    session = desk.registry.attach(EU, 1, "store")
    assert session.events.get_nowait() == VERDICT
    assert session.events.empty()


def test_progress_is_news_only_when_it_changes(desk):
    desk.registry.attach(EU, 1, "store")
    progress = {KEY: Progress(phase="collecting", clients_ready=3, clients_reported=1, cohort=3)}
    desk.registry.report(EU, progress, Traffic(clients_connected=3))
    before = desk.news
    desk.registry.report(EU, progress, Traffic(clients_connected=3))
    assert desk.news == before
    assert desk.registry.progress(EU, KEY) == progress[KEY]
    assert desk.registry.traffic(EU).clients_connected == 3


def test_a_region_that_was_not_provisioned_is_unknown(desk):
    with pytest.raises(NotFound):
        desk.registry.attach(RegionId("mars"), 1, "store")
