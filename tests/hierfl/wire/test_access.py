"""The gate of every server, over real connections: each role, each call, each error."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from hierfl import errors, provision
from hierfl.errors import HierFLError, PermissionRefused, WireError
from hierfl.pki import Identity, Kit, RoleName
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import tls
from hierfl.wire.access import ALLOWED, AccessInterceptor, authorize, current_identity
from hierfl.wire.status import ANSWERS, from_rpc_error, to_status

HEALTH = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kit]:
    """One kit of each role in region eu or of the federation, and the combiner and a client of us."""
    folder = tmp_path_factory.mktemp("access") / "acme"
    provision.init(folder, "acme")
    for region in ("eu", "us"):
        provision.add_region(folder, region)
        provision.add_site(folder, region, "site")
    provision.add_operator(folder, "bob", "eu")
    provision.add_operator(folder, "alice")
    return {str(kit.identity): kit for kit in map(Kit.load, _paths(folder))}


def _paths(folder: Path) -> Iterator[Path]:
    return (entry.path for entry in provision.listing(folder).kits)


CLIENT, BOB, ALICE = "client eu/site/client-00", "operator bob of eu", "operator alice"
COMBINER, CONTROLLER = "the combiner of eu", "the controller"


class Everything(grpc.GenericRpcHandler):
    """Serves every call there is or could be: answers one message, the caller's URI, in the shape of the call."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def one(_: Any, __: grpc.aio.ServicerContext) -> bytes:
            return current_identity().uri.encode()

        async def many(_: Any, __: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            yield current_identity().uri.encode()

        arity = _arity(details.method)
        return getattr(grpc, f"{arity}_rpc_method_handler")(many if arity.endswith("stream") else one)


def _arity(method: str) -> str:
    described = METHODS.get(method)
    streams = (described.client_streaming, described.server_streaming) if described else (False, False)
    return "_".join("stream" if many else "unary" for many in streams)


@asynccontextmanager
async def serving(kit: Kit, *handlers: grpc.GenericRpcHandler, refused: Any = None) -> AsyncIterator[str]:
    server = grpc.aio.server(
        interceptors=[AccessInterceptor(kit.trust, kit.identity, refused)], options=tls.server_options()
    )
    server.add_generic_rpc_handlers(handlers)
    health_pb2_grpc.add_HealthServicer_to_server(health_aio.HealthServicer(), server)
    port = tls.bind(server, "127.0.0.1:0", tls.server_credentials(kit))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def connected(caller: Kit, server: Kit, *handlers: grpc.GenericRpcHandler) -> AsyncIterator[grpc.aio.Channel]:
    """A channel from ``caller`` to ``server``, which serves ``handlers``."""
    async with serving(server, *handlers) as address, tls.open_channel(caller, address, server.identity) as channel:
        yield channel


async def call(channel: grpc.aio.Channel, method: str, request: bytes = b"") -> bytes:
    """One call in the shape that the proto gives it; its first message, or the error as a caller of ours sees it."""
    arity = _arity(method)
    made = getattr(channel, arity)(method)(iter([request]) if arity.startswith("stream") else request, timeout=10)
    try:
        return bytes(await (made.read() if arity.endswith("stream") else made))
    except grpc.RpcError as error:
        raise from_rpc_error(error, "the server", "there") from None


# --- the table


def test_the_table_has_every_rpc_of_the_proto_and_nothing_else() -> None:
    assert set(ALLOWED) == set(METHODS) | HEALTH


def test_each_service_has_one_role() -> None:
    services: dict[str, set[RoleName]] = {}
    for method in METHODS:
        services.setdefault(method.split("/")[1], set()).update(ALLOWED[method])
    assert services == {
        "hierfl.v1.CombinerService": {RoleName.CLIENT},
        "hierfl.v1.ControllerService": {RoleName.COMBINER},
        "hierfl.v1.OperatorService": {RoleName.OPERATOR},
        "hierfl.v1.RegionOperatorService": {RoleName.REGION_OPERATOR},
    }


@pytest.mark.parametrize(
    ("server", "callers"),
    [(COMBINER, [CLIENT, BOB, COMBINER]), (CONTROLLER, [CLIENT, BOB, COMBINER, ALICE])],
)
async def test_each_role_may_call_what_the_table_says_and_nothing_else(
    kits: dict[str, Kit], server: str, callers: list[str]
) -> None:
    """Callers are all whose certificates TLS lets through to this server."""
    refusals: list[str] = []
    expected = 0
    async with serving(kits[server], Everything(), refused=lambda method, _: refusals.append(method)) as address:
        for name in callers:
            kit = replace(kits[name], trust=kits[CONTROLLER].trust)
            async with tls.open_channel(kit, address, kits[server].identity) as channel:
                for method in [*METHODS, "/hierfl.v1.CombinerService/Invented", "/other.Service/Call", "/x"]:
                    if kit.identity.role in ALLOWED.get(method, ()):
                        assert await call(channel, method) == kit.identity.uri.encode()
                        continue
                    expected += 1
                    with pytest.raises(PermissionRefused, match=f"{name} may not call .* of {server}"):
                        await call(channel, method)
    assert len(refusals) == expected


@pytest.mark.parametrize("role", list(RoleName))
def test_an_rpc_that_is_not_in_the_table_is_refused_for_each_role(role: RoleName) -> None:
    names = {"region": "eu", "site": "site", "client": "client", "operator": "bob"}
    wanted = {
        RoleName.CLIENT: ("region", "site", "client"),
        RoleName.COMBINER: ("region",),
        RoleName.REGION_OPERATOR: ("region", "operator"),
        RoleName.CONTROLLER: (),
        RoleName.OPERATOR: ("operator",),
    }[role]
    caller = Identity("acme", role, **{name: names[name] for name in wanted})
    for server in (Identity("acme", RoleName.COMBINER, region="eu"), Identity("acme", RoleName.CONTROLLER)):
        for method in ("/hierfl.v1.CombinerService/Invented", "/hierfl.v1.combinerservice/hello", "", "/", "Hello"):
            with pytest.raises(PermissionRefused):
                authorize(caller, method, server)


async def test_a_combiner_answers_to_its_own_region_only(kits: dict[str, Kit]) -> None:
    """Twice over: TLS trusts only the region's CA; and where it trusted more, the gate would still refuse."""
    eu, us = kits[COMBINER], kits["the combiner of us"]
    client = replace(kits[CLIENT], trust=kits[CONTROLLER].trust)
    async with serving(us, Everything()) as address, tls.open_channel(client, address, us.identity) as channel:
        with pytest.raises(errors.Unreachable):
            await call(channel, "/hierfl.v1.CombinerService/Hello")
    assert eu.trust.regions.keys() != us.trust.regions.keys()
    gullible = replace(us, trust=kits[CONTROLLER].trust)
    async with serving(gullible, Everything()) as address, tls.open_channel(client, address, us.identity) as channel:
        with pytest.raises(PermissionRefused, match="a region answers to its own only"):
            await call(channel, "/hierfl.v1.CombinerService/Hello")


async def test_every_role_may_ask_for_health(kits: dict[str, Kit]) -> None:
    async with serving(kits[CONTROLLER]) as address:
        for name in (CLIENT, BOB, COMBINER, ALICE):
            async with tls.open_channel(
                replace(kits[name], trust=kits[CONTROLLER].trust), address, kits[CONTROLLER].identity
            ) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                request = health_pb2.HealthCheckRequest()
                assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
                watch = stub.Watch(request)
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
                watch.cancel()


async def test_a_call_in_the_table_that_this_server_does_not_serve_is_refused(kits: dict[str, Kit]) -> None:
    async with connected(kits[CLIENT], kits[COMBINER]) as channel:
        for method in ("/hierfl.v1.CombinerService/Hello", "/hierfl.v1.CombinerService/Upload"):
            with pytest.raises(PermissionRefused, match="does not serve that call"):
                await call(channel, method)


def test_there_is_no_caller_outside_of_a_call() -> None:
    with pytest.raises(LookupError):
        current_identity()


# --- handlers of each shape


class Shapes(grpc.GenericRpcHandler):
    """Each shape of handler, with serializers of its own: numbers in, numbers out."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def unary_unary(request: int, _: grpc.aio.ServicerContext) -> int:
            return request + 1

        async def stream_unary(requests: AsyncIterator[int], _: grpc.aio.ServicerContext) -> int:
            return sum([request async for request in requests])

        async def unary_stream(request: int, _: grpc.aio.ServicerContext) -> AsyncIterator[int]:
            for number in range(request):
                yield number

        async def stream_stream(requests: AsyncIterator[int], _: grpc.aio.ServicerContext) -> AsyncIterator[int]:
            async for request in requests:
                if request == 0:
                    raise errors.RoundClosed("enough")
                yield request + 1

        name = details.method.rpartition("/")[2]
        shape = {"Hello": unary_unary, "Upload": stream_unary, "Follow": unary_stream, "FetchModel": stream_stream}[
            name
        ]
        return getattr(grpc, f"{shape.__name__}_rpc_method_handler")(shape, json.loads, _dump)


def _dump(number: int) -> bytes:
    return json.dumps(number).encode()


@pytest.fixture
async def shapes(kits: dict[str, Kit]) -> AsyncIterator[grpc.aio.Channel]:
    async with connected(kits[CLIENT], kits[COMBINER], Shapes()) as channel:
        yield channel


def _callable(channel: grpc.aio.Channel, shape: str, name: str) -> Any:
    return getattr(channel, shape)(f"/hierfl.v1.CombinerService/{name}", _dump, json.loads)


async def test_the_gate_lets_every_shape_of_call_through_unchanged(shapes: grpc.aio.Channel) -> None:
    assert await _callable(shapes, "unary_unary", "Hello")(1) == 2
    assert await _callable(shapes, "stream_unary", "Upload")(iter([1, 2])) == 3
    assert [number async for number in _callable(shapes, "unary_stream", "Follow")(3)] == [0, 1, 2]
    assert [number async for number in _callable(shapes, "stream_stream", "FetchModel")(iter([1, 2]))] == [2, 3]


async def test_an_error_in_the_middle_of_a_stream_ends_it_in_its_own_words(shapes: grpc.aio.Channel) -> None:
    stream = _callable(shapes, "stream_stream", "FetchModel")(iter([1, 0]))
    assert await stream.read() == 2
    with pytest.raises(grpc.RpcError) as caught:
        await stream.read()
    rebuilt = from_rpc_error(caught.value, "the combiner", "there")
    assert isinstance(rebuilt, errors.RoundClosed)
    assert str(rebuilt) == "enough"


async def test_a_request_that_is_no_message_is_refused_as_such(shapes: grpc.aio.Channel) -> None:
    with pytest.raises(WireError, match="no message of its kind"):
        await call(shapes, "/hierfl.v1.CombinerService/Hello", b"\xff\xfe")


# --- errors across the wire


def _samples() -> list[HierFLError]:
    """One of each class, with the arguments that it takes."""
    special = {
        errors.ConfigError: errors.ConfigError("round.k", 1, "must be at least 2", "job.toml"),
        errors.ConfigErrors: errors.ConfigErrors(
            (errors.ConfigError("a", 1, "is wrong"), errors.ConfigError("b", None, "is missing"))
        ),
        errors.NotFound: errors.NotFound("run", "x1", "there is y2"),
        errors.InvalidTransition: errors.InvalidTransition("round", "open", "bang"),
        errors.ComeBack: errors.ComeBack("as many are here as can be", 2.5),
        errors.ExtraMissing: errors.ExtraMissing("hierfl train", "hierfl[torch]"),
    }
    kinds = [getattr(errors, name) for name in errors.__all__]
    return [special.get(kind) or kind(f"what {kind.__name__} says, with an é") for kind in kinds]


class Raises(grpc.GenericRpcHandler):
    """Raises the error that it was made with."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def answer(_: bytes, __: grpc.aio.ServicerContext) -> bytes:
            raise self.error

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
async def raising(kits: dict[str, Kit]) -> AsyncIterator[Any]:
    """A function that has a server raise an error, and returns what its caller gets."""
    handler = Raises(RuntimeError())
    async with connected(kits[CLIENT], kits[COMBINER], handler) as channel:

        async def ask(error: Exception) -> HierFLError:
            handler.error = error
            with pytest.raises(HierFLError) as caught:
                await call(channel, "/hierfl.v1.CombinerService/Hello")
            return caught.value

        yield ask


async def test_an_error_that_is_the_callers_move_arrives_as_it_was_raised(raising: Any) -> None:
    told = [error for error in _samples() if not _hidden(error)]
    assert len(told) > 20
    for error in told:
        rebuilt = await raising(error)
        assert type(rebuilt) is type(error)
        assert str(rebuilt) == str(error)
        assert rebuilt.exit_code == error.exit_code
        assert str(pickle.loads(pickle.dumps(rebuilt))) == str(error)


async def test_a_time_to_come_back_travels_as_such_and_for_other_languages_as_retry_info(raising: Any) -> None:
    error = errors.ComeBack("as many are here as can be", 2.5)
    rebuilt = await raising(error)
    assert isinstance(rebuilt, errors.ComeBack)
    assert rebuilt.after_s == 2.5
    (_, details), *_ = to_status(error).trailing_metadata
    retry = error_details_pb2.RetryInfo()
    assert any(one.Unpack(retry) for one in status_pb2.Status.FromString(details).details)
    assert retry.retry_delay.ToMilliseconds() == 2500


async def test_an_error_of_the_servers_own_side_keeps_its_words_at_home(
    raising: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for error in filter(_hidden, _samples()):
        caplog.clear()
        with caplog.at_level(logging.ERROR, "hierfl.wire.access"):
            rebuilt = await raising(error)
        assert str(rebuilt) in {answer.words for answer in ANSWERS.values()}
        assert rebuilt.code in (error.code, "HFL-000")
        assert str(error) in caplog.text


def _hidden(error: HierFLError) -> bool:
    return bool(next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS).words)


async def test_an_unexpected_exception_says_nothing_to_its_caller_and_all_to_the_log(
    raising: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "hierfl.wire.access"):
        rebuilt = await raising(RuntimeError("patient 17 at /srv/secret"))
    assert type(rebuilt) is HierFLError
    assert "patient" not in str(rebuilt)
    assert "the cause is in its log" in str(rebuilt)
    assert "patient 17 at /srv/secret" in caplog.text


async def test_the_largest_error_fits_its_metadata(raising: Any) -> None:
    long = "é" * 5_000
    for error in (
        errors.WireError(long),
        errors.ConfigErrors(tuple(errors.ConfigError(long, long, long, long) for _ in range(50))),
    ):
        rebuilt = await raising(error)
        assert isinstance(rebuilt, errors.WireError | errors.ConfigErrors)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.Unreachable),
        (grpc.StatusCode.UNAUTHENTICATED, errors.CertificateUntrusted),
        (grpc.StatusCode.PERMISSION_DENIED, errors.PermissionRefused),
        (grpc.StatusCode.UNIMPLEMENTED, errors.VersionMismatch),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.WireError),
        (grpc.StatusCode.INTERNAL, HierFLError),
        (grpc.StatusCode.UNKNOWN, HierFLError),
    ],
)
def test_a_status_without_an_error_of_ours_still_names_who_and_where(
    code: grpc.StatusCode, kind: type[HierFLError]
) -> None:
    empty = grpc.aio.Metadata()
    made = from_rpc_error(grpc.aio.AioRpcError(code, empty, empty, "made up"), "the controller", "hub:1")
    assert type(made) is kind
    assert str(made).startswith("the controller at hub:1 ")
    assert "made up" not in str(made)


