"""Life of one attempt at a round. Every state change of it, and every decision about it, is in this file.

No I/O and no clock here: time and network outcomes arrive as events and in views. The controller's loop
looks (makes a view), decides (``decide_attempt``: pure) and carries out. A run of rounds is ``hierfl/runs.py``.

    COLLECTING -> MERGING -> COMMITTED
         |           |
         +-----------+-----> ABANDONED
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from hierfl.errors import InvalidTransition
from hierfl.types import RegionId

__all__ = [
    "ROUND_TRANSITIONS",
    "Abandon",
    "Answer",
    "AttemptView",
    "AttemptWithdrawn",
    "Close",
    "CollectionClosed",
    "Deadline",
    "MetricsCommitted",
    "ModelCommitted",
    "PartialAccepted",
    "Presence",
    "QuorumUnreachable",
    "RegionAbstained",
    "RegionView",
    "RoundEvent",
    "RoundState",
    "Wait",
    "decide_attempt",
    "next_round_state",
]


class RoundState(StrEnum):
    """Where an attempt is."""

    COLLECTING = "collecting"  # regions may still report
    MERGING = "merging"  # closed with a quorum, partial aggregates being summed
    COMMITTED = "committed"  # new global model (or an evaluation's metrics) stored (terminal)
    ABANDONED = "abandoned"  # quorum out of reach, global model unchanged (terminal)

    @property
    def is_terminal(self) -> bool:
        return self in (RoundState.COMMITTED, RoundState.ABANDONED)


class RoundEvent:
    """What can happen to an attempt."""


@dataclass(frozen=True, kw_only=True)
class PartialAccepted(RoundEvent):
    """A region's partial aggregate is on the controller's disk."""

    region: RegionId
    digest: str


@dataclass(frozen=True, kw_only=True)
class RegionAbstained(RoundEvent):
    """A region takes no part in this attempt."""

    region: RegionId
    code: str


@dataclass(frozen=True, kw_only=True)
class CollectionClosed(RoundEvent):
    """No more partials: these regions make the model."""

    regions: tuple[RegionId, ...]


@dataclass(frozen=True, kw_only=True)
class QuorumUnreachable(RoundEvent):
    """Too few regions answered, or can."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class ModelCommitted(RoundEvent):
    """The commit record of a new model version exists."""

    version: int


@dataclass(frozen=True, kw_only=True)
class MetricsCommitted(RoundEvent):
    """An evaluation's sums are stored; the model is the one evaluated."""

    version: int


@dataclass(frozen=True, kw_only=True)
class AttemptWithdrawn(RoundEvent):
    """The run ended while the attempt was open: by an operator, or because its merge failed."""

    reason: str


_R = RoundState
ROUND_TRANSITIONS: Mapping[tuple[RoundState, type[RoundEvent]], RoundState] = {
    (_R.COLLECTING, PartialAccepted): _R.COLLECTING,
    (_R.COLLECTING, RegionAbstained): _R.COLLECTING,
    (_R.COLLECTING, CollectionClosed): _R.MERGING,
    (_R.COLLECTING, QuorumUnreachable): _R.ABANDONED,
    (_R.COLLECTING, AttemptWithdrawn): _R.ABANDONED,
    (_R.COLLECTING, ModelCommitted): _R.COMMITTED,  # its commit record was found: adopted, whoever wrote it
    (_R.MERGING, ModelCommitted): _R.COMMITTED,
    (_R.MERGING, MetricsCommitted): _R.COMMITTED,
    (_R.MERGING, AttemptWithdrawn): _R.ABANDONED,
}


def next_round_state(state: RoundState, event: RoundEvent) -> RoundState:
    """The state after ``event``.

    Raises:
        InvalidTransition: The table has no such pair.
    """
    after = ROUND_TRANSITIONS.get((state, type(event)))
    if after is None:
        raise InvalidTransition("round", state, event)
    return after


# ------------------------------------------------------------------ look: what a decision is made from


class Presence(StrEnum):
    """What the controller knows of a region."""

    ATTACHED = "attached"  # heard from within silence_s
    EXPECTED = "expected"  # not heard from yet, and this controller started less than silence_s ago
    SILENT = "silent"  # heard from once, silent for silence_s or longer
    ABSENT = "absent"  # never heard from

    @property
    def is_live(self) -> bool:
        """Whether a round waits for the region although it could do without."""
        return self in (Presence.ATTACHED, Presence.EXPECTED)


class Answer(StrEnum):
    """What a region said to an attempt."""

    NONE = "none"
    PARTIAL = "partial"
    ABSTAINED = "abstained"


