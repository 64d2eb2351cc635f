"""Who may call what: deny by default. An RPC that is not in ``ALLOWED`` is refused, whoever calls.

``AccessInterceptor`` stands before every handler of every server: it checks the caller's certificate,
this table, and that a region's server is called from its own region; only then is a message even read.
Handlers learn the caller from ``current_identity()``: nothing in a message says who sent it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, NoReturn

import grpc

from hierfl.errors import (
    HierFLError,
    IdentityError,
    Interrupted,
    PermissionRefused,
    StorageError,
    Unreachable,
    WireError,
)
from hierfl.pki import Identity, RoleName, TrustStore
from hierfl.wire.status import is_own_side, to_status
from hierfl.wire.tls import PeerVerifier

__all__ = ["ALLOWED", "AccessInterceptor", "authorize", "current_identity"]

logger = logging.getLogger(__name__)

_PACKAGE = "hierfl.v1"
_EVERYONE = frozenset(RoleName)


def _service(name: str, role: RoleName, *methods: str) -> dict[str, frozenset[RoleName]]:
    return {f"/{_PACKAGE}.{name}/{method}": frozenset({role}) for method in methods}


ALLOWED: Mapping[str, frozenset[RoleName]] = {
    **_service(
        "CombinerService",
        RoleName.CLIENT,
        "Hello",
        "Follow",
        "Admit",
        "Upload",
        "Decline",
        "GetReceipts",
        "FetchModel",
    ),
    **_service(
        "ControllerService",
        RoleName.COMBINER,
        "Hello",
        "Attach",
        "Report",
        "Abstain",
        "Uplink",
        "FetchModel",
    ),
    **_service(
        "OperatorService",
        RoleName.OPERATOR,
        "Hello",
        "UploadModel",
        "SubmitRun",
        "ListRuns",
        "GetRun",
        "FollowRun",
        "CancelRun",
        "ResumeRun",
        "ListModels",
        "GetStatus",
        "FetchModel",
    ),
    **_service("RegionOperatorService", RoleName.REGION_OPERATOR, "Hello", "ListClients"),
    "/grpc.health.v1.Health/Check": _EVERYONE,
    "/grpc.health.v1.Health/Watch": _EVERYONE,
}
"""Full RPC name -> roles that may call it. A server answers those of the services that it has."""

_caller: ContextVar[Identity] = ContextVar("hierfl_caller")


def current_identity() -> Identity:
    """Who called the RPC that is being handled. ``LookupError`` outside of a handler."""
    return _caller.get()


def authorize(caller: Identity, method: str, server: Identity) -> None:
    """Raise ``PermissionRefused`` unless ``caller`` may call ``method`` (``/package.Service/Name``) of ``server``."""
    name = method.rpartition("/")[2][:100]
    if caller.role not in ALLOWED.get(method, frozenset()):
        raise PermissionRefused(f"{caller} may not call {name!r} of {server}")
    if server.region and caller.region != server.region:
        raise PermissionRefused(f"{caller} may not call {server}: a region answers to its own only")


Handler = Callable[[Any, grpc.aio.ServicerContext], Any]


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """The one gate of a server, and the place where its handlers' errors become statuses.

    Args:
        trust: The server's pinned CAs.
        server: Who the server is; a combiner answers to its own region only.
        refused: Told of each call that was refused and why, on the event loop: to count, to log.
        clock: Aware wall time, for the validity of certificates.
    """

    def __init__(
        self,
        trust: TrustStore,
        server: Identity,
        refused: Callable[[str, HierFLError], None] | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._server = server
        self._verify = PeerVerifier(trust, clock)
        self._refused = refused or _log_refusal
        self._handlers: dict[str, tuple[grpc.RpcMethodHandler, grpc.RpcMethodHandler]] = {}
        """By method of those served: the handler that stands behind the gate, and the gate before it."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        method = handler_call_details.method
        served = await continuation(handler_call_details)
        inner, gate = self._handlers.get(method, (None, None))
        if gate is None or inner is not served:
            gate = self._gate(method, served or grpc.unary_unary_rpc_method_handler(_not_served))
            if served is not None:
                self._handlers[method] = (served, gate)
        return gate

    def _gate(self, method: str, inner: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        arity = _arity(inner)
        behaviour = getattr(inner, arity)
        read = None if inner.request_streaming else inner.request_deserializer  # one message waits for the gate
        answer = self._answer_many if inner.response_streaming else self._answer_one
        return getattr(grpc, f"{arity}_rpc_method_handler")(
            answer(method, behaviour, read),
            request_deserializer=inner.request_deserializer if inner.request_streaming else None,
            response_serializer=inner.response_serializer,
        )

    def _answer_one(self, method: str, behaviour: Handler, read: Callable[[bytes], Any] | None) -> Handler:
        async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                self._admit(method, context)
                return await behaviour(_parse(request, read), context)
            except Exception as error:  # noqa: BLE001  every failure of a handler ends here, told or hidden
                await _abort(context, method, error)

        return answer

    def _answer_many(self, method: str, behaviour: Handler, read: Callable[[bytes], Any] | None) -> Handler:
        async def answer(request: Any, context: grpc.aio.ServicerContext) -> None:
            try:
                self._admit(method, context)
                await _stream(behaviour(_parse(request, read), context), context)
            except Exception as error:  # noqa: BLE001  as above
                await _abort(context, method, error)

        return answer

    def _admit(self, method: str, context: grpc.aio.ServicerContext) -> None:
        """Let the call in under the caller's identity, or raise."""
        try:
            caller = self._verify(context)
            authorize(caller, method, self._server)
        except (IdentityError, PermissionRefused) as error:
            self._refused(method, error)
            raise
        _caller.set(caller)  # each call is a task of its own, and so has a context of its own


def _arity(handler: grpc.RpcMethodHandler) -> str:
    """gRPC's word for a method's shape, such as ``stream_unary``."""
    return "_".join("stream" if many else "unary" for many in (handler.request_streaming, handler.response_streaming))


async def _not_served(_: bytes, __: grpc.aio.ServicerContext) -> NoReturn:
    raise PermissionRefused("this server does not serve that call")


async def _stream(answers: AsyncGenerator[Any, None] | Awaitable[None], context: grpc.aio.ServicerContext) -> None:
    """Send what a handler yields; one that writes to ``context`` itself (gRPC's health service) is awaited."""
    if isinstance(answers, Awaitable):
        await answers
        return
    async with aclosing(answers):
        async for message in answers:
            await context.write(message)


def _parse(request: Any, read: Callable[[bytes], Any] | None) -> Any:
    if read is None:
        return request
    try:
        return read(request)
    except Exception:  # noqa: BLE001  protobuf has several classes for bytes that are no message
        raise WireError("the request is no message of its kind") from None


async def _abort(context: grpc.aio.ServicerContext, method: str, error: Exception) -> NoReturn:
    """End the call with what its caller may know of ``error``."""
    if isinstance(error, grpc.aio.AbortError):
        raise error  # the handler has ended it already
    told = error if isinstance(error, HierFLError) else HierFLError()
    if is_own_side(told):
        is_known = isinstance(error, StorageError | Unreachable | Interrupted)
        logger.error("%s failed: %s", method, error, exc_info=None if is_known else error)
    status = to_status(told)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort raises")


def _log_refusal(method: str, error: HierFLError) -> None:
    logger.warning("refused a call of %s: %s", method, error)
