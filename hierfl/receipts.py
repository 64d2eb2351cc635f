"""Life of one update. Every state change of it happens in this file's table.

A receipt is what a client is told about one update under one key (run, task, round, attempt, client).
SEALED is the first acknowledgement; COMMITTED and NOT_COUNTED are last words and never change.

    OFFERED -> STAGED -> CLAIMED -> SEALED -> COMMITTED(version)
       ^          |         |          |
       +----------+---------+          |     an intake died, or let go at a seal: hand it in again
       |          |         |          |
       +----------+---------+----------+---> NOT_COUNTED(reason)

A sealed update outlives its attempt: the same sealed bytes go to the next attempt on the same base
model, so abandonment alone is no last word on it (``hierfl/rounds.py`` abandons, the base decides).

What else may come between, and how an update gets its last word without an operator:

    the run is cancelled or fails    REFUSE(run_cancelled | run_failed), sealed or not; a region that was away is
                                     told when it attaches again
    the run has ended otherwise,     REFUSE(late) of what was sealed in time and arrived too late: a round was
    or moved on                      committed without it
    the region drains                LET_GO of what is not sealed: its client keeps it, and is asked again
    the region is retired            nobody is left to say more: the client keeps an update for ``hold_s``, and notes so
    the controller stays away        ORPHAN after ``orphan_s``: still sealed, still kept, and the client is told why
                                     there is no last word; any last word may follow
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from hierfl.errors import InvalidTransition
from hierfl.types import UpdateKey

__all__ = [
    "TRANSITIONS",
    "Reason",
    "Receipt",
    "ReceiptEvent",
    "ReceiptState",
    "next_receipt",
]


class ReceiptState(StrEnum):
    """Where an update is. The first three are not acknowledgements."""

    OFFERED = "offered"
    STAGED = "staged"
    CLAIMED = "claimed"
    SEALED = "sealed"
    COMMITTED = "committed"
    NOT_COUNTED = "not_counted"

    @property
    def is_last_word(self) -> bool:
        """Whether a client may drop its copy of the update."""
        return self in (ReceiptState.COMMITTED, ReceiptState.NOT_COUNTED)


class Reason(StrEnum):
    """Why an update, or a region's partial, was not counted."""

    INVALID = "invalid"  # its bytes do not fit the plan
    DIGEST_CONFLICT = "digest_conflict"  # another digest under the same key
    WEIGHT_SHARE = "weight_share"  # the region's share of the weight was used up
    LATE = "late"  # the region had sealed, or the round had closed
    DECLINED = "declined"  # the client said no, with a code
    TOO_FEW_SITES = "too_few_sites"  # the region abstained: fewer than k sites
    DOMINATED = "dominated"  # the region abstained: one site above max_share
    POLICY = "policy"  # the zone's policy refused
    CAPACITY = "capacity"  # the region serves as many runs as it can
    STORAGE = "storage"  # the region could not write
    ALREADY_RELEASED = "already_released"  # one over this base and task left before; it is gone, or in another form
    REGION_SILENT = "region_silent"  # no word from the region in time
    ATTEMPT_ABANDONED = "attempt_abandoned"  # quorum out of reach; the base model stands
    RUN_CANCELLED = "run_cancelled"
    RUN_FAILED = "run_failed"
    UNKNOWN_ATTEMPT = "unknown_attempt"  # another run, an old or a future round
    CONTROLLER_AWAY = "controller_away"  # no last word: of a sealed update while the controller cannot be reached


class ReceiptEvent(StrEnum):
    """What can happen to an update."""

    STAGE = "stage"
    CLAIM = "claim"
    LET_GO = "let_go"
    SEAL = "seal"
    ABANDON = "abandon"
    COMMIT = "commit"
    REFUSE = "refuse"
    ORPHAN = "orphan"


_S, _E = ReceiptState, ReceiptEvent
TRANSITIONS: Mapping[tuple[ReceiptState, ReceiptEvent], ReceiptState] = {
    (_S.OFFERED, _E.STAGE): _S.STAGED,
    (_S.OFFERED, _E.LET_GO): _S.OFFERED,
    (_S.OFFERED, _E.ABANDON): _S.NOT_COUNTED,
    (_S.OFFERED, _E.REFUSE): _S.NOT_COUNTED,
    (_S.STAGED, _E.STAGE): _S.STAGED,
    (_S.STAGED, _E.CLAIM): _S.CLAIMED,
    (_S.STAGED, _E.LET_GO): _S.OFFERED,
    (_S.STAGED, _E.ABANDON): _S.NOT_COUNTED,
    (_S.STAGED, _E.REFUSE): _S.NOT_COUNTED,
    (_S.CLAIMED, _E.CLAIM): _S.CLAIMED,
    (_S.CLAIMED, _E.LET_GO): _S.OFFERED,
    (_S.CLAIMED, _E.SEAL): _S.SEALED,
    (_S.CLAIMED, _E.ABANDON): _S.NOT_COUNTED,
    (_S.CLAIMED, _E.REFUSE): _S.NOT_COUNTED,
    (_S.SEALED, _E.SEAL): _S.SEALED,
    (_S.SEALED, _E.ABANDON): _S.SEALED,
    (_S.SEALED, _E.COMMIT): _S.COMMITTED,
    (_S.SEALED, _E.REFUSE): _S.NOT_COUNTED,
    (_S.SEALED, _E.ORPHAN): _S.SEALED,
    (_S.COMMITTED, _E.COMMIT): _S.COMMITTED,
    (_S.COMMITTED, _E.ABANDON): _S.COMMITTED,
    (_S.COMMITTED, _E.ORPHAN): _S.COMMITTED,
    (_S.NOT_COUNTED, _E.REFUSE): _S.NOT_COUNTED,
    (_S.NOT_COUNTED, _E.ABANDON): _S.NOT_COUNTED,
    (_S.NOT_COUNTED, _E.ORPHAN): _S.NOT_COUNTED,
}


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What is known of one update. ``version`` where committed; ``reason`` where not counted, or where a sealed one has
    to wait for its last word.
    """

    key: UpdateKey
    digest: str
    state: ReceiptState
    version: int = 0
    reason: str = ""


def next_receipt(receipt: Receipt, event: ReceiptEvent, *, version: int = 0, reason: str = "") -> Receipt:
    """The receipt after ``event``. A last word keeps the version or reason it was first given.

    Raises:
        InvalidTransition: The table has no such pair, or a commit names another version.
    """
    state = TRANSITIONS.get((receipt.state, event))
    if state is None or (receipt.state is _S.COMMITTED and event is _E.COMMIT and version != receipt.version):
        raise InvalidTransition("receipt", receipt.state, event)
    if receipt.state.is_last_word:
        return receipt
    return replace(
        receipt,
        state=state,
        version=version if state is _S.COMMITTED else 0,
        reason=reason if state is _S.NOT_COUNTED or event is _E.ORPHAN else "",
    )
