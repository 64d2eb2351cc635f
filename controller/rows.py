"""What the controller's store keeps: frozen documents, each with the key it is found by.

``RunRow``, ``AttemptRow`` and ``RegionRow`` are replaced as things move on; ``AnswerRow``, ``ModelRow`` and
``RoundRow`` are written once and never change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hierfl.aggregation import ColumnGroup
from hierfl.errors import DigestMismatch
from hierfl.job import Job
from hierfl.plan import TaskSpec
from hierfl.records import CountedPartial, PartialHead
from hierfl.rounds import RoundEvent, RoundState, next_round_state
from hierfl.runs import RunEvent, RunState, next_run_state
from hierfl.types import AttemptKey, ModelHash, RegionId, RunId, TaskKind

__all__ = ["AnswerRow", "AttemptRow", "ModelRow", "RegionRow", "RegionShare", "RoundRow", "Row", "RunRow"]


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run: what was submitted, fixed for good, and how far it is."""

    run: RunId
    request_id: str
    job: Job
    regions: tuple[RegionId, ...]
    """Provisioned when it was submitted: they share out the total weight."""
    groups: tuple[ColumnGroup, ...]
    """Vectors of an update, fixed when it was submitted."""
    exact_in_two_tiers: bool
    layout_hash: str
    num_params: int
    """Values of a model."""
    submitted_unix_ns: int
    state: RunState = RunState.SUBMITTED
    reason: str = ""
    version: int = 0
    model_hash: ModelHash
    """Of ``version``."""
    model_digest: str = ""
    """Of its transfer; empty where that is not known."""
    state_digest: str = ""
    """Of the strategy's state after ``version``."""
    rounds_committed: int = 0
    rounds_abandoned: int = 0
    """Attempts at rounds of training."""
    abandoned_in_a_row: int = 0
    last_reason: str = ""
    """Why the last attempt was abandoned."""
    evaluation_over: bool = False
    ended_unix_ns: int = 0

    def after(self, event: RunEvent, *, now_unix_ns: int = 0) -> RunRow:
        """The run after ``event``; its ``reason`` is the event's."""
        state = next_run_state(self.state, event)
        ended = now_unix_ns if state.is_terminal else 0
        return replace(self, state=state, reason=getattr(event, "reason", ""), ended_unix_ns=ended)


@dataclass(frozen=True, kw_only=True)
class AttemptRow:
    """One attempt at a round."""

    run: RunId
    task: TaskKind
    round: int
    attempt: int
    spec: TaskSpec
    """As offered: a controller that adopts the attempt signs the same plan again."""
    base_version: int
    base_hash: ModelHash
    base_digest: str = ""
    opened_unix_ns: int
    state: RoundState = RoundState.COLLECTING
    reason: str = ""

    @property
    def key(self) -> AttemptKey:
        return AttemptKey(self.run, self.task, self.round, self.attempt)

    def after(self, event: RoundEvent) -> AttemptRow:
        """The attempt after ``event``; its ``reason`` is the event's."""
        return replace(self, state=next_round_state(self.state, event), reason=getattr(event, "reason", ""))


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """What a region said to an attempt: its partial aggregate, or that it abstains, with a code. Written once."""

    run: RunId
    task: TaskKind
    round: int
    attempt: int
    region: RegionId
    received_unix_ns: int
    code: str = ""
    """Of an abstention; then the rest is empty."""
    digest: str = ""
    """Of the partial's transfer, ``alg:hex``."""
    head: PartialHead | None = None
    blob: str = ""
    """Name of its bytes among the blobs: the same digest."""
    size_bytes: int = 0
    """Of its transfer."""

    @property
    def key(self) -> AttemptKey:
        return AttemptKey(self.run, self.task, self.round, self.attempt)

    @property
    def counted(self) -> CountedPartial:
        """What a record that counts this partial says of it."""
        assert self.head is not None, "an abstention is not counted"
        return CountedPartial(
            region=self.region,
            digest=self.digest,
            weight=self.head.weight,
            num_sites=self.head.num_sites,
            num_updates=self.head.num_updates,
        )

    def require_same(self, later: AnswerRow) -> None:
        """A region's first word stands: an abstention after it changes nothing, another partial is refused.

        Raises:
            DigestMismatch: ``later`` is a partial with another digest.
        """
        if later.digest and later.digest != self.digest:
            raise DigestMismatch(f"{self.region} has answered {self.key} with another partial; it is not replaced")


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One version of a run's model. Version 0 has no record. Written once."""

    run: RunId
    version: int
    model_hash: ModelHash
    layout_hash: str
    num_params: int
    size_bytes: int
    committed_unix_ns: int
    record: bytes = b""
    signature: bytes = b""
    certificate: bytes = b""


@dataclass(frozen=True, kw_only=True)
class RegionShare:
    """One region's part of a round."""

    region: RegionId
    weight: int
    num_sites: int
    num_updates: int
    size_bytes: int
    digest: str
    collected_in: RunId
    """The run whose updates these are: another one where a sum was sent again."""


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """A committed round, as it is told. Written once."""

    run: RunId
    task: TaskKind
    round: int
    attempt: int
    version: int
    model_hash: ModelHash
    weight: int
    num_sites: int
    num_updates: int
    metrics: Mapping[str, float]
    seconds: float
    committed_unix_ns: int
    regions: tuple[RegionShare, ...] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True)
class RegionRow:
    """The newest start of a region's combiner that this federation has seen."""

    region: RegionId
    region_epoch: int
    store_id: str


Row = RunRow | AttemptRow | AnswerRow | ModelRow | RoundRow | RegionRow
