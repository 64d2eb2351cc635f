"""Services and stubs, made from the descriptor of hierfl.proto; bulk calls carry frames as raw bytes.

``RawFrame`` stands for bytes that are no protobuf: no serializer touches them (a protobuf ``bytes`` field costs
40 % more CPU). A stub adds the trace's metadata and a deadline to each call; who is at the other end is said once,
in ``hello``, and stands in every error from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any, Protocol

import grpc
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor

from hierfl import __version__, observe
from hierfl.errors import HierFLError, TransferIncomplete
from hierfl.types import AttemptKey
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.header import MAX_HEADER_BYTES, continues, join_header
from hierfl.wire.status import from_rpc_error
from hierfl.wire.transfer import Outgoing
from hierfl.wire.versions import PROTOCOL_VERSIONS, negotiate

__all__ = [
    "FROM_CHUNK",
    "SILENCE_S",
    "Call",
    "Frames",
    "Stub",
    "add_service",
    "answer_hello",
    "chunks_there",
    "clocks_apart",
    "first_frame",
    "frames_of",
    "hello",
    "send_frames",
    "stub",
    "upload_frames",
]

logger = logging.getLogger(__name__)

SOFTWARE = f"hierfl {__version__}"

UNARY_DEADLINE_S = 30.0
DEADLINES_S: Mapping[str, float | None] = {"Admit": None}
"""Of unary calls that differ: ``Admit`` waits in line for as long as its connection lives."""

SILENCE_S = 30.0
"""A transfer without a frame for so long has ended; one that keeps sending, however slowly, has not."""

GO_ON = ("hierfl-transfer", "go-on")
"""Initial metadata by which a server accepts a transfer's header."""

RESUME = "hierfl-transfer-resume"
"""Metadata by which a sender says that it can go on with a cut transfer; its value is the transfer's digest."""

FROM_CHUNK = "hierfl-transfer-from"
"""Initial metadata: so many chunks are there already, from the first on, and do not come again."""

CLOCKS_APART_S = 60.0
"""Clocks that differ by more deserve a warning: certificates and ledgers depend on them, no decision does."""

DRAIN_S = 5.0
"""Longest time that a server reads on after a transfer has turned out wrong."""

INLINE_BYTES = 65_536
"""A smaller frame is checked on the event loop: handing it to a thread would cost more."""

Metadata = Sequence[tuple[str, str | bytes]]


# ---------------------------------------------------------------- both sides


def _service(name: str) -> ServiceDescriptor:
    return pb.DESCRIPTOR.services_by_name[name]


def _message(descriptor: Descriptor) -> Any:
    return getattr(pb, descriptor.name)


def _reader(descriptor: Descriptor) -> Callable[[bytes], Any] | None:
    """How gRPC reads a message; ``None`` leaves its bytes alone."""
    return None if descriptor.name == "RawFrame" else _message(descriptor).FromString


def _writer(descriptor: Descriptor) -> Callable[[Any], bytes] | None:
    return None if descriptor.name == "RawFrame" else _message(descriptor).SerializeToString


def _arity(method: MethodDescriptor) -> str:
    """gRPC's word for a method's shape, such as ``stream_unary``."""
    return "_".join("stream" if many else "unary" for many in (method.client_streaming, method.server_streaming))


# ---------------------------------------------------------------- servers


