"""gRPC at an intake: the service for clients, the one for the region's operators, health. Decides nothing.

Identities come from the connection's certificate; every handler turns messages into calls of the desk.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import grpc
from cryptography import x509
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from combiners.desk import Desk
from combiners.messages import App, Claim, HandOver, Opening, RegionPort, serves
from combiners.placing import MakeShard
from combiners.settings import IntakeSettings
from combiners.sharding import held, hold, room
from hierfl import kernels_encodings, observe
from hierfl.errors import ComeBack, NotFound, RoundClosed, Unreachable, WireError
from hierfl.pki import Kit, verify
from hierfl.plan import DECLINE_CODES
from hierfl.receipts import Receipt
from hierfl.records import UPDATE_CONTEXT, update_statement
from hierfl.types import AttemptKey, ClientRef, ModelHash, UpdateKey
from hierfl.wire import digest, rpc, tls
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.access import AccessInterceptor, current_identity
from hierfl.wire.convert import key_from_proto, receipt_to_proto
from hierfl.wire.fetch import model_frames
from hierfl.wire.transfer import Incoming, is_small, read_header

__all__ = ["IntakeHost", "reachable"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_APPS = 64
MAX_NAME = 200
MAX_KEYS = 1000
LEAVES_KEPT = 16_384
HELLO_NAME = "the combiner"
WILDCARDS = ("0.0.0.0", "[::]", "*")  # noqa: S104 - not bound here: they are no address to dial


class IntakeHost:
    """One intake: a gRPC server and its desk. Implements ``IntakePort`` by handing on to the desk."""

    def __init__(
        self,
        name: str,
        kit: Kit,
        region: RegionPort,
        settings: IntakeSettings | None = None,
        make_shard: MakeShard | None = None,
    ) -> None:
        self.desk = Desk(name, region, settings or IntakeSettings(), make_shard)
        self.address = ""
        self._kit = kit
        self._region = region
        interceptor = AccessInterceptor(kit.trust, kit.identity)
        self._server = grpc.aio.server(interceptors=[interceptor], options=tls.server_options())
        self._health = health.aio.HealthServicer()
        self._desk_task: asyncio.Task[None] | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Ends with the error after which this intake cannot go on."""

    async def start(self, listen: str, advertise: str = "") -> str:
        """Bind ``listen`` (``host:port``, port 0 for any), serve, and register; the address bound.

        Args:
            advertise: ``host:port`` as clients reach it, port 0: the one bound; empty: as ``listen``.
        Raises:
            PortInUse: Another program listens there.
        """
        await asyncio.to_thread(kernels_encodings.warm_up)  # not in the first round
        rpc.add_service(self._server, "CombinerService", _ClientService(self.desk))
        rpc.add_service(self._server, "RegionOperatorService", _OperatorService(self._region))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        port = tls.bind(self._server, listen, tls.server_credentials(self._kit))
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self.address = f"{listen.rpartition(':')[0]}:{port}"
        reached = reachable(self.address, advertise)
        if not reached:
            logger.warning(
                "%s is not in the endpoint list: clients cannot dial %s; --advertise", self.desk.name, listen
            )
        self._desk_task = asyncio.create_task(self.desk.run(reached))
        self._desk_task.add_done_callback(self._ended)
        return self.address

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None and not self.failed.done():
            self.failed.set_exception(task.exception() or Unreachable("the intake ended"))

    async def stop_admitting(self) -> None:
        """Take no more updates; uploads on their way may end, receipts still go out."""
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        self.desk.stop_admitting()

    async def stop(self, grace_s: float = 1.0) -> None:
        """Close the server and everything behind it."""
        self.desk.shut()
        await self._server.stop(grace_s)
        if self._desk_task is not None:
            self._desk_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._desk_task
        self.failed.cancel()

    # ------------------------------------------------------------ IntakePort

    async def open(self, opening: Opening) -> None:
        await self.desk.open(opening)

    async def ask_again(self, key: AttemptKey, clients: tuple[ClientRef, ...]) -> None:
        await self.desk.ask_again(key, clients)

    async def freeze(self, key: AttemptKey, seal_id: str) -> HandOver:
        return await self.desk.freeze(key, seal_id)

    async def add(self, hand_overs: tuple[HandOver, ...]) -> HandOver:
        return await self.desk.add(hand_overs)

    async def resume(self, key: AttemptKey, seal_id: str) -> None:
        await self.desk.resume(key, seal_id)

    async def close(self, key: AttemptKey, reason: str) -> None:
        await self.desk.close(key, reason)

    async def deliver(self, receipts: tuple[Receipt, ...]) -> None:
        await self.desk.deliver(receipts)

    async def list_endpoints(self, endpoints: bytes) -> None:
        await self.desk.list_endpoints(endpoints)


