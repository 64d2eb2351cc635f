"""Real parts around a combiner: kits made by ``provision``, a controller that does as it is told, clients that
speak the wire themselves. Ray only where a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from combiners.host import RegionSettings
from combiners.local import LocalCombiner
from combiners.settings import IntakeSettings
from hierfl import documents, provision
from hierfl.aggregation import ColumnGroup, GroupKind, PartialAggregate, Weighting
from hierfl.border import LEDGER_HEAD_METADATA, head_statement
from hierfl.errors import TransferIncomplete, Unreachable
from hierfl.identity import Identity, RoleName
from hierfl.layout import Layout, model_hash
from hierfl.metrics import MetricSpec
from hierfl.pki import Kit
from hierfl.plan import PLAN_CONTEXT, Caps, ModelRef, Plan, TaskSpec, plan_statement
from hierfl.records import (
    COMMIT_CONTEXT,
    LEDGER_HEAD_CONTEXT,
    UPDATE_CONTEXT,
    CommitRecord,
    CountedPartial,
    PartialHead,
    UpdateHead,
    update_statement,
)
from hierfl.residency import ZonePolicy
from hierfl.types import AttemptKey, ModelHash, RegionId, RunId, TaskKind, UpdateKey
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc, tls
from hierfl.wire.access import AccessInterceptor
from hierfl.wire.convert import key_from_proto, key_to_proto
from hierfl.wire.fetch import model_frames
from hierfl.wire.packed import expect_partial, packed_sums
from hierfl.wire.transfer import Incoming, Outgoing

REGION = RegionId("eu")
NUM_SITES = 5
VALUES = 3000
METRICS = (
    MetricSpec(name="num_examples", scale=0, max_abs=2**20),
    MetricSpec(name="eval_correct", scale=0, max_abs=2**20),
)


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kits of a controller, a region and its sites."""
    folder = tmp_path_factory.mktemp("federation")
    provision.init(folder, "test")
    provision.add_region(folder, REGION)
    for number in range(NUM_SITES):
        provision.add_site(folder, REGION, f"site-{number:02d}", 2)
    provision.add_operator(folder, "ana", REGION)
    return folder


@pytest.fixture(scope="session")
def combiner_kit(federation: Path) -> Kit:
    return Kit.load(federation / "kits" / "regions" / REGION / "combiner")


@pytest.fixture(scope="session")
def controller_kit(federation: Path) -> Kit:
    return Kit.load(federation / "kits" / "controller")


@pytest.fixture(scope="session")
def client_kits(federation: Path) -> list[Kit]:
    """The first client of each site, in order."""
    sites = federation / "kits" / "sites" / REGION
    return [Kit.load(sites / f"site-{number:02d}" / "client-00") for number in range(NUM_SITES)]


@pytest.fixture(scope="session")
def operator_kit(federation: Path) -> Kit:
    return Kit.load(federation / "kits" / "regions" / REGION / "operators" / "ana")


class ToyModel:
    """A model of one vector, and its transfer."""

    def __init__(self, value: float = 0.0) -> None:
        self.layout = Layout.of({"w": np.full(VALUES, value, np.float32)})
        self.vectors = {"train": np.full(VALUES, value, np.float32)}
        self.hash = model_hash(self.layout, self.vectors)
        self.outgoing = Outgoing("model", self.layout.hash, self.vectors, meta=self.layout.to_bytes())


@pytest.fixture(scope="session")
def base() -> ToyModel:
    return ToyModel()


def make_plan(base: ToyModel, **changes: Any) -> Plan:
    group = ColumnGroup(
        name="train", kind=GroupKind.FIXED, s=32, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=VALUES
    )
    plan = Plan(
        federation="test",
        region=REGION,
        run=RunId("run-1"),
        round=1,
        attempt=1,
        seed=7,
        task=TaskSpec(
            kind=TaskKind.TRAIN,
            app="toy",
            app_version="",
            config={},
            client_part={},
            groups=(group,),
            metrics=METRICS,
            evaluate=False,
        ),
        base=ModelRef(version=0, model_hash=base.hash, layout_hash=base.layout.hash, size_bytes=4 * VALUES),
        caps=Caps(max_weight=100, region_weight=10_000, max_upload_bytes=2**20),
        k=2,
        min_clients=3,
        report_timeout_s=60.0,
        hold_s=3600.0,
    )
    return replace(plan, **changes)


@pytest.fixture
def plan(base: ToyModel) -> Plan:
    """A first round for three clients of three sites."""
    return make_plan(base)


