"""Errors on the wire: one table from the error tree to gRPC's codes, and the way back by error code.

A remote caller learns whose move it is, and no more: an error that is the caller's move travels with its
sentence, one on the server's own side (a disk, a bug) with a fixed one, its text staying in the server's log.
An ``ErrorInfo`` (reason: the error's code, domain: ``hierfl``) carries it; several wrong keys take several. What
names a time to come back has a ``RetryInfo`` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from hierfl import errors
from hierfl.errors import HierFLError

__all__ = ["DOMAIN", "from_rpc_error", "is_own_side", "to_status"]

DOMAIN = "hierfl"
MAX_TEXT = 600
"""Characters of one text in an error; metadata has a bound of its own (``tls.MAX_METADATA_BYTES``)."""
MAX_DETAILS = 4
"""Most errors of a ``ConfigErrors`` that travel."""

_Code = grpc.StatusCode


class Answer(NamedTuple):
    """How one class of errors is told to a remote caller."""

    code: grpc.StatusCode
    words: str = ""
    """Instead of the error's own sentence, where what happened is the server's side's business."""


_TRY_LATER = "the cause is in its log, for its operator; try again later"
ANSWERS: Mapping[type[HierFLError], Answer] = {
    HierFLError: Answer(_Code.INTERNAL, f"the server failed; {_TRY_LATER}"),
    errors.ConfigError: Answer(_Code.INVALID_ARGUMENT),
    errors.NotFound: Answer(_Code.NOT_FOUND),
    errors.Refused: Answer(_Code.PERMISSION_DENIED),
    errors.IdentityError: Answer(_Code.UNAUTHENTICATED),
    errors.WireError: Answer(_Code.INVALID_ARGUMENT),
    errors.VersionMismatch: Answer(_Code.FAILED_PRECONDITION),
    errors.LayoutMismatch: Answer(_Code.FAILED_PRECONDITION),
    errors.RegionError: Answer(_Code.FAILED_PRECONDITION),
    errors.RegionUnreachable: Answer(_Code.UNAVAILABLE),
    errors.RoundClosed: Answer(_Code.FAILED_PRECONDITION),
    errors.StaleEpoch: Answer(_Code.ABORTED),
    errors.RunFailed: Answer(_Code.FAILED_PRECONDITION),
    errors.Unreachable: Answer(_Code.UNAVAILABLE, f"the server cannot reach what it needs; {_TRY_LATER}"),
    errors.ComeBack: Answer(_Code.UNAVAILABLE),
    errors.NotTheLeader: Answer(_Code.UNAVAILABLE),
    errors.StorageError: Answer(_Code.UNAVAILABLE, f"the server cannot use its store; {_TRY_LATER}"),
    errors.DiskFull: Answer(_Code.RESOURCE_EXHAUSTED, "the server's disk is full: its operator makes room"),
    errors.Interrupted: Answer(_Code.UNAVAILABLE, "the server is stopping; connect again in a while"),
}
"""By class; a class that is not here is answered as the nearest above it in the tree."""

_CLASSES: Mapping[str, type[HierFLError]] = {
    kind.code: kind for name in errors.__all__ if issubclass(kind := getattr(errors, name), HierFLError)
}


# --- at the server


def to_status(error: HierFLError) -> grpc.Status:
    """``error`` as a remote caller may see it: code, message, and trailing metadata with its ``ErrorInfo``."""
    answer = _answer(error)
    message = answer.words or str(error)[:MAX_TEXT]
    status = status_pb2.Status(code=answer.code.value[0], message=message)
    for one in _parts(error):
        info = error_details_pb2.ErrorInfo(reason=one.code, domain=DOMAIN)
        arguments = (answer.words,) if answer.words else one.args
        info.metadata.update({str(n): _encode(argument) for n, argument in enumerate(arguments)})
        _add_detail(status, info)
        if isinstance(one, errors.ComeBack):
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(round(1000 * one.after_s))
            _add_detail(status, retry)
    return rpc_status.to_status(status)


def _add_detail(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def is_own_side(error: HierFLError) -> bool:
    """Whether the caller is told a fixed sentence only, so that the error itself belongs in the server's log."""
    return bool(_answer(error).words)


def _answer(error: HierFLError) -> Answer:
    return next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)


