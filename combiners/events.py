"""What happens to a region, and what it wants done: the input and output of ``combiners/region.py``.

All frozen. Instructions are carried out by ``combiners/host.py`` in the order given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from combiners.messages import App, Claim
from hierfl.plan import Plan
from hierfl.receipts import Reason, Receipt
from hierfl.types import AttemptKey, ClientRef, UpdateKey


class TimerKind(StrEnum):
    DEADLINE = "deadline"  # the attempt has taken its time
    GONE = "gone"  # a client's stream has been away for the grace
    HOPELESS = "hopeless"  # too few can still answer, for the grace


@dataclass(frozen=True, kw_only=True)
class Timer:
    """Names a timer; setting it again replaces it."""

    kind: TimerKind
    key: AttemptKey | None = None
    client: ClientRef | None = None


# ---------------------------------------------------------------- events


@dataclass(frozen=True, kw_only=True)
class OfferTaken:
    """A plan whose signature holds. ``offer`` is the protobuf message as received."""

    plan: Plan
    offer: bytes


@dataclass(frozen=True)
class ModelReady:
    key: AttemptKey


@dataclass(frozen=True)
class ModelFailed:
    key: AttemptKey
    reason: Reason


@dataclass(frozen=True)
class IntakeJoined:
    incarnation: str


@dataclass(frozen=True)
class IntakeVoid:
    incarnation: str


@dataclass(frozen=True, kw_only=True)
class ClientJoined:
    incarnation: str
    client: ClientRef
    apps: tuple[App, ...]


@dataclass(frozen=True, kw_only=True)
class ClientLeft:
    incarnation: str
    client: ClientRef


@dataclass(frozen=True)
class ClaimsAnswered:
    """Claims of this attempt were granted, or refused: it may be complete."""

    key: AttemptKey


@dataclass(frozen=True)
class UpdateFolded:
    incarnation: str
    key: UpdateKey


@dataclass(frozen=True)
class UpdateLetGo:
    incarnation: str
    key: UpdateKey


@dataclass(frozen=True)
class ClientDeclined:
    """The client will not answer, or its bytes were refused: it is not waited for."""

    key: UpdateKey


@dataclass(frozen=True, kw_only=True)
class HandedOver:
    incarnation: str
    key: AttemptKey
    seal_id: str
    entries: tuple[Claim, ...]


@dataclass(frozen=True)
class PartialSealed:
    key: AttemptKey
    digest: str


@dataclass(frozen=True)
class SumsGone:
    """What ``incarnation`` handed over was lost before it was sealed; nothing of the seal is durable."""

    key: AttemptKey
    incarnation: str


@dataclass(frozen=True)
class SealFailed:
    key: AttemptKey
    reason: Reason


@dataclass(frozen=True)
class PartialAcknowledged:
    key: AttemptKey


@dataclass(frozen=True)
class AttemptOver:
    """Withdrawn, or judged. What is sealed stays sealed until its verdict is settled in the store."""

    key: AttemptKey
    reason: Reason


@dataclass(frozen=True)
class PartialPruned:
    """The sealed bytes over this base and task are gone; their release is not."""

    base_model_hash: str
    task_hash: str


@dataclass(frozen=True)
class TimerFired:
    timer: Timer


@dataclass(frozen=True)
class Drained:
    """The region leaves: seal what can be sealed, hand back the rest."""


Event = (
    OfferTaken
    | ModelReady
    | ModelFailed
    | IntakeJoined
    | IntakeVoid
    | ClientJoined
    | ClientLeft
    | ClaimsAnswered
    | UpdateFolded
    | UpdateLetGo
    | ClientDeclined
    | HandedOver
    | PartialSealed
    | SealFailed
    | SumsGone
    | PartialAcknowledged
    | AttemptOver
    | PartialPruned
    | TimerFired
    | Drained
)

# ---------------------------------------------------------------- instructions


@dataclass(frozen=True)
class FetchModel:
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class OpenAtIntakes:
    key: AttemptKey
    offer: bytes


@dataclass(frozen=True, kw_only=True)
class AskAgain:
    """These clients' updates were lost with their intake: wherever they wait, they get the offer again."""

    key: AttemptKey
    clients: tuple[ClientRef, ...]


@dataclass(frozen=True)
class CloseAtIntakes:
    """Drop the accumulator, tell clients that have not answered."""

    key: AttemptKey
    reason: Reason


@dataclass(frozen=True)
class SetTimer:
    timer: Timer
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Freeze:
    key: AttemptKey
    seal_id: str
    incarnations: tuple[str, ...]


@dataclass(frozen=True)
class Resume:
    key: AttemptKey
    seal_id: str


@dataclass(frozen=True)
class VoidIntake:
    """It handed over what it had not claimed: nothing of it is used."""

    incarnation: str


@dataclass(frozen=True, kw_only=True)
class Seal:
    """Add up the accumulators of these incarnations and make the sum durable with these receipts."""

    plan: Plan
    seal_id: str
    entries: Mapping[str, tuple[Claim, ...]]
    """By incarnation; all agree with the claims granted."""
    receipts: tuple[Receipt, ...]

    @cached_property
    def claims(self) -> list[Claim]:
        """Of all incarnations."""
        return [claim for entries in self.entries.values() for claim in entries]

    @property
    def num_sites(self) -> int:
        return len({claim.key.client.site for claim in self.claims})


@dataclass(frozen=True)
class SendPartial:
    """Uplink the sealed bytes with ``digest`` under ``key``, until acknowledged; nothing new while that goes on."""

    key: AttemptKey
    digest: str


@dataclass(frozen=True)
class StopSending:
    key: AttemptKey


@dataclass(frozen=True)
class Abstain:
    key: AttemptKey
    reason: Reason


@dataclass(frozen=True)
class Tell:
    """Last words on updates: durable first, then to the clients."""

    receipts: tuple[Receipt, ...]


Instruction = (
    FetchModel
    | OpenAtIntakes
    | AskAgain
    | CloseAtIntakes
    | SetTimer
    | Freeze
    | Resume
    | VoidIntake
    | Seal
    | SendPartial
    | StopSending
    | Abstain
    | Tell
)