def test_details_of_a_later_release_or_of_somebody_else_are_not_trusted() -> None:
    status = to_status(errors.RoundClosed("late"))
    empty = grpc.aio.Metadata()
    ((key, value),) = status.trailing_metadata
    later = value.replace(b"HFL-520", b"HFL-999")
    for data, kind in ((later, HierFLError), (b"nonsense", HierFLError), (value[:-3], HierFLError)):
        error = grpc.aio.AioRpcError(status.code, empty, grpc.aio.Metadata((key, data)), status.details)
        assert type(from_rpc_error(error, "the controller", "hub:1")) is kind


async def test_a_caller_that_leaves_in_mid_stream_is_no_failure_of_the_server(
    kits: dict[str, Kit], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(kits[COMBINER], Shapes()) as address:
        for leave in ("cancel", "close"):
            channel = tls.open_channel(kits[CLIENT], address, kits[COMBINER].identity)
            stream = _callable(channel, "stream_stream", "FetchModel")()
            await stream.write(1)
            assert await stream.read() == 2
            if leave == "cancel":
                stream.cancel()
            await channel.close()
        async with tls.open_channel(kits[CLIENT], address, kits[COMBINER].identity) as channel:
            assert await _callable(channel, "unary_unary", "Hello")(1) == 2
    assert not caplog.records
