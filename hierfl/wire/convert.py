"""Keys and receipts <-> their protobuf messages. What comes from a peer is checked before it has a type of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hierfl.errors import WireError
from hierfl.receipts import Receipt, ReceiptState
from hierfl.types import NAME_PATTERN, AttemptKey, ClientRef, RunId, TaskKind, UpdateKey
from hierfl.wire import digest
from hierfl.wire import hierfl_pb2 as pb

__all__ = ["check_key", "key_from_proto", "key_to_proto", "receipt_from_proto", "receipt_to_proto"]

MAX_COUNT = 2**32 - 1
CODE_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,63}")
"""Codes such as reasons: a peer of the next version may have some that we do not know."""

_TASK_TO_PROTO: Mapping[TaskKind, pb.TaskKind] = {
    TaskKind.TRAIN: pb.TASK_KIND_TRAIN,
    TaskKind.EVALUATE: pb.TASK_KIND_EVALUATE,
}
_TASK_FROM_PROTO = {number: task for task, number in _TASK_TO_PROTO.items()}

_STATE_TO_PROTO: Mapping[ReceiptState, pb.ReceiptState] = {
    ReceiptState.OFFERED: pb.RECEIPT_STATE_UNKNOWN,
    ReceiptState.STAGED: pb.RECEIPT_STATE_STAGED,
    ReceiptState.CLAIMED: pb.RECEIPT_STATE_STAGED,  # the same to a client: no acknowledgement
    ReceiptState.SEALED: pb.RECEIPT_STATE_SEALED,
    ReceiptState.COMMITTED: pb.RECEIPT_STATE_COMMITTED,
    ReceiptState.NOT_COUNTED: pb.RECEIPT_STATE_NOT_COUNTED,
}
_STATE_FROM_PROTO = {number: state for state, number in _STATE_TO_PROTO.items() if state is not ReceiptState.CLAIMED}


def check_key(key: AttemptKey) -> AttemptKey:
    """``key`` itself, if its parts are in range.

    Raises:
        WireError: They are not.
    """
    if not NAME_PATTERN.fullmatch(key.run):
        raise WireError(f"key: {key.run[:80]!r} is no run")
    if not (1 <= key.round <= MAX_COUNT and 1 <= key.attempt <= MAX_COUNT):
        raise WireError(f"key: round {key.round} or attempt {key.attempt} is not from 1 to {MAX_COUNT}")
    return key


def key_to_proto(key: AttemptKey) -> pb.AttemptKey:
    """The message of a key."""
    return pb.AttemptKey(run=key.run, task=_TASK_TO_PROTO[key.task], round=key.round, attempt=key.attempt)


def key_from_proto(message: pb.AttemptKey) -> AttemptKey:
    """The key in a peer's message.

    Raises:
        WireError: A part is missing, unknown or out of range.
    """
    task = _TASK_FROM_PROTO.get(message.task)
    if task is None:
        raise WireError(f"key: {message.task} is no task")
    return check_key(AttemptKey(RunId(message.run), task, message.round, message.attempt))


def receipt_to_proto(receipt: Receipt) -> pb.Receipt:
    """The message of a receipt. It names no client: each is told of its own updates only."""
    return pb.Receipt(
        key=key_to_proto(receipt.key.attempt),
        digest=receipt.digest,
        state=_STATE_TO_PROTO[receipt.state],
        model_version=receipt.version,
        reason=receipt.reason,
    )


def receipt_from_proto(message: pb.Receipt, client: ClientRef) -> Receipt:
    """What a combiner says of an update of ``client``. A state of "unknown" reads as offered: hand it in (again).

    Raises:
        WireError: A part is missing, unknown, or does not go with the state.
    """
    state = _STATE_FROM_PROTO.get(message.state)
    if state is None:
        raise WireError(f"receipt: {message.state} is no state")
    if state is not ReceiptState.OFFERED or message.digest:
        digest.check(message.digest)
    if bool(message.model_version) != (state is ReceiptState.COMMITTED):
        raise WireError(f"receipt: {state} with model version {message.model_version}")
    has_reason = state is ReceiptState.NOT_COUNTED
    if bool(message.reason) != has_reason and not (message.reason and state is ReceiptState.SEALED):
        raise WireError(f"receipt: {state} with reason {message.reason[:80]!r}")
    if message.reason and not CODE_PATTERN.fullmatch(message.reason):
        raise WireError(f"receipt: {message.reason[:80]!r} is no code")
    return Receipt(
        key=UpdateKey(key_from_proto(message.key), client),
        digest=message.digest,
        state=state,
        version=message.model_version,
        reason=message.reason,
    )
