"""gRPC between simulated processes: channels and servers with grpc.aio's faces, over a network that loses things.

The product's own stubs, interceptors and services run on them unchanged. A call may be lost, late, made twice, cut in
the middle or left without its answer; nothing is ever changed on its way. Streams keep their order, as TCP does. What
a caller sees of all this is UNAVAILABLE, a while later.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import grpc

from hierfl.certificates import certificate_pem
from hierfl.pki import Kit
from tests.simulation.loop import Node, SimLoop, current

__all__ = ["Network", "Odds", "SimChannel", "SimServer"]

LATENCY_S = (0.0005, 0.004)
NOTICED_S = (0.05, 1.0)
"""After so long a caller sees that its call broke."""
KEEPALIVE_S = (3.0, 15.0)
"""After so long a connection without a way is noticed by itself."""
LATE_S = (0.2, 6.0)

UNAVAILABLE, OK = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK
Metadata = tuple[tuple[str, Any], ...]


@dataclass
class Odds:
    """How often each thing goes wrong, for one call."""

    lost: float = 0.0
    unanswered: float = 0.0
    late: float = 0.0
    """It runs after its caller has given it up."""
    twice: float = 0.0
    cut: float = 0.0
    """Of a stream."""
    slow: float = 0.0
    """Of a message."""


class Network:
    """Who can reach whom. Nodes are grouped by where they are: the part of their name before the first dot."""

    def __init__(self, loop: SimLoop) -> None:
        self.loop, self.random = loop, loop.random
        self.odds = Odds()
        self.servers: dict[str, SimServer] = {}
        self.blocked: set[tuple[str, str]] = set()
        """Directed: (from, to)."""
        self.calls: set[Call] = set()
        self.on_call: Callable[[str, Node, Node], None] = lambda method, caller, target: None
        """Told of every RPC before it is sent."""

    # ---------------------------------------------------------------- messages

    def open(self, source: Node, target: Node) -> bool:
        return (place(source), place(target)) not in self.blocked

    def latency_s(self) -> float:
        if self.odds.slow and self.random.random() < self.odds.slow:
            return self.random.uniform(*LATE_S)
        return self.random.uniform(*LATENCY_S)

    def at(self, seconds: float, node: Node, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function as ``node``, so much later."""
        context = node._context
        self.loop.call_later(seconds, function, *arguments, context=context.copy())

    # ---------------------------------------------------------------- faults

    def block(self, source: str, target: str, *, both: bool = True) -> None:
        """No way from one place to another; connections that need it are noticed to be dead."""
        self.blocked |= {(source, target), (target, source)} if both else {(source, target)}
        for call in list(self.calls):
            if not (self.open(call.client, call.server) and self.open(call.server, call.client)):
                self.loop.world.call(self.loop.call_later, self.random.uniform(*KEEPALIVE_S), self._look, call)

    def heal(self) -> None:
        self.blocked.clear()
        self.odds = Odds()

    def _look(self, call: Call) -> None:
        dead = not (self.open(call.client, call.server) and self.open(call.server, call.client))
        if dead or not call.server.runs or not call.client.runs:
            call.break_off()

    def lose(self, call: Call) -> None:
        """A message found no way: its connection cannot go on without it."""
        self.loop.world.call(self.loop.call_later, self.random.uniform(*KEEPALIVE_S), call.break_off)

    def gone(self, node: Node) -> None:
        """A node died: its connections are reset."""
        for address in [address for address, server in self.servers.items() if server.node is node]:
            del self.servers[address]
        for call in [call for call in self.calls if node in (call.client, call.server)]:
            call.break_off()

    def silent(self, node: Node) -> None:
        """A node froze: its connections last until somebody misses it."""
        for call in [call for call in self.calls if node in (call.client, call.server)]:
            self.loop.world.call(self.loop.call_later, self.random.uniform(*KEEPALIVE_S), self._look, call)


def place(node: Node) -> str:
    return node.name.partition(".")[0]


# ---------------------------------------------------------------- the caller's side