class Deadline(StrEnum):
    """Where an attempt is in time."""

    AHEAD = "ahead"
    PASSED = "passed"  # only regions whose partial is on its way are still waited for
    FINAL = "final"  # nobody is


ON_ITS_WAY = frozenset({"sealing", "uplinking"})
"""Phases of a region (``AttemptProgress.phase``) in which its partial is about to arrive."""


@dataclass(frozen=True, kw_only=True)
class RegionView:
    """One region, as far as one attempt is concerned."""

    region: RegionId
    presence: Presence
    answer: Answer = Answer.NONE
    code: str = ""
    """Why it abstained."""
    phase: str = ""
    """Last phase it reported for this attempt."""
    clients_ready: int = 0
    clients_reported: int = 0
    cohort: int = 0

    @property
    def can_answer(self) -> bool:
        return self.answer is Answer.NONE


@dataclass(frozen=True, kw_only=True)
class AttemptView:
    """All that decides about an open attempt."""

    min_regions: int
    min_clients: int
    regions: tuple[RegionView, ...]
    deadline: Deadline


# ------------------------------------------------------------------ decide


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Nothing to do until the next event. ``waiting_for`` says in words what that would be."""

    waiting_for: str


@dataclass(frozen=True, kw_only=True)
class Close:
    """Merge the partials of these regions."""

    regions: tuple[RegionId, ...]


@dataclass(frozen=True, kw_only=True)
class Abandon:
    """Give the attempt up; the model stays as it is."""

    reason: str


def decide_attempt(view: AttemptView) -> Wait | Close | Abandon:
    """What to do about an open attempt.

    While a live region has not answered, it is waited for until the deadline; past it, only if its partial is
    on its way. After that the attempt closes with a quorum. Without one it is abandoned at the deadline, or as
    soon as all that have not answered could not make it up: a silent region keeps a quorum in reach until then.
    """
    counted = tuple(sorted(region.region for region in view.regions if region.answer is Answer.PARTIAL))
    open_ones = [region for region in view.regions if region.can_answer]
    if any(_waited_for(region, view.deadline) for region in open_ones):
        return Wait(waiting_for=_attempt_words(view))
    if len(counted) >= view.min_regions:
        return Close(regions=counted)
    if len(counted) + len(open_ones) < view.min_regions:
        return Abandon(reason=f"quorum out of reach: {_shortfall(view, len(counted))}")
    if view.deadline is not Deadline.AHEAD:
        return Abandon(reason=f"deadline passed: {_shortfall(view, len(counted))}")
    return Wait(waiting_for=_attempt_words(view))


def _waited_for(region: RegionView, deadline: Deadline) -> bool:
    if deadline is Deadline.FINAL or not region.presence.is_live:
        return False
    return deadline is Deadline.AHEAD or region.phase in ON_ITS_WAY


# ------------------------------------------------------------------ in words


def _attempt_words(view: AttemptView) -> str:
    """Such as ``2 of 3 regions; ap-south has 1 of 3 clients``."""
    waited = [r for r in view.regions if r.can_answer and (_waited_for(r, view.deadline) or not r.presence.is_live)]
    counted = sum(region.answer is Answer.PARTIAL for region in view.regions)
    taking_part = sum(region.answer is not Answer.ABSTAINED for region in view.regions)
    parts = [f"{counted} of {taking_part} regions"]
    parts += [_region_words(region, view.min_clients) for region in waited]
    return "; ".join(parts)


def _region_words(region: RegionView, min_clients: int) -> str:
    if not region.presence.is_live:
        return f"{region.region} is {region.presence}"
    if region.presence is Presence.EXPECTED:
        return f"{region.region} has not attached yet"
    if region.phase in ON_ITS_WAY or region.phase == "fetching":
        return f"{region.region} is {region.phase}"
    if region.phase == "collecting":
        return f"{region.region} has {region.clients_reported} of {max(region.cohort, min_clients)} updates"
    return f"{region.region} has {region.clients_ready} of {min_clients} clients"


def _shortfall(view: AttemptView, counted: int) -> str:
    """Such as ``1 of 2 regions needed; us abstained (too_few_sites); ap is silent``."""
    parts = [f"{counted} of {view.min_regions} regions needed"]
    for region in view.regions:
        if region.answer is Answer.ABSTAINED:
            parts.append(f"{region.region} abstained ({region.code})")
        elif region.can_answer and not region.presence.is_live:
            parts.append(f"{region.region} is {region.presence}")
        elif region.can_answer:
            parts.append(f"{region.region} did not answer in time")
    return "; ".join(parts)
