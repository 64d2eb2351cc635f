"""What the Region and its Intakes say to each other: plain frozen values, the same with and without Ray.

One ``tick`` carries everything that waits at an intake; the two protocols below are all that either
side knows of the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from hierfl.aggregation import ColumnGroup, PartialAggregate
from hierfl.plan import Plan
from hierfl.receipts import Reason, Receipt
from hierfl.types import AttemptKey, ClientRef, Int64Array, ModelHash, UpdateKey
from hierfl.wire.transfer import Frame

__all__ = [
    "Answer",
    "App",
    "Claim",
    "ClaimAnswer",
    "ClientView",
    "Connection",
    "HandOver",
    "IntakePort",
    "Model",
    "Opening",
    "Outcome",
    "Ranged",
    "RegionPort",
    "Registration",
    "Report",
    "Stored",
    "Tick",
    "TickReply",
    "serves",
]


@dataclass(frozen=True)
class App:
    """An app that a client serves."""

    name: str
    version: str


def serves(apps: Iterable[App], plan: Plan) -> bool:
    """Whether one of ``apps`` is the plan's."""
    task = plan.task
    return any(app.name == task.app and task.app_version in ("", app.version) for app in apps)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """A client joined an intake (or changed its apps), or left it."""

    client: ClientRef
    joined: bool
    apps: tuple[App, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One checked update that an intake asks to fold. ``signature`` is the client's own."""

    key: UpdateKey
    digest: str
    weight: int
    signature: bytes
    metrics: frozenset[str] = frozenset()
    """Names of the metrics that the update carries."""


class Answer(StrEnum):
    """What becomes of a claim."""

    GRANTED = "granted"  # fold it
    KNOWN = "known"  # counted in already, or its last word is spoken: here is the receipt
    LATER = "later"  # the region is sealing: claim again when it has gone on, or closed
    REFUSED = "refused"  # not counted, for a reason


@dataclass(frozen=True, kw_only=True)
class ClaimAnswer:
    """``receipt`` where known, ``reason`` where refused."""

    key: UpdateKey
    answer: Answer
    receipt: Receipt | None = None
    reason: Reason | None = None


class Outcome(StrEnum):
    """What an intake reports of a client's work."""

    FOLDED = "folded"  # in the accumulator
    LET_GO = "let_go"  # granted, but not folded: the claim is free again
    DECLINED = "declined"  # the client said that it will not answer
    INVALID = "invalid"  # its bytes were refused


@dataclass(frozen=True, kw_only=True)
class Report:
    key: UpdateKey
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class Tick:
    """All that waits at an intake, in the order in which it happened within each field. Each has a higher ``number``
    than those before it; one that is sent again keeps its own.
    """

    number: int
    connections: tuple[Connection, ...] = ()
    reports: tuple[Report, ...] = ()
    claims: tuple[Claim, ...] = ()
    asks: tuple[UpdateKey, ...] = ()
    """Keys whose receipts a client asks for."""
    bytes_in: int = 0
    """Payload from sites since the incarnation began."""
    bytes_out: int = 0


@dataclass(frozen=True, kw_only=True)
class TickReply:
    """``known`` is false where the region holds this incarnation void: it must register anew."""

    known: bool
    answers: tuple[ClaimAnswer, ...] = ()
    """One for each of ``claims``."""
    told: tuple[ClaimAnswer, ...] = ()
    """One for each of ``asks``: KNOWN with its receipt, LATER where it may (soon) be handed in, else REFUSED."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """An attempt as an intake needs it: the offer's exact bytes (protobuf), for its clients and itself.

    ``model``: the frames of its base model, where they are small enough to go along with the offer.
    """

    key: AttemptKey
    offer: bytes
    model: tuple[bytes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Registration:
    """``endpoints``: the region's signed list (protobuf), for its clients; empty where none is made yet."""

    incarnation: str
    openings: tuple[Opening, ...] = ()
    endpoints: bytes = b""


class Stored(Protocol):
    """Sums in the object store."""

    async def fetch(self) -> PartialAggregate:
        """Bring them here. Raises ``StorageError`` where they are gone."""
        ...


class Ranged(Protocol):
    """Sums that stay where they were made, at several shards, and are read block by block while they are sealed."""

    @property
    def groups(self) -> tuple[ColumnGroup, ...]: ...
    @property
    def weight(self) -> int: ...
    @property
    def num_updates(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, int]: ...

    async def block(self, group: str, start: int, stop: int) -> Int64Array:
        """Sums of a group's values from ``start`` to ``stop``, shape ``(n,)``, or ``(2, n)`` of a wide one.

        Raises:
            StorageError: They are gone, or another seal's by now.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class HandOver:
    """What one incarnation folded in one attempt, or several of them. ``partial`` is absent where it folded nothing,
    where it has stayed in the object store: then ``stored`` gives it, and where shards have it: then ``ranged`` does.
    """

    incarnation: str
    key: AttemptKey
    seal_id: str
    entries: tuple[Claim, ...] = ()
    partial: PartialAggregate | None = None
    stored: Stored | None = None
    ranged: Ranged | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as it is served: the frames of its transfer, header to trailer, as they were checked; and those of
    transfers of it as a difference to another model, by that one's hash.
    """

    model_hash: ModelHash
    frames: Sequence[Frame]
    deltas: Mapping[ModelHash, Sequence[Frame]] = field(default_factory=dict)

    def frames_for(self, bases: Iterable[str]) -> Sequence[Frame]:
        """What is sent to somebody who has these models."""
        return next((self.deltas[ModelHash(base)] for base in bases if base in self.deltas), self.frames)


@dataclass(frozen=True, kw_only=True)
class ClientView:
    """A connected client, for operators of the region only."""

    client: ClientRef
    apps: tuple[App, ...]
    state: str
    """``"waiting"``, ``"working"``, ``"uploading"``, ``"reported"``."""
    connected_for_s: float


class RegionPort(Protocol):
    """The Region, as an intake calls it. Every call may run twice and does the same then.

    ``address`` of ``register`` is where clients reach the intake; empty where that is not known.
    """

    async def register(self, name: str, address: str, port: IntakePort) -> Registration: ...
    async def tick(self, incarnation: str, tick: Tick) -> TickReply: ...
    async def model(self, model_hash: ModelHash) -> Model | None: ...
    async def clients(self) -> tuple[ClientView, ...]: ...


class IntakePort(Protocol):
    """An Intake, as the Region calls it. Every call may run twice and does the same then."""

    async def open(self, opening: Opening) -> None: ...
    async def ask_again(self, key: AttemptKey, clients: tuple[ClientRef, ...]) -> None: ...
    async def freeze(self, key: AttemptKey, seal_id: str) -> HandOver: ...
    async def add(self, hand_overs: tuple[HandOver, ...]) -> HandOver: ...
    async def resume(self, key: AttemptKey, seal_id: str) -> None: ...
    async def close(self, key: AttemptKey, reason: str) -> None: ...
    async def deliver(self, receipts: tuple[Receipt, ...]) -> None: ...
    async def list_endpoints(self, endpoints: bytes) -> None: ...