class SimChannel:
    """A ``grpc.aio.Channel``."""

    def __init__(self, network: Network, kit: Kit, address: str) -> None:
        self.network, self.address, self.node = network, address, current()
        self.pem = certificate_pem(kit.certificate)
        self._calls: set[Call] = set()
        self._is_closed = False

    def _multicallable(
        self, shape: str, method: str, request_serializer: Any, response_deserializer: Any
    ) -> Callable[..., Call]:
        def call(request: Any = None, *, timeout: float | None = None, metadata: Metadata = ()) -> Call:
            if self._is_closed:
                raise grpc.aio.UsageError("the channel is closed")
            made = Call(self, shape, method, request_serializer, response_deserializer, tuple(metadata))
            self._calls.add(made)
            made.start(request, timeout)
            return made

        return call

    def unary_unary(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        return self._multicallable("unary_unary", method, request_serializer, response_deserializer)

    def unary_stream(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        return self._multicallable("unary_stream", method, request_serializer, response_deserializer)

    def stream_unary(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        return self._multicallable("stream_unary", method, request_serializer, response_deserializer)

    def forget(self, call: Call) -> None:
        self._calls.discard(call)

    async def close(self) -> None:
        self._is_closed = True
        for call in list(self._calls):
            call.cancel()


class Call:
    """One RPC as its caller holds it; ``_Half`` objects are what runs of it at the server."""

    def __init__(self, channel: SimChannel, shape: str, method: str, write: Any, read: Any, metadata: Metadata) -> None:
        self.channel, self.network, self.shape, self.method = channel, channel.network, shape, method
        self.metadata = metadata
        self.client, self.server = channel.node, channel.node
        self._write, self._read = write, read
        loop = self.network.loop
        self._outcome: asyncio.Future[Any] = loop.create_future()
        self._outcome.add_done_callback(self._ended)
        self._initial: asyncio.Future[Metadata] = loop.create_future()
        self._answers: deque[bytes] = deque()
        self._news = asyncio.Event()
        self._half: Half | None = None
        self._sent_at, self._cut_after = 0.0, float("inf")
        self._num_frames = 0
        self._deadline: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------ start

    def start(self, request: Any, timeout: float | None) -> None:
        network, draw = self.network, self.network.random.random
        network.calls.add(self)
        if timeout is not None:
            self._deadline = network.loop.call_later(timeout, self._fail, grpc.StatusCode.DEADLINE_EXCEEDED)
        server = network.servers.get(self.channel.address)
        if server is None:
            network.at(network.random.uniform(*NOTICED_S), self.client, self._fail, UNAVAILABLE)
            return
        self.server = server.node
        network.on_call(self.method.rpartition("/")[2], self.client, self.server)
        if not network.open(self.client, self.server) or not self.server.runs:
            network.loop.world.call(network.loop.call_later, network.random.uniform(*KEEPALIVE_S), network._look, self)
        odds = network.odds
        data = request if self._write is None or request is None else self._write(request)
        is_stream = self.shape != "unary_unary"
        fate = draw()
        if is_stream:
            if fate < odds.cut:
                self._cut_after = network.random.randrange(4)
                self._break_at(network.random.uniform(0.01, 8.0))
            self._half = Half(server, self, data, answers=True)
            self._send(self._half.begin)
            return
        marks = [odds.lost, odds.unanswered, odds.late, odds.twice]
        lost, unanswered, late, twice = (sum(marks[: n + 1]) for n in range(4))
        if fate < lost:
            self._break_at(network.random.uniform(*NOTICED_S))
            return
        self._half = Half(server, self, data, answers=fate >= late)
        if fate < late:
            self._break_at(network.random.uniform(*NOTICED_S))
        delay = 0.0 if fate < unanswered or fate >= late else network.random.uniform(*LATE_S)
        self._send(self._half.begin, after_s=delay)
        if late <= fate < twice:
            again = Half(server, self, data, answers=False)
            self._send(again.begin, after_s=network.random.uniform(0.0, LATE_S[1]))

    def _break_at(self, seconds: float) -> None:
        self.network.at(seconds, self.client, self.break_off)

    def _send(self, function: Callable[..., None], *arguments: Any, after_s: float = 0.0) -> None:
        """To the server, in order; lost where there is no way."""
        network = self.network
        if not network.open(self.client, self.server):
            network.lose(self)
            return
        now = network.loop.now_s
        self._sent_at = max(self._sent_at, now + network.latency_s() + after_s)
        network.at(self._sent_at - now, self.server, function, *arguments)

    # ------------------------------------------------------------ what comes

    def take_initial(self, metadata: Metadata) -> None:
        if not self._initial.done():
            self._initial.set_result(metadata)

    def take(self, data: bytes) -> None:
        self._answers.append(data)
        self._news.set()

    def take_end(self, code: Any, details: str, trailing: Any, response: bytes | None) -> None:
        if self._outcome.done():
            return
        if code is not OK:
            self._fail(code, details, trailing)
            return
        self._outcome.set_result(None if response is None else self._value(response))

    def _value(self, data: bytes) -> Any:
        return data if self._read is None else self._read(data)

    def _fail(self, code: Any, details: str = "simulated", trailing: Any = None) -> None:
        if not self._outcome.done():
            empty = grpc.aio.Metadata()
            self._outcome.set_exception(
                grpc.aio.AioRpcError(code, empty, grpc.aio.Metadata(*trailing) if trailing else empty, details)
            )
            self._outcome.exception()  # nobody has to ask

    def break_off(self) -> None:
        """The connection is no more: each side sees it."""
        network = self.network
        network.at(0.0, self.client, self._fail, UNAVAILABLE)
        if self._half is not None:
            self._half.hang_up()

    def _ended(self, _: asyncio.Future[Any]) -> None:
        self.network.calls.discard(self)
        self.channel.forget(self)
        self.take_initial(())
        self._news.set()
        if self._deadline is not None:
            self._deadline.cancel()
        if self._half is not None and not self._half.is_over:
            self._half.hang_up()

    # ------------------------------------------------------------ grpc.aio's face

    def __await__(self) -> Any:
        return self._outcome.__await__()

    def cancel(self) -> bool:
        return self._outcome.cancel()

    def done(self) -> bool:
        return self._outcome.done()

    async def initial_metadata(self) -> Metadata:
        return await asyncio.shield(self._initial)

    async def write(self, frame: bytes) -> None:
        if self._outcome.done():
            raise asyncio.InvalidStateError("the call has ended")
        if self._num_frames >= self._cut_after:
            self.break_off()
        self._num_frames += 1
        if self._half is not None:
            self._send(self._half.feed, frame)

    async def done_writing(self) -> None:
        if self._outcome.done():
            raise asyncio.InvalidStateError("the call has ended")
        if self._half is not None:
            self._send(self._half.feed, None)

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        while not self._answers:
            if self._outcome.done():
                if self._outcome.cancelled():
                    raise asyncio.CancelledError
                if (error := self._outcome.exception()) is not None:
                    raise error
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._value(self._answers.popleft())


# ---------------------------------------------------------------- the server's side


class SimServer:
    """A ``grpc.aio.Server``."""

    def __init__(self, network: Network, interceptors: Iterable[Any]) -> None:
        self.network, self.node = network, current()
        (self.interceptor,) = interceptors
        self.handlers: list[Any] = []
        self.halves: set[Half] = set()

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        self.handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Of gRPC's health service, which has generic ones, too."""

    def bind(self, address: str) -> int:
        self.network.servers[address] = self
        return int(address.rpartition(":")[2])

    async def start(self) -> None:
        """It serves from ``bind`` on."""

    async def stop(self, grace: float | None) -> None:
        for address in [address for address, server in self.network.servers.items() if server is self]:
            del self.network.servers[address]
        for half in list(self.halves):
            half.call.break_off()

    def find(self, details: Any) -> Any:
        return next((found for one in self.handlers if (found := one.service(details)) is not None), None)


class Half:
    """One run of a call at the server: grpc.aio's ``ServicerContext``, and the handler's task."""

    def __init__(self, server: SimServer, call: Call, request: Any, *, answers: bool) -> None:
        self.server, self.call, self._request = server, call, request
        self._answers = answers
        self._task: asyncio.Task[None] | None = None
        self._frames: deque[bytes | None] = deque()
        self._news = asyncio.Event()
        self._status: tuple[Any, str, Any] = (OK, "", None)
        self._serialize: Any = None
        self._sent_at = 0.0
        self.is_over = False

    def begin(self) -> None:
        if self.is_over or self.call.network.servers.get(self.call.channel.address) is not self.server:
            self.call.break_off()
            return
        self.server.halves.add(self)
        self._task = self.call.network.loop.create_task(self._run(), context=contextvars.copy_context())

    def feed(self, frame: bytes | None) -> None:
        self._frames.append(frame)
        self._news.set()

    def hang_up(self) -> None:
        """The caller, or the connection, is gone: its handler is cancelled."""
        self.call.network.at(self.call.network.latency_s(), self.server.node, self._cancel)

    def _cancel(self) -> None:
        self.is_over = True
        if self._task is not None and not self._task.done():
            self._task.cancel()

    async def _run(self) -> None:
        details = SimpleNamespace(method=self.call.method, invocation_metadata=self.call.metadata)

        async def find(details: Any) -> Any:
            return self.server.find(details)

        response: bytes | None = None
        try:
            handler = await self.server.interceptor.intercept_service(find, details)
            self._serialize = handler.response_serializer
            behaviour = getattr(handler, self.call.shape)
            request = self if handler.request_streaming else self._request
            answer = await behaviour(request, self)
            if not handler.response_streaming:
                response = answer if self._serialize is None else self._serialize(answer)
        except grpc.aio.AbortError:
            pass
        finally:
            self.is_over = True
            self.server.halves.discard(self)
        if self._answers:
            self._send(self.call.take_end, *self._status, response)

    def _send(self, function: Callable[..., None], *arguments: Any) -> None:
        network = self.call.network
        if not self._answers:
            return
        if not network.open(self.server.node, self.call.client):
            network.lose(self.call)
            return
        now = network.loop.now_s
        self._sent_at = max(self._sent_at, now + network.latency_s())
        network.at(self._sent_at - now, self.call.client, function, *arguments)

    # ------------------------------------------------------------ grpc.aio's face

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self  # type: ignore[return-value]

    async def __anext__(self) -> bytes:
        while not self._frames:
            self._news.clear()
            await self._news.wait()
        frame = self._frames[0]
        if frame is None:
            raise StopAsyncIteration
        self._frames.popleft()
        return frame

    def invocation_metadata(self) -> Metadata:
        return self.call.metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"ssl_tls_version": [b"TLSv1.3"], "x509_pem_cert": [self.call.channel.pem]}

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        self._send(self.call.take_initial, tuple(metadata))

    async def write(self, message: Any) -> None:
        self._send(self.call.take, message if self._serialize is None else self._serialize(message))

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> None:
        self._status = (code, details, trailing_metadata)
        raise grpc.aio.AbortError