class Controller:
    """Serves ``ControllerService`` and records what it is sent; says what a test tells it to say."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.leader_epoch = 1
        self.models: dict[str, Outgoing] = {}
        self.attachments: list[pb.AttachRequest] = []
        self.reports: list[pb.ReportRequest] = []
        self.abstained: asyncio.Queue[pb.AbstainRequest] = asyncio.Queue()
        self.partials: asyncio.Queue[tuple[AttemptKey, PartialHead, PartialAggregate, str]] = asyncio.Queue()
        self.on_attach: list[pb.AttachResponse] = []
        self.refuse_uplinks = 0
        self.hang_uplinks = 0
        """So many uplinks are never answered."""
        self.troubles: dict[str, list[Exception]] = {}
        """What the next calls of an RPC raise."""
        self.address = ""
        self._sessions: list[asyncio.Queue[pb.AttachResponse | None]] = []
        self._attachment = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str = "127.0.0.1:0") -> None:
        interceptor = AccessInterceptor(self.kit.trust, self.kit.identity)
        self._server = grpc.aio.server(interceptors=[interceptor], options=tls.server_options())
        rpc.add_service(self._server, "ControllerService", self)
        port = tls.bind(self._server, address, tls.server_credentials(self.kit))
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    def end_sessions(self) -> None:
        for session in self._sessions:
            session.put_nowait(None)

    async def stop(self) -> None:
        self.end_sessions()
        assert self._server is not None
        await self._server.stop(0)

    def say(self, response: pb.AttachResponse) -> None:
        for session in self._sessions:
            session.put_nowait(response)

    async def attached(self, times: int = 1) -> None:
        """Wait until a region has attached so many times."""
        async with self._attachment:
            await self._attachment.wait_for(lambda: len(self.attachments) >= times)

    def offer_of(self, plan: Plan) -> pb.Offer:
        data = plan.to_bytes()
        return pb.Offer(
            key=key_to_proto(plan.key),
            leader_epoch=self.leader_epoch,
            plan=data,
            signature=self.kit.sign(plan_statement(self.leader_epoch, data), PLAN_CONTEXT),
            certificate=self.kit.certificate_der,
        )

    async def offer(self, plan: Plan) -> None:
        """Offer now, and again to whoever attaches."""
        await self.attached()
        response = pb.AttachResponse(offer=self.offer_of(plan))
        self.on_attach.append(response)
        self.say(response)

    def withdraw(self, key: AttemptKey, reason: str) -> None:
        self.on_attach.clear()
        self.say(pb.AttachResponse(withdrawal=pb.Withdrawal(key=key_to_proto(key), reason=reason)))

    def refuse(self, key: AttemptKey, reason: str) -> None:
        """A verdict: nothing of this attempt was counted."""
        self.on_attach.clear()
        verdict = pb.Verdict(key=key_to_proto(key), leader_epoch=self.leader_epoch, reason=reason)
        self.say(pb.AttachResponse(verdict=verdict))

    def commit(
        self, plan: Plan, digest: str, made: ToyModel, counted: str | None = None, of: AttemptKey | None = None
    ) -> None:
        """A verdict: the region's partial is in version ``plan.round``, which is ``made``.

        ``counted``: digest that the signed record names, where it is another. ``of``: the attempt that the verdict
        is on, where ``plan``'s was a later one.
        """
        self.on_attach.clear()
        self.models[made.hash] = made.outgoing
        named = digest if counted is None else counted
        share = CountedPartial(region=plan.region, digest=named, weight=3, num_sites=3, num_updates=3)
        record = documents.encode(
            CommitRecord(
                federation=plan.federation,
                run=plan.run,
                round=plan.round,
                attempt=plan.attempt,
                version=plan.round,
                model_hash=made.hash,
                layout_hash=made.layout.hash,
                previous_hash=plan.base.model_hash,
                leader_epoch=self.leader_epoch,
                strategy="fedavg",
                exact_in_two_tiers=True,
                partials=(share,) if named else (),
                weight=3,
                metrics={},
                state_digest="",
                committed_unix_ns=_now_ns(),
            )
        )
        verdict = pb.Verdict(
            key=key_to_proto(of or plan.key),
            leader_epoch=self.leader_epoch,
            committed=True,
            partial_digest=digest,
            model_version=plan.round,
            record=record,
            signature=self.kit.sign(record, COMMIT_CONTEXT),
            certificate=self.kit.certificate_der,
            reason="" if digest else "late",
        )
        self.say(pb.AttachResponse(verdict=verdict))

    def _trouble(self, rpc_name: str) -> None:
        if self.troubles.get(rpc_name):
            raise self.troubles[rpc_name].pop(0)

    # ---------------------------------------------------------------- RPCs

    async def Hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloResponse:  # noqa: N802  the RPC
        return rpc.answer_hello(request)

    async def Attach(self, request: pb.AttachRequest, context: Any) -> AsyncIterator[pb.AttachResponse]:  # noqa: N802  the RPC
        self._trouble("Attach")
        session: asyncio.Queue[pb.AttachResponse | None] = asyncio.Queue()
        self._sessions.append(session)
        attached = pb.Attached(leader_epoch=self.leader_epoch, report_every_s=0.3, silence_s=1.0)
        yield pb.AttachResponse(attached=attached)
        for response in list(self.on_attach):
            yield response
        async with self._attachment:
            self.attachments.append(request)
            self._attachment.notify_all()
        try:
            while (response_or_end := await session.get()) is not None:
                yield response_or_end
        finally:
            self._sessions.remove(session)

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:  # noqa: N802  the RPC
        self.reports.append(request)
        return pb.ReportResponse(leader_epoch=self.leader_epoch)

    async def Abstain(self, request: pb.AbstainRequest, context: Any) -> pb.AbstainResponse:  # noqa: N802  the RPC
        self.abstained.put_nowait(request)
        return pb.AbstainResponse()

    async def Uplink(self, frames: AsyncIterator[bytes], context: Any) -> pb.UplinkResponse:  # noqa: N802  the RPC
        incoming = Incoming(expect_partial(None, None, None, max_bytes=2**30))
        await rpc.frames_of(frames, incoming)
        if self.hang_uplinks:
            self.hang_uplinks -= 1
            await asyncio.Event().wait()
        self._trouble("Uplink")
        if self.refuse_uplinks:
            self.refuse_uplinks -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "busy")
        assert incoming.header.key is not None
        head = documents.decode(incoming.meta, PartialHead, "head")
        sums = {group.name: np.zeros(group.shape, np.int64) for group in head.groups}
        packed_sums(incoming, head.groups).add_into(sums)
        partial = PartialAggregate(head.groups, sums, head.weight, head.num_sites, head.num_updates, head.metrics)
        self.partials.put_nowait((incoming.header.key, head, partial, incoming.digest))
        ledger_head = dict(context.invocation_metadata())[LEDGER_HEAD_METADATA]
        return pb.UplinkResponse(
            key=key_to_proto(incoming.header.key),
            digest=incoming.digest,
            countersignature=self.kit.sign(head_statement(ledger_head), LEDGER_HEAD_CONTEXT),
            certificate=self.kit.certificate_der,
        )

    async def FetchModel(self, request: pb.FetchModelRequest, context: Any) -> AsyncIterator[bytes]:  # noqa: N802  the RPC
        self._trouble("FetchModel")
        async for frame in model_frames(self.models[request.model_hash].frames(), request, context):
            yield frame


def _now_ns() -> int:
    import time

    return time.time_ns()


@pytest.fixture
async def controller(controller_kit: Kit, base: ToyModel) -> AsyncIterator[Controller]:
    made = Controller(controller_kit)
    made.models[base.hash] = base.outgoing
    await made.start()
    yield made
    await made.stop()


class Client:
    """One connection of one client, RPC by RPC. Receipts and withdrawals are kept as they come."""

    def __init__(self, kit: Kit, address: str) -> None:
        self.kit = kit
        self.ref = kit.identity.client_ref
        server = Identity(kit.identity.federation, RoleName.COMBINER, region=kit.identity.region)
        self._channel = tls.open_channel(kit, address, server)
        self.stub = rpc.stub(self._channel, "CombinerService")
        self.address = address
        self.events: asyncio.Queue[pb.FollowResponse] = asyncio.Queue()
        self.ended = asyncio.Event()
        self._follower: asyncio.Task[None] | None = None

    async def join(self, app: str = "toy", version: str = "1", **takes: bool) -> Client:
        await rpc.hello(self.stub, "the combiner", self.address)
        self._follower = asyncio.create_task(self._follow(pb.App(name=app, version=version), takes))
        await self.event("welcome")
        return self

    async def _follow(self, app: pb.App, takes: dict[str, bool]) -> None:
        try:
            async for event in self.stub.Follow(pb.FollowRequest(apps=[app], **takes)):
                self.events.put_nowait(event)
        except grpc.RpcError:
            pass
        finally:
            self.ended.set()

    async def event(self, kind: str) -> Any:
        """The next event of this kind; others on the way are dropped."""
        async with asyncio.timeout(10):
            while True:
                event = await self.events.get()
                if event.WhichOneof("event") == kind:
                    return getattr(event, kind)

    async def offer(self) -> Plan:
        return Plan.from_bytes((await self.event("offer")).plan)

    def update(self, plan: Plan, value: float = 1.0, weight: int = 1, **head: Any) -> tuple[Outgoing, int]:
        """An update of ``value`` everywhere."""
        values = {group.name: np.full(group.num_values, value, np.float32) for group in plan.task.groups}
        made = UpdateHead(
            weight=weight,
            metrics=head.get("metrics", {"num_examples": weight}),
            base_model_hash=head.get("base_model_hash", plan.base.model_hash),
            task_hash=head.get("task_hash", plan.task.hash),
        )
        layout_hash = head.get("layout_hash", plan.base.layout_hash)
        return Outgoing("update", layout_hash, head.get("vectors", values), meta=documents.encode(made)), weight

    async def admit(self, key: AttemptKey, outgoing: Outgoing, weight: int, **changes: Any) -> pb.AdmitResponse:
        statement = update_statement(UpdateKey(key, self.ref), outgoing.digest, weight)
        request = pb.AdmitRequest(
            key=key_to_proto(key),
            digest=outgoing.digest,
            length_bytes=changes.get("length_bytes", outgoing.length_bytes),
            weight=weight,
            signature=changes.get("signature", self.kit.sign(statement, UPDATE_CONTEXT)),
            update=changes.get("update", ()),
        )
        try:
            return await self.stub.Admit(request)
        except grpc.RpcError as error:
            raise self.stub.error(error) from None

    async def hand_in(self, plan: Plan, value: float = 1.0, weight: int = 1, **head: Any) -> pb.Receipt:
        """Admit and upload, as often as it takes."""
        outgoing, weight = self.update(plan, value, weight, **head)
        while True:
            admitted = await self.admit(plan.key, outgoing, weight)
            match admitted.WhichOneof("answer"):
                case "receipt":
                    return admitted.receipt
                case "ticket":
                    try:
                        response = await rpc.upload_frames(self.stub.Upload, outgoing, plan.key, admitted.ticket)
                    except TransferIncomplete:  # another stream of the same update has taken over
                        continue
                    return response.receipt
            await asyncio.sleep(admitted.retry_after_ms / 1000)

    async def until_sealed(self, plan: Plan, **update: Any) -> None:
        """Hand in whenever asked, until the update is in the region's durable partial.

        Raises:
            Unreachable: The intake has sent this client away, to come back.
        """
        async with asyncio.timeout(30):
            while True:
                event = await self._next_event()
                if event.WhichOneof("event") == "offer":
                    await self.hand_in(plan, **update)
                elif event.receipt.state == pb.RECEIPT_STATE_SEALED:
                    return

    async def _next_event(self) -> pb.FollowResponse:
        getting, ending = asyncio.ensure_future(self.events.get()), asyncio.ensure_future(self.ended.wait())
        await asyncio.wait((getting, ending), return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if getting.done():
            return getting.result()
        getting.cancel()
        raise Unreachable("the stream has ended")

    async def receipts(self, *keys: AttemptKey) -> list[pb.Receipt]:
        request = pb.GetReceiptsRequest(keys=[key_to_proto(key) for key in keys])
        return list((await self.stub.GetReceipts(request)).receipts)

    async def leave(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        await self._channel.close()


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Any]]:
    """Connects clients; they leave at the end of the test."""
    clients: list[Client] = []

    async def join(kit: Kit, address: str, app: str = "toy", version: str = "1", **takes: bool) -> Client:
        client = Client(kit, address)
        clients.append(client)
        return await client.join(app, version, **takes)

    yield join
    for client in clients:
        await client.leave()


@pytest.fixture
def settings() -> RegionSettings:
    """Two sites are enough, one may dominate, patience is short."""
    return RegionSettings(policy=ZonePolicy(k=2, max_share=1.0), grace_s=0.3, freeze_s=5.0)


@pytest.fixture
def start_combiner(
    combiner_kit: Kit, tmp_path: Path, controller: Controller, settings: RegionSettings
) -> Callable[..., Any]:
    """``async with start_combiner(intakes=2) as combiner``; the same directory each time."""

    @asynccontextmanager
    async def start(
        intakes: int = 1, intake: IntakeSettings | None = None, **changes: Any
    ) -> AsyncIterator[LocalCombiner]:
        directory = tmp_path / "zone"
        made = LocalCombiner(
            combiner_kit,
            directory,
            controller.address,
            intakes=intakes,
            region=replace(settings, **changes),
            intake=intake,
        )
        async with made as combiner:
            await controller.attached()
            yield combiner

    return start


__all__ = ["Client", "Controller", "ModelHash", "ToyModel", "key_from_proto", "make_plan"]


@pytest.fixture(scope="session")
def toy_model() -> Callable[[float], ToyModel]:
    return ToyModel
