"""Rounds and runs: events in, ``==`` on what comes out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from hierfl import rounds, runs
from hierfl.errors import InvalidTransition
from hierfl.rounds import Abandon, Answer, AttemptView, Close, Deadline, Presence, RegionView, RoundState, Wait
from hierfl.runs import Finish, OpenAttempt, Pause, RunState, RunView
from hierfl.types import RegionId, TaskKind

EU, US, AP = RegionId("eu-west"), RegionId("us-east"), RegionId("ap-south")

ROUND_EVENTS = (
    rounds.PartialAccepted(region=EU, digest="blake3:00"),
    rounds.RegionAbstained(region=EU, code="too_few_sites"),
    rounds.CollectionClosed(regions=(EU,)),
    rounds.QuorumUnreachable(reason="r"),
    rounds.ModelCommitted(version=1),
    rounds.MetricsCommitted(version=1),
    rounds.AttemptWithdrawn(reason="r"),
)
ROUND_LEGAL = {
    ("collecting", "PartialAccepted"): "collecting",
    ("collecting", "RegionAbstained"): "collecting",
    ("collecting", "CollectionClosed"): "merging",
    ("collecting", "QuorumUnreachable"): "abandoned",
    ("collecting", "AttemptWithdrawn"): "abandoned",
    ("collecting", "ModelCommitted"): "committed",
    ("merging", "ModelCommitted"): "committed",
    ("merging", "MetricsCommitted"): "committed",
    ("merging", "AttemptWithdrawn"): "abandoned",
}
RUN_EVENTS = (
    runs.RunStarted(),
    runs.RunPaused(reason="r"),
    runs.RunResumed(),
    runs.RunFinished(),
    runs.RunCancelled(),
    runs.RunFailed(reason="r"),
)
RUN_LEGAL = {
    ("submitted", "RunStarted"): "running",
    ("submitted", "RunCancelled"): "cancelled",
    ("submitted", "RunFailed"): "failed",
    ("running", "RunPaused"): "paused",
    ("running", "RunFinished"): "finished",
    ("running", "RunCancelled"): "cancelled",
    ("running", "RunFailed"): "failed",
    ("paused", "RunResumed"): "running",
    ("paused", "RunCancelled"): "cancelled",
    ("paused", "RunFailed"): "failed",
}


@pytest.mark.parametrize(("state", "event"), tuple(itertools.product(RoundState, ROUND_EVENTS)), ids=str)
def test_every_pair_of_a_round_is_a_move_or_an_error(state, event):
    legal = ROUND_LEGAL.get((state.value, type(event).__name__))
    if legal is None:
        with pytest.raises(InvalidTransition):
            rounds.next_round_state(state, event)
    else:
        assert rounds.next_round_state(state, event).value == legal


@pytest.mark.parametrize(("state", "event"), tuple(itertools.product(RunState, RUN_EVENTS)), ids=str)
def test_every_pair_of_a_run_is_a_move_or_an_error(state, event):
    legal = RUN_LEGAL.get((state.value, type(event).__name__))
    if legal is None:
        with pytest.raises(InvalidTransition):
            runs.next_run_state(state, event)
    else:
        assert runs.next_run_state(state, event).value == legal


def test_no_event_leaves_a_terminal_state():
    assert not [pair for pair in rounds.ROUND_TRANSITIONS if pair[0].is_terminal]
    assert not [pair for pair in runs.RUN_TRANSITIONS if pair[0].is_terminal]


# ------------------------------------------------------------------ decisions about a round


def region(name: RegionId, presence=Presence.ATTACHED, answer=Answer.NONE, **more) -> RegionView:
    return RegionView(region=name, presence=presence, answer=answer, **more)


def attempt(*regions: RegionView, min_regions=2, min_clients=3, deadline=Deadline.AHEAD) -> AttemptView:
    return AttemptView(min_regions=min_regions, min_clients=min_clients, regions=regions, deadline=deadline)


IN = {"answer": Answer.PARTIAL}
OUT = {"answer": Answer.ABSTAINED, "code": "too_few_sites"}


def test_a_round_closes_when_all_live_regions_are_in():
    view = attempt(region(US, **IN), region(EU, **IN), region(AP, **IN))
    assert rounds.decide_attempt(view) == Close(regions=(AP, EU, US))


def test_a_round_with_a_quorum_still_waits_for_a_live_region():
    waiting = region(AP, phase="waiting", clients_ready=1)
    decision = rounds.decide_attempt(attempt(region(EU, **IN), region(US, **IN), waiting))
    assert decision == Wait(waiting_for="2 of 3 regions; ap-south has 1 of 3 clients")


def test_a_round_with_a_quorum_does_not_wait_for_a_silent_or_absent_region():
    for away in (Presence.SILENT, Presence.ABSENT):
        view = attempt(region(EU, **IN), region(US, **IN), region(AP, away))
        assert rounds.decide_attempt(view) == Close(regions=(EU, US))


def test_a_region_that_may_just_be_returning_is_waited_for():
    view = attempt(region(EU, **IN), region(US, **IN), region(AP, Presence.EXPECTED))
    assert rounds.decide_attempt(view) == Wait(waiting_for="2 of 3 regions; ap-south has not attached yet")


def test_a_silent_region_keeps_a_missing_quorum_in_reach_until_the_deadline():
    view = attempt(region(EU, **IN), region(US, Presence.SILENT))
    assert rounds.decide_attempt(view) == Wait(waiting_for="1 of 2 regions; us-east is silent")
    late = replace(view, deadline=Deadline.PASSED)
    assert rounds.decide_attempt(late) == Abandon(reason="deadline passed: 1 of 2 regions needed; us-east is silent")


def test_a_quorum_that_nobody_can_make_up_is_abandoned_at_once():
    decision = rounds.decide_attempt(attempt(region(EU, **IN), region(US, **OUT)))
    assert decision == Abandon(reason="quorum out of reach: 1 of 2 regions needed; us-east abstained (too_few_sites)")


def test_regions_at_work_may_finish_although_the_quorum_is_lost():
    view = attempt(region(EU, phase="collecting", clients_reported=2, cohort=5), region(US, **OUT))
    assert rounds.decide_attempt(view) == Wait(waiting_for="0 of 1 regions; eu-west has 2 of 5 updates")


def test_at_the_deadline_a_quorum_commits_without_the_slow_region():
    view = attempt(region(EU, **IN), region(US, **IN), region(AP, phase="collecting"), deadline=Deadline.PASSED)
    assert rounds.decide_attempt(view) == Close(regions=(EU, US))


def test_past_the_deadline_a_partial_on_its_way_is_waited_for_but_not_for_ever():
    view = attempt(region(EU, **IN), region(US, **IN), region(AP, phase="uplinking"), deadline=Deadline.PASSED)
    assert rounds.decide_attempt(view) == Wait(waiting_for="2 of 3 regions; ap-south is uplinking")
    assert rounds.decide_attempt(replace(view, deadline=Deadline.FINAL)) == Close(regions=(EU, US))


def test_without_a_quorum_the_deadline_abandons_and_names_who_was_late():
    view = attempt(region(EU, **IN), region(US, phase="collecting"), deadline=Deadline.PASSED)
    assert rounds.decide_attempt(view) == Abandon(
        reason="deadline passed: 1 of 2 regions needed; us-east did not answer in time"
    )


@pytest.mark.parametrize("deadline", Deadline)
@pytest.mark.parametrize("min_regions", [1, 2, 3])
def test_every_view_gets_a_decision_that_keeps_the_quorum_rule(min_regions, deadline):
    kinds = [
        region(EU, presence, answer, phase=phase, code="policy")
        for presence in Presence
        for answer in Answer
        for phase in ("", "uplinking")
    ]
    for trio in itertools.product(kinds, repeat=3):
        view = attempt(*trio, min_regions=min_regions, deadline=deadline)
        counted = sum(one.answer is Answer.PARTIAL for one in trio)
        decision = rounds.decide_attempt(view)
        if isinstance(decision, Close):
            assert len(decision.regions) == counted >= min_regions
        if isinstance(decision, Abandon):
            assert counted < min_regions
        if deadline is Deadline.FINAL:
            assert not isinstance(decision, Wait)


# ------------------------------------------------------------------ decisions about a run


def run_view(**changes) -> RunView:
    usual = RunView(
        rounds=2,
        rounds_committed=0,
        evaluate_last=True,
        evaluation_over=False,
        attempts=0,
        abandoned_in_a_row=0,
        max_abandoned=3,
        last_reason="",
        retry_due=True,
        min_regions=2,
        regions=(region(EU), region(US), region(AP, Presence.ABSENT)),
    )
    return replace(usual, **changes)


def test_a_round_opens_when_its_quorum_is_attached():
    assert runs.decide_run(run_view()) == OpenAttempt(task=TaskKind.TRAIN, round=1, attempt=1)


def test_a_round_does_not_open_before_its_quorum_is_attached():
    view = run_view(regions=(region(EU), region(US, Presence.SILENT), region(AP, Presence.ABSENT)))
    assert runs.decide_run(view) == Wait(waiting_for="1 of 3 regions attached; us-east is silent; ap-south is absent")


def test_a_round_gives_regions_time_to_attach_after_a_start():
    view = run_view(regions=(region(EU), region(US), region(AP, Presence.EXPECTED)))
    assert runs.decide_run(view) == Wait(waiting_for="2 of 3 regions attached; ap-south is not attached yet")


def test_an_abandoned_attempt_is_tried_again_under_the_next_number_when_its_delay_is_over():
    view = run_view(attempts=1, abandoned_in_a_row=1, last_reason="why")
    assert runs.decide_run(view) == OpenAttempt(task=TaskKind.TRAIN, round=1, attempt=2)
    assert isinstance(runs.decide_run(replace(view, retry_due=False)), Wait)


def test_a_run_pauses_with_the_reason_after_too_many_abandoned_attempts():
    decision = runs.decide_run(run_view(rounds_committed=1, attempts=3, abandoned_in_a_row=3, last_reason="why"))
    assert decision == Pause(reason="round 2: 3 attempts in a row were abandoned; the last one: why")


def test_the_last_round_is_followed_by_one_evaluation_and_then_the_end():
    view = run_view(rounds_committed=2)
    assert runs.decide_run(view) == OpenAttempt(task=TaskKind.EVALUATE, round=3, attempt=1)
    assert runs.decide_run(replace(view, evaluation_over=True, attempts=1)) == Finish()
    assert runs.decide_run(replace(view, evaluate_last=False)) == Finish()


def test_an_abandoned_evaluation_does_not_fail_the_run():
    view = run_view(rounds_committed=2, attempts=1, abandoned_in_a_row=1, last_reason="nobody evaluates")
    assert runs.decide_run(view) == Finish(reason="without the last evaluation: nobody evaluates")


def test_retries_wait_longer_each_time_up_to_a_limit():
    assert [runs.retry_delay_s(n, 6.0) for n in range(7)] == [0.0, 6.0, 12.0, 24.0, 48.0, 60.0, 60.0]
