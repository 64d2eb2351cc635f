"""Life of one attempt in one region. Every change of its phase is in this file's table.

    FETCHING -> WAITING -> COLLECTING -> SEALING -> WRITING -> UPLINKING -> SEALED
        |                       ^           |  ^       |           ^
        |                       +-----------+  +-------+           |
        |                    an intake died    its shards died     |
        +-> DEFERRED: another run collects over the same base -----+  the same sealed bytes go again

An attempt that is withdrawn or judged is ENDED from any phase but WRITING, whose outcome is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from combiners.cohort import Cohort
from combiners.messages import Claim
from hierfl.errors import InvalidTransition
from hierfl.plan import Plan
from hierfl.receipts import Reason
from hierfl.types import AttemptKey

__all__ = ["TRANSITIONS", "Attempt", "Phase", "Step", "next_phase"]


class Phase(StrEnum):
    FETCHING = "fetching"  # the base model is on its way
    DEFERRED = "deferred"  # another run's attempt collects the same sum
    WAITING = "waiting"  # for clients
    COLLECTING = "collecting"
    SEALING = "sealing"  # intakes are frozen and hand over
    WRITING = "writing"  # the sum is being made durable
    UPLINKING = "uplinking"
    SEALED = "sealed"  # the controller has it; its verdict is open
    ABSTAINED = "abstained"
    ENDED = "ended"

    @property
    def collects(self) -> bool:
        """Whether a sum may still come of it that is not made yet."""
        return self in (Phase.FETCHING, Phase.WAITING, Phase.COLLECTING, Phase.SEALING, Phase.WRITING)

    @property
    def word(self) -> str:
        """What the controller is told (``AttemptProgress.phase``)."""
        return {Phase.DEFERRED: "waiting", Phase.WRITING: "sealing"}.get(self, str(self))


class Step(StrEnum):
    MODEL = "model"
    BEGIN = "begin"
    FREEZE = "freeze"
    RESUME = "resume"
    WRITE = "write"
    WRITTEN = "written"
    LOSE = "lose"
    DEFER = "defer"
    FETCH = "fetch"
    READDRESS = "readdress"
    ACKNOWLEDGE = "acknowledge"
    ABSTAIN = "abstain"
    END = "end"


_P, _S = Phase, Step
TRANSITIONS: Mapping[tuple[Phase, Step], Phase] = {
    (_P.FETCHING, _S.MODEL): _P.WAITING,
    (_P.FETCHING, _S.DEFER): _P.DEFERRED,
    (_P.FETCHING, _S.READDRESS): _P.UPLINKING,
    (_P.FETCHING, _S.ABSTAIN): _P.ABSTAINED,
    (_P.FETCHING, _S.END): _P.ENDED,
    (_P.DEFERRED, _S.FETCH): _P.FETCHING,
    (_P.DEFERRED, _S.READDRESS): _P.UPLINKING,
    (_P.DEFERRED, _S.ABSTAIN): _P.ABSTAINED,
    (_P.DEFERRED, _S.END): _P.ENDED,
    (_P.WAITING, _S.BEGIN): _P.COLLECTING,
    (_P.WAITING, _S.ABSTAIN): _P.ABSTAINED,
    (_P.WAITING, _S.END): _P.ENDED,
    (_P.COLLECTING, _S.FREEZE): _P.SEALING,
    (_P.COLLECTING, _S.ABSTAIN): _P.ABSTAINED,
    (_P.COLLECTING, _S.END): _P.ENDED,
    (_P.SEALING, _S.RESUME): _P.COLLECTING,
    (_P.SEALING, _S.WRITE): _P.WRITING,
    (_P.SEALING, _S.ABSTAIN): _P.ABSTAINED,
    (_P.SEALING, _S.END): _P.ENDED,
    (_P.WRITING, _S.LOSE): _P.SEALING,
    (_P.WRITING, _S.WRITTEN): _P.UPLINKING,
    (_P.WRITING, _S.ABSTAIN): _P.ABSTAINED,
    (_P.UPLINKING, _S.ACKNOWLEDGE): _P.SEALED,
    (_P.UPLINKING, _S.ABSTAIN): _P.ABSTAINED,
    (_P.UPLINKING, _S.END): _P.ENDED,
    (_P.SEALED, _S.END): _P.ENDED,
    (_P.ABSTAINED, _S.END): _P.ENDED,
}


def next_phase(phase: Phase, step: Step) -> Phase:
    """The phase after ``step``. Raises ``InvalidTransition`` for a pair that is not in the table."""
    after = TRANSITIONS.get((phase, step))
    if after is None:
        raise InvalidTransition("attempt in a region", phase, step)
    return after


@dataclass
class Attempt:
    """What the region knows of one attempt; owned and changed by ``Region`` only."""

    plan: Plan
    offer: bytes
    cohort: Cohort
    phase: Phase = Phase.FETCHING
    is_past_deadline: bool = False
    is_hopeless_timed: bool = False
    """A timer runs: too few can still answer."""
    seal_id: str = ""
    awaited: set[str] = field(default_factory=set)
    """Incarnations whose hand-over is missing, while SEALING."""
    handed_over: dict[str, tuple[Claim, ...]] = field(default_factory=dict)
    closed_for: Reason = Reason.LATE
    """What an update that comes too late is told."""

    @property
    def key(self) -> AttemptKey:
        return self.plan.key

    @property
    def release_pair(self) -> tuple[str, str]:
        """One release for each: base model hash and task hash."""
        return self.plan.base.model_hash, self.plan.task.hash

    def step(self, step: Step) -> None:
        """Go to the next phase."""
        self.phase = next_phase(self.phase, step)