class _ClientService:
    """``CombinerService``: one method an RPC."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._handing_in: set[asyncio.Task[Any]] = set()

    async def Hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloResponse:  # noqa: N802 - the RPC's name
        return rpc.answer_hello(request, HELLO_NAME)

    async def Follow(self, request: pb.FollowRequest, context: Any) -> AsyncIterator[pb.FollowResponse]:  # noqa: N802
        client, apps = _client(), _apps(request)
        incarnation = await self._desk.incarnation()
        age = (request.endpoints_epoch, request.endpoints_version)
        newer = self._desk.endpoints if self._desk.endpoints_age > age else None
        try:
            session = self._desk.door.join(client, apps)
        except ComeBack:
            if newer is not None:
                yield pb.FollowResponse(endpoints=newer)  # there may be room where it belongs
            raise
        session.takes_along, session.takes_models = request.takes_receipts_along, request.takes_models_along
        try:
            welcome = pb.Welcome(incarnation=incarnation, endpoints=newer, intake=self._desk.name)
            yield pb.FollowResponse(welcome=welcome)
            for offer in self._desk.offers(lambda plan: serves(apps, plan)):
                yield offer
            while (event := await session.queue.get()) is not None:
                if (whole := self._desk.complete(session, event)) is not None:
                    yield whole
            if session.goodbye is not None:
                raise session.goodbye
        finally:
            self._desk.door.leave(session)

    async def Admit(self, request: pb.AdmitRequest, context: Any) -> pb.AdmitResponse:  # noqa: N802
        key = UpdateKey(key_from_proto(request.key), _client())
        digest.check(request.digest)
        if request.update and not is_small(request.update, request.length_bytes):
            raise WireError("only a small update may come with its request; ask without it, then upload")
        statement = update_statement(key, request.digest, request.weight)
        verify(_leaf(context), request.signature, statement, UPDATE_CONTEXT)
        claim = Claim(key=key, digest=request.digest, weight=request.weight, signature=request.signature)
        with observe.remote_parent(context.invocation_metadata()):
            if request.update:
                work = self._desk.take_whole(claim, request.length_bytes, request.update)
                answer: bytes | Receipt | int = await self._to_the_end(work)
            else:
                answer = await self._desk.admit(claim, request.length_bytes)
        if isinstance(answer, bytes):
            return pb.AdmitResponse(ticket=answer)
        if isinstance(answer, Receipt):
            self._desk.answered(key)
            return pb.AdmitResponse(receipt=receipt_to_proto(answer))
        return pb.AdmitResponse(retry_after_ms=answer)

    async def Upload(self, frames: rpc.Frames, context: Any) -> pb.UploadResponse:  # noqa: N802
        silence_s = self._desk.settings.silence_s
        first = await rpc.first_frame(frames, silence_s)
        header = read_header(first)
        with (
            observe.remote_parent(context.invocation_metadata()),
            self._desk.line.upload(header.ticket_bytes) as admitted,
        ):
            claim = admitted.claim
            if claim.key != UpdateKey(header.key or claim.key.attempt, _client()):
                raise RoundClosed("the ticket was given for another update; ask to be admitted with this one")
            incoming = self._desk.incoming(claim)
            with held(incoming):
                await self._receive(first, frames, claim, incoming, header.ticket_bytes)
                receipt = await self._to_the_end(self._desk.hand_in(claim, incoming), hold(incoming))
        self._desk.answered(claim.key)
        return pb.UploadResponse(receipt=receipt_to_proto(receipt))

    async def _to_the_end(self, work: Coroutine[Any, Any, T], let_go: Callable[[], None] = lambda: None) -> T:
        """A client that hangs up now does not undo what the Region may have granted already."""
        task = asyncio.ensure_future(work)
        self._handing_in.add(task)
        task.add_done_callback(self._handing_in.discard)
        task.add_done_callback(lambda _: let_go())
        return await asyncio.shield(task)

    async def _receive(self, first: bytes, frames: rpc.Frames, claim: Claim, incoming: Incoming, ticket: bytes) -> None:
        desk = self._desk
        try:
            incoming.feed(first)
            await desk.unfinished.receive(
                claim.key,
                frames,
                incoming,
                self._counted(frames, incoming),
                silence_s=desk.settings.silence_s,
                hold=lambda: hold(incoming, desk.line.hold(ticket)),
            )
        except WireError as error:
            desk.refused(claim.key, error)
            raise

    async def _counted(self, frames: AsyncIterator[bytes], incoming: Incoming) -> AsyncIterator[bytes]:
        await room(incoming)
        async for frame in frames:
            self._desk.bytes_in += len(frame)
            yield frame
            await room(incoming)

    async def Decline(self, request: pb.DeclineRequest, context: Any) -> pb.DeclineResponse:  # noqa: N802
        if request.code not in DECLINE_CODES:
            raise WireError(f"{request.code[:40]!r} is no code to decline with")
        self._desk.decline(UpdateKey(key_from_proto(request.key), _client()))
        return pb.DeclineResponse()

    async def GetReceipts(self, request: pb.GetReceiptsRequest, context: Any) -> pb.GetReceiptsResponse:  # noqa: N802
        if len(request.keys) > MAX_KEYS:
            raise WireError(f"{len(request.keys)} keys are asked for at once; at most {MAX_KEYS}")
        receipts = await self._desk.receipts(_client(), [key_from_proto(key) for key in request.keys])
        return pb.GetReceiptsResponse(receipts=[receipt_to_proto(receipt) for receipt in receipts])

    async def FetchModel(self, request: pb.FetchModelRequest, context: Any) -> AsyncIterator[bytes]:  # noqa: N802
        model = await self._desk.model(ModelHash(request.model_hash))
        if model is None:
            raise NotFound("model", request.model_hash[:64], "this region serves the models of its open rounds")
        async for frame in model_frames(model.frames_for(request.bases), request, context):
            self._desk.bytes_out += len(frame)
            yield frame


class _OperatorService:
    """``RegionOperatorService``: clients by name, for operators of this region only."""

    def __init__(self, region: RegionPort) -> None:
        self._region = region

    async def Hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloResponse:  # noqa: N802
        return rpc.answer_hello(request, HELLO_NAME)

    async def ListClients(self, request: pb.ListClientsRequest, context: Any) -> pb.ListClientsResponse:  # noqa: N802
        views = await self._region.clients()
        clients = [
            pb.ConnectedClient(
                site=view.client.site,
                client=view.client.client,
                apps=[pb.App(name=app.name, version=app.version) for app in view.apps],
                state=view.state,
                connected_for_s=view.connected_for_s,
            )
            for view in views
        ]
        return pb.ListClientsResponse(clients=clients)


def reachable(bound: str, advertise: str = "") -> str:
    """Where clients reach a server: as ``advertise`` says, else where it is bound; empty where that is a wildcard."""
    host, _, port = (advertise or bound).rpartition(":")
    if host in WILDCARDS:
        return ""
    return f"{host}:{bound.rpartition(':')[2]}" if port == "0" else f"{host}:{port}"


def _client() -> ClientRef:
    return current_identity().client_ref


def _apps(request: pb.FollowRequest) -> tuple[App, ...]:
    if len(request.apps) > MAX_APPS:
        raise WireError(f"{len(request.apps)} apps are named; at most {MAX_APPS}")
    if any(len(app.name) > MAX_NAME or len(app.version) > MAX_NAME for app in request.apps):
        raise WireError(f"an app's name or version has more than {MAX_NAME} characters")
    return tuple(App(app.name, app.version) for app in request.apps)


def _leaf(context: Any) -> x509.Certificate:
    """The caller's leaf; the interceptor has checked it."""
    return _read_leaf(context.auth_context()["x509_pem_cert"][0])


@functools.lru_cache(maxsize=LEAVES_KEPT)
def _read_leaf(pem: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(ssl.PEM_cert_to_DER_cert(pem.decode("ascii")))
