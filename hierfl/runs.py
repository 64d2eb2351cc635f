"""Life of a run. Every state change of it, and what it does between two rounds, is decided in this file.

Pure, like ``hierfl/rounds.py``, which decides about a round that is open.

    SUBMITTED -> RUNNING <-> PAUSED
        |           |          |
        +-----------+----------+----> FINISHED, FAILED, CANCELLED
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from hierfl.errors import InvalidTransition
from hierfl.rounds import Presence, RegionView, Wait
from hierfl.types import TaskKind

__all__ = [
    "RUN_TRANSITIONS",
    "Finish",
    "OpenAttempt",
    "Pause",
    "RunCancelled",
    "RunEvent",
    "RunFailed",
    "RunFinished",
    "RunPaused",
    "RunResumed",
    "RunStarted",
    "RunState",
    "RunView",
    "decide_run",
    "next_run_state",
    "retry_delay_s",
]


class RunState(StrEnum):
    """Where a run is. The last three are terminal."""

    SUBMITTED = "submitted"
    RUNNING = "running"
    PAUSED = "paused"  # for the reason given, until somebody resumes it
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in (RunState.FINISHED, RunState.FAILED, RunState.CANCELLED)


class RunEvent:
    """What can happen to a run."""


@dataclass(frozen=True, kw_only=True)
class RunStarted(RunEvent):
    """The controller took it up."""


@dataclass(frozen=True, kw_only=True)
class RunPaused(RunEvent):
    """Attempts kept failing, or the disk did."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class RunResumed(RunEvent):
    """An operator says to go on."""


@dataclass(frozen=True, kw_only=True)
class RunFinished(RunEvent):
    """All rounds are committed. ``reason`` is empty, or says what was left out."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class RunCancelled(RunEvent):
    """An operator says to end it."""


@dataclass(frozen=True, kw_only=True)
class RunFailed(RunEvent):
    """It cannot go on, and trying again would not help."""

    reason: str


_U = RunState
RUN_TRANSITIONS: Mapping[tuple[RunState, type[RunEvent]], RunState] = {
    (_U.SUBMITTED, RunStarted): _U.RUNNING,
    (_U.SUBMITTED, RunCancelled): _U.CANCELLED,
    (_U.SUBMITTED, RunFailed): _U.FAILED,
    (_U.RUNNING, RunPaused): _U.PAUSED,
    (_U.RUNNING, RunFinished): _U.FINISHED,
    (_U.RUNNING, RunCancelled): _U.CANCELLED,
    (_U.RUNNING, RunFailed): _U.FAILED,
    (_U.PAUSED, RunResumed): _U.RUNNING,
    (_U.PAUSED, RunCancelled): _U.CANCELLED,
    (_U.PAUSED, RunFailed): _U.FAILED,
}


def next_run_state(state: RunState, event: RunEvent) -> RunState:
    """The state after ``event``.

    Raises:
        InvalidTransition: The table has no such pair.
    """
    after = RUN_TRANSITIONS.get((state, type(event)))
    if after is None:
        raise InvalidTransition("run", state, event)
    return after


@dataclass(frozen=True, kw_only=True)
class RunView:
    """All that decides about a run without an open attempt."""

    rounds: int
    rounds_committed: int
    evaluate_last: bool
    """Whether a round of task ``evaluate`` follows the last round."""
    evaluation_over: bool
    attempts: int
    """Attempts made at the round that comes next."""
    abandoned_in_a_row: int
    max_abandoned: int
    last_reason: str
    """Why the last attempt was abandoned."""
    retry_due: bool
    """Whether the delay after the last abandoned attempt is over."""
    min_regions: int
    regions: tuple[RegionView, ...]


@dataclass(frozen=True, kw_only=True)
class OpenAttempt:
    """Offer this task to all regions."""

    task: TaskKind
    round: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Pause:
    """Wait for an operator."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Finish:
    """The run is complete."""

    reason: str = ""


def decide_run(view: RunView) -> Wait | OpenAttempt | Pause | Finish:
    """What to do about a run without an open attempt.

    A round of training begins once its quorum of regions is live and no region is still expected; the last
    evaluation begins at once and is tried once: a run whose rounds are committed is finished without it too.
    """
    if view.rounds_committed >= view.rounds:
        return _decide_evaluation(view)
    if view.abandoned_in_a_row >= view.max_abandoned:
        times = f"{view.abandoned_in_a_row} attempts in a row were abandoned"
        return Pause(reason=f"round {view.rounds_committed + 1}: {times}; the last one: {view.last_reason}")
    if not view.retry_due:
        return Wait(waiting_for=f"the next attempt; the last one was abandoned: {view.last_reason}")
    attached = sum(region.presence is Presence.ATTACHED for region in view.regions)
    expected = any(region.presence is Presence.EXPECTED for region in view.regions)
    if attached < view.min_regions or (expected and attached < len(view.regions)):
        return Wait(waiting_for=_presence_words(view.regions, attached))
    return OpenAttempt(task=TaskKind.TRAIN, round=view.rounds_committed + 1, attempt=view.attempts + 1)


def _decide_evaluation(view: RunView) -> OpenAttempt | Finish:
    if not view.evaluate_last or view.evaluation_over:
        return Finish()
    if view.attempts:
        return Finish(reason=f"without the last evaluation: {view.last_reason}")
    return OpenAttempt(task=TaskKind.EVALUATE, round=view.rounds + 1, attempt=1)


def retry_delay_s(abandoned_in_a_row: int, silence_s: float) -> float:
    """Seconds between an abandoned attempt and the next one: ``silence_s``, doubled each time, at most tenfold."""
    return 0.0 if abandoned_in_a_row == 0 else min(silence_s * 2.0 ** (abandoned_in_a_row - 1), 10 * silence_s)


def _presence_words(regions: tuple[RegionView, ...], attached: int) -> str:
    away = [f"{region.region} is {_away(region)}" for region in regions if region.presence is not Presence.ATTACHED]
    return "; ".join([f"{attached} of {len(regions)} regions attached", *away])


def _away(region: RegionView) -> str:
    return "not attached yet" if region.presence is Presence.EXPECTED else str(region.presence)