def _parts(error: HierFLError) -> Sequence[HierFLError]:
    return error.errors[:MAX_DETAILS] if isinstance(error, errors.ConfigErrors) else (error,)


def _encode(argument: object) -> str:
    """One argument of an error as JSON; what JSON does not know travels as text."""
    if isinstance(argument, bool | int | float | None):
        return json.dumps(argument)
    return json.dumps(str(argument)[:MAX_TEXT], ensure_ascii=False)


# --- at the caller


def from_rpc_error(error: grpc.RpcError, who: str, address: str) -> HierFLError:
    """What a failed call means to its caller.

    Args:
        error: Of a unary call or a stream (``grpc.aio.AioRpcError``).
        who: The other end, as a sentence names it: ``"the controller"``.
        address: Where it was called, ``host:port``.
    Returns:
        The error that the server raised, by its code and with its sentence; else what gRPC's status says.
    """
    sent = list(_sent(error))
    if len(sent) > 1 and all(isinstance(one, errors.ConfigError) for one in sent):
        return errors.ConfigErrors(tuple(one for one in sent if isinstance(one, errors.ConfigError)))
    return sent[0] if sent else _from_code(error.code(), error.details() or "", who, address)


def _sent(error: grpc.RpcError) -> Iterator[HierFLError]:
    """The errors that the server raised; none where gRPC itself, or something between, failed the call."""
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):
        return  # the details are none, or contradict the status: not from a server of ours
    for packed in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if packed.Unpack(info) and info.domain == DOMAIN:
            yield _rebuild(info, status.message)


def _rebuild(info: error_details_pb2.ErrorInfo, message: str) -> HierFLError:
    try:
        arguments = [json.loads(info.metadata[str(n)]) for n in range(len(info.metadata))]
        return _CLASSES[info.reason](*arguments)
    except (KeyError, TypeError, ValueError):  # a code of a later release, or arguments that are not its own
        return HierFLError(message)


_CODES: Mapping[grpc.StatusCode, tuple[type[HierFLError], str]] = {
    _Code.DEADLINE_EXCEEDED: (errors.Unreachable, "did not answer in time: it may be busy, or the network slow"),
    _Code.CANCELLED: (errors.Unreachable, "ended the call before it answered"),
    _Code.UNAUTHENTICATED: (errors.CertificateUntrusted, "does not accept this kit's certificate"),
    _Code.PERMISSION_DENIED: (errors.PermissionRefused, "does not allow this call to this kit's role"),
    _Code.UNIMPLEMENTED: (errors.VersionMismatch, "does not know this call: one side is of another release"),
    _Code.RESOURCE_EXHAUSTED: (errors.WireError, "was sent, or sent, a message above the size limit"),
}
"""What gRPC's own answers mean, where no error of ours came with them."""

_CHECK = "check the address, that it runs, and that the network lets this machine out to it"
_CONNECTING: Sequence[tuple[str, type[HierFLError], str]] = [
    ("certificate has expired", errors.CertificateExpired, "shows an expired certificate, or the clock here is wrong"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        errors.CertificateUntrusted,
        "shows a certificate that the CA in this kit did not sign: wrong address, or a kit of another federation",
    ),
    ("Hostname", errors.CertificateUntrusted, "shows the certificate of somebody else: check the address"),
    (
        "WRONG_VERSION_NUMBER",
        errors.CertificateUntrusted,
        "speaks no TLS: another program listens there, check the address",
    ),
    ("refused", errors.Unreachable, f"refuses the connection: {_CHECK}"),
    ("DNS", errors.Unreachable, "has no address that this machine can look up: check its name"),
    (
        "closed",
        errors.Unreachable,
        f"closed the connection: {_CHECK}; that it is the right one, it takes this kit's certificate and TLS 1.3 only",
    ),
]
"""Words in gRPC's account of a failed connection, the telling ones first, and what each means."""


def _from_code(code: grpc.StatusCode, details: str, who: str, address: str) -> HierFLError:
    subject = f"{who} at {address}"
    if code is _Code.UNAVAILABLE:
        for word, kind, meaning in _CONNECTING:
            if word in details:
                return kind(f"{subject} {meaning}")
        return errors.Unreachable(f"{subject} does not answer: {_CHECK}")
    kind, meaning = _CODES.get(code, (HierFLError, "failed; the cause is in its log, for its operator"))
    return kind(f"{subject} {meaning}")