def add_service(server: grpc.aio.Server, name: str, servicer: object) -> None:
    """Serve every RPC of service ``name`` by the method of that name; handlers get and yield messages, or bytes.

    Raises:
        TypeError: The servicer lacks an RPC.
    """
    service = _service(name)
    lacking = [method.name for method in service.methods if not callable(getattr(servicer, method.name, None))]
    if lacking:
        raise TypeError(f"{type(servicer).__name__} does not serve {', '.join(lacking)} of {service.full_name}")
    handlers = {method.name: _handler(method, getattr(servicer, method.name)) for method in service.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _handler(method: MethodDescriptor, behaviour: Callable[..., Any]) -> Any:
    make = getattr(grpc, f"{_arity(method)}_rpc_method_handler")
    if method.client_streaming:
        behaviour = _taking_frames(behaviour)
    return make(behaviour, _reader(method.input_type), _writer(method.output_type))


def _taking_frames(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def answer(frames: AsyncIterable[bytes], context: grpc.aio.ServicerContext) -> Any:
        taken = Frames(frames, context)
        try:
            return await behaviour(taken, context)
        except HierFLError:
            await taken.drain()
            raise

    return answer


class Frames:
    """The frames of a call. A handler that asks for one after the header accepts it: the caller is told to go on.

    A caller waits for that word (``GO_ON``) before it sends a chunk. So what is refused by its header costs no
    bandwidth, and the refusal arrives: grpc.aio replaces the status of a call that ends while it is being written to
    (grpc issue 36066), which is also why the frames of an accepted call are read before it fails.
    """

    def __init__(self, frames: AsyncIterable[bytes], context: grpc.aio.ServicerContext) -> None:
        self._frames, self._context = frames, context
        self._has_header = self._accepted = False
        self._num_there = 0

    @property
    def resumes(self) -> str:
        """Digest of the transfer that the caller can go on with; empty where it starts anew whatever happens."""
        found = next((value for key, value in self._context.invocation_metadata() or () if key == RESUME), "")
        return found if isinstance(found, str) else ""

    def go_on_from(self, num_chunks: int) -> None:
        """Let the caller skip so many chunks; said together with the word to go on."""
        self._num_there = num_chunks

    def __aiter__(self) -> Frames:
        return self

    async def __anext__(self) -> bytes:
        if self._has_header and not self._accepted:
            self._accepted = True
            there = ((FROM_CHUNK, str(self._num_there)),) if self._num_there else ()
            await self._context.send_initial_metadata((GO_ON, *there))
        frame = await anext(aiter(self._frames))  # grpc.aio's is one iterator, however often it is asked for
        self._has_header = self._has_header or not continues(frame)
        return frame

    async def drain(self) -> None:
        """Read on, for a while, what the caller of a failed call is still sending: a header, or all of it."""
        with contextlib.suppress(TimeoutError, StopAsyncIteration):
            async with asyncio.timeout(DRAIN_S):
                while self._accepted or not self._has_header:
                    await anext(self)


def answer_hello(request: pb.HelloRequest, name: str = "the server") -> pb.HelloResponse:
    """What a server answers to ``Hello``.

    Raises:
        VersionMismatch: No version in common.
    """
    version = negotiate(PROTOCOL_VERSIONS, request.versions, our_name=name, their_name="the caller")
    return pb.HelloResponse(version=version, software=SOFTWARE, time_unix_ns=time.time_ns())


# ---------------------------------------------------------------- receiving


async def first_frame(
    frames: AsyncIterable[bytes], silence_s: float = SILENCE_S, max_bytes: int = MAX_HEADER_BYTES
) -> bytes:
    """The header of a transfer, whole. ``transfer.read_header`` says whom it is addressed to, and so what to expect:
    an ``Incoming`` is then fed this, and the rest by ``frames_of``.

    Raises:
        TransferIncomplete: It ended early, or nothing came for ``silence_s``.
        WireError: More than ``max_bytes``.
    """
    header, stream = b"", aiter(frames)
    while (frame := await _next_frame(stream, silence_s)) is not None:
        header = join_header(header, frame, max_bytes)
        if not continues(frame):
            return header
    raise TransferIncomplete("transfer: ended before its header")


class Receiver(Protocol):
    """What takes the frames of a transfer: an ``Incoming``, or what does more with them."""

    def feed(self, frame: bytes) -> None: ...
    def close(self) -> None: ...


async def frames_of(frames: AsyncIterable[bytes], incoming: Receiver, silence_s: float = SILENCE_S) -> None:
    """Feed all (other) frames to ``incoming`` and close it; chunks are checked in a thread, one behind the network.

    Raises:
        TransferIncomplete: It ended early, or nothing came for ``silence_s``.
        WireError: As ``Incoming.feed`` and ``Incoming.close``.
    """
    loop, rest = asyncio.get_running_loop(), aiter(frames)
    checking: asyncio.Future[None] | None = None
    try:
        while (frame := await _next_frame(rest, silence_s)) is not None:
            if checking is not None:
                await checking
                checking = None
            if len(frame) < INLINE_BYTES:
                incoming.feed(frame)
            else:
                checking = loop.run_in_executor(None, incoming.feed, frame)
    finally:
        if checking is not None:
            await checking
    incoming.close()


async def _next_frame(frames: AsyncIterator[bytes], silence_s: float) -> bytes | None:
    try:
        async with asyncio.timeout(silence_s):
            return await anext(frames, None)
    except TimeoutError:
        raise TransferIncomplete(f"transfer: no frame came for {silence_s:g} s") from None


# ---------------------------------------------------------------- clients


class Call:
    """One RPC of a stub: a grpc.aio multicallable that adds a deadline and the trace's metadata."""

    def __init__(self, owner: Stub, multicallable: Any, deadline_s: float | None) -> None:
        self._owner, self._multicallable, self._deadline_s = owner, multicallable, deadline_s

    def __call__(self, request: Any = None, *, timeout: float | None = None, metadata: Metadata = ()) -> Any:
        """Start the call; ``timeout`` in seconds takes the place of the default deadline."""
        return self._multicallable(
            request, timeout=self._deadline_s if timeout is None else timeout, metadata=(*metadata, *observe.inject())
        )

    def error(self, error: grpc.RpcError) -> HierFLError:
        """What a failed call means, with the peer's name in it."""
        return self._owner.error(error)


class Stub:
    """One ``Call`` for each RPC of a service, by its name."""

    def __init__(self, channel: grpc.aio.Channel, service: ServiceDescriptor) -> None:
        self.who, self.address = "the server", "the other end"
        self._calls = {method.name: _call(self, channel, service.full_name, method) for method in service.methods}

    def __getattr__(self, name: str) -> Call:
        try:
            return self.__dict__["_calls"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"no RPC {name!r}") from None

    def error(self, error: grpc.RpcError) -> HierFLError:
        """What a failed call means, with the peer's name in it."""
        return from_rpc_error(error, self.who, self.address)


def _call(owner: Stub, channel: grpc.aio.Channel, service: str, method: MethodDescriptor) -> Call:
    arity = _arity(method)
    make = getattr(channel, arity)
    multicallable = make(
        f"/{service}/{method.name}",
        request_serializer=_writer(method.input_type),
        response_deserializer=_reader(method.output_type),
    )
    return Call(
        owner, multicallable, DEADLINES_S.get(method.name, UNARY_DEADLINE_S) if arity == "unary_unary" else None
    )


def stub(channel: grpc.aio.Channel, name: str) -> Stub:
    """A client of service ``name`` of hierfl.proto, such as ``"ControllerService"``."""
    return Stub(channel, _service(name))


async def hello(stub: Stub, who: str, address: str) -> int:
    """Open a session: the protocol version that both sides speak. Clocks that are far apart get a warning in the log.

    Args:
        stub: Of any service; keeps the next two for its errors.
        who: The other end, as errors name it: ``"the combiner of eu-west"``.
        address: Where it was looked for, ``host:port``.
    Raises:
        VersionMismatch: No version in common.
        HierFLError: What ``from_rpc_error`` makes of a call that failed.
    """
    stub.who, stub.address = who, address
    try:
        response = await stub.Hello(pb.HelloRequest(versions=PROTOCOL_VERSIONS, software=SOFTWARE))
    except grpc.RpcError as error:
        raise stub.error(error) from None
    apart = clocks_apart(time.time_ns(), response.time_unix_ns)
    if apart:
        words = "this machine's clock is %s that of %s at %s; certificates depend on it: set it"
        logger.warning(words, apart, who, address)
    return negotiate(PROTOCOL_VERSIONS, [response.version], our_name="this program", their_name=f"{who} at {address}")


def clocks_apart(own_unix_ns: int, other_unix_ns: int) -> str:
    """How far two clocks are apart, in words, such as ``1:00:02 ahead of``; empty where it is little, or not said."""
    seconds = (own_unix_ns - other_unix_ns) / 1e9
    if not other_unix_ns or abs(seconds) < CLOCKS_APART_S:
        return ""
    return f"{timedelta(seconds=round(abs(seconds)))} {'ahead of' if seconds > 0 else 'behind'}"


def chunks_there(metadata: Iterable[tuple[str, str | bytes]]) -> int:
    """How many chunks a server's initial metadata say are there already."""
    found = next((value for key, value in metadata if key == FROM_CHUNK), "")
    return int(found) if isinstance(found, str) and len(found) < 16 and found.isdecimal() else 0


async def upload_frames(
    call: Call, outgoing: Outgoing, key: AttemptKey | None = None, ticket: bytes = b"", metadata: Metadata = ()
) -> Any:
    """Send a transfer through an RPC that takes a stream of frames; returns its response. What the server still has
    of the same transfer, because it was cut before, is not sent again.

    Raises:
        HierFLError: What ``from_rpc_error`` makes of a call that failed.
    """
    digest = await asyncio.to_thread(outgoing.encode)
    try:
        return await send_frames(call, outgoing.frames(key, ticket), ((RESUME, digest), *metadata))
    except grpc.RpcError as error:
        raise call.error(error) from None


def _skip(frames: Iterator[bytes], count: int) -> None:
    """Pass over so many; each may be made only now."""
    next(islice(frames, count, count), None)


async def send_frames(call: Call, frames: Iterable[bytes], metadata: Metadata = ()) -> Any:
    """Send frames, header first; the rest once the server has accepted the header, without the chunks that it says
    are there already. Returns the response.

    Raises:
        grpc.RpcError: The call failed.
    """
    sending = call(metadata=metadata)
    has_header, rest = False, iter(frames)
    try:
        for frame in rest:
            await sending.write(frame)
            if not has_header and not continues(frame):
                has_header, told = True, tuple(await sending.initial_metadata())
                if GO_ON not in told:
                    return await sending
                if there := chunks_there(told):
                    await asyncio.to_thread(_skip, rest, there)
        await sending.done_writing()
    except asyncio.InvalidStateError:
        pass  # it has ended already: its status, or even its response, says how
    return await sending
