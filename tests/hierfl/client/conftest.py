"""A small combiner for the client's tests: real gRPC, real certificates, real transfers; it only remembers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from hierfl import documents, provision
from hierfl.aggregation import ColumnGroup, GroupKind, Weighting
from hierfl.client.app import App
from hierfl.client.offers import SitePolicy
from hierfl.client.params import make_layout
from hierfl.client.runner import serve
from hierfl.client.task import Metrics, Task, Update
from hierfl.encodings import EncodingSpec
from hierfl.errors import ComeBack, Interrupted, NotFound, RoundClosed
from hierfl.layout import Layout, model_hash
from hierfl.metrics import MetricSpec
from hierfl.pki import Kit
from hierfl.plan import PLAN_CONTEXT, Caps, ModelRef, Plan, TaskSpec, plan_statement
from hierfl.receipts import Receipt, ReceiptState
from hierfl.records import UPDATE_CONTEXT, UpdateHead, update_statement
from hierfl.types import AttemptKey, ClientRef, RegionId, RunId, TaskKind, UpdateKey
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc, tls, transfer
from hierfl.wire.access import AccessInterceptor, current_identity
from hierfl.wire.convert import key_from_proto, key_to_proto, receipt_to_proto
from hierfl.wire.fetch import model_frames

PATIENCE_S = 20.0
METRICS = tuple(
    MetricSpec(name=name, scale=scale, max_abs=2**20)
    for name, scale in [
        ("num_examples", 0),
        ("train_loss_sum", 20),
        ("eval_examples", 0),
        ("eval_loss_sum", 20),
        ("eval_correct", 0),
    ]
)


@dataclass(frozen=True)
class Federation:
    """Kits on disk: one controller, one region, two clients of one site."""

    folder: Path

    @property
    def controller(self) -> Kit:
        return Kit.load(self.folder / "kits" / "controller")

    @property
    def combiner(self) -> Kit:
        return Kit.load(self.folder / "kits" / "regions" / "eu" / "combiner")

    def client_kit(self, number: int = 0) -> Path:
        return self.folder / "kits" / "sites" / "eu" / "site-00" / f"client-{number:02d}"

    def set_address(self, address: str) -> None:
        for number in range(2):
            path = self.client_kit(number) / "kit.toml"
            lines = [line for line in path.read_text().splitlines() if not line.startswith("addresses")]
            path.write_text("\n".join([*lines, f'addresses = ["{address}"]', ""]))


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    folder = tmp_path_factory.mktemp("federation")
    provision.init(folder, "fed")
    provision.add_region(folder, "eu")
    provision.add_site(folder, "eu", "site-00", clients=2)
    return Federation(folder)


@dataclass(frozen=True)
class Model:
    """A model as a controller would have it."""

    layout: Layout
    vectors: Mapping[str, np.ndarray]
    version: int = 0

    @property
    def hash(self) -> str:
        return model_hash(self.layout, self.vectors)

    @property
    def ref(self) -> ModelRef:
        size = sum(vector.nbytes for vector in self.vectors.values())
        return ModelRef(version=self.version, model_hash=self.hash, layout_hash=self.layout.hash, size_bytes=size)


def make_plan(model: Model, **changes: Any) -> Plan:
    """Round 1 of a run over ``model``; ``changes`` go to the plan, those of the task to its task."""
    groups = tuple(
        ColumnGroup(name=name, kind=GroupKind.FIXED, s=28, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=size)
        for name, size in model.layout.vectors.items()
    )
    task: dict[str, Any] = {
        "kind": TaskKind.TRAIN,
        "app": "linear",
        "app_version": "",
        "config": {"step": 0.5},
        "client_part": {"proximal_mu": 0.25},
        "groups": groups,
        "metrics": METRICS,
        "evaluate": True,
        "encoding": EncodingSpec(),
    }
    task.update({name: changes.pop(name) for name in list(changes) if name in task})
    plan = Plan(
        federation="fed",
        region=RegionId("eu"),
        run=RunId("run-1"),
        round=1,
        attempt=1,
        seed=3,
        task=TaskSpec(**task),
        base=model.ref,
        caps=Caps(max_weight=100, region_weight=1000, max_upload_bytes=2**20),
        k=2,
        min_clients=1,
        report_timeout_s=30.0,
        hold_s=3600.0,
    )
    return replace(plan, **changes)


@dataclass
class Received:
    """One update as it arrived."""

    key: UpdateKey
    digest: str
    head: UpdateHead
    vectors: dict[str, np.ndarray]


@dataclass
class FakeCombiner:
    """The combiner's side of the wire. ``offers`` are open attempts: repeated to whoever follows anew."""

    federation: Federation
    models: dict[str, Model] = field(default_factory=dict)
    offers: list[pb.Offer] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    declined: list[tuple[AttemptKey, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    book: dict[UpdateKey, Receipt] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    refuse_uploads: int = 0
    late_tickets: int = 0
    deaf: int = 0
    """So many questions for receipts get no answer, while streams live on."""
    full: list[float] = field(default_factory=list)
    """Seconds after which the next ones that follow are told to come back."""
    after_upload: ReceiptState = ReceiptState.STAGED
    encoding: str = "float32"

    def __post_init__(self) -> None:
        self.followers: dict[ClientRef, asyncio.Queue[pb.FollowResponse]] = {}
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None
        self.port = 0

    # --- the test's side

    async def start(self) -> None:
        kit = self.federation.combiner
        self._server = grpc.aio.server(
            interceptors=[AccessInterceptor(kit.trust, kit.identity)], options=tls.server_options()
        )
        rpc.add_service(self._server, "CombinerService", self)
        self.port = tls.bind(self._server, f"127.0.0.1:{self.port}", tls.server_credentials(kit))
        await self._server.start()
        self.federation.set_address(f"127.0.0.1:{self.port}")

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
        self.followers.clear()

    def offer(self, plan: Plan, *, epoch: int = 1, signer: Kit | None = None) -> pb.Offer:
        """Sign a plan as the controller does, and offer it to all that follow now or later."""
        offer = self.offer_of(plan, epoch=epoch, signer=signer)
        self.offers.append(offer)
        self.push(pb.FollowResponse(offer=offer))
        return offer

    def offer_of(self, plan: Plan, *, epoch: int = 1, signer: Kit | None = None) -> pb.Offer:
        signer = signer or self.federation.controller
        data = plan.to_bytes()
        return pb.Offer(
            key=key_to_proto(plan.key),
            leader_epoch=epoch,
            plan=data,
            signature=signer.sign(plan_statement(epoch, data), PLAN_CONTEXT),
            certificate=signer.certificate_der,
        )

    def push(self, response: pb.FollowResponse) -> None:
        for queue in self.followers.values():
            queue.put_nowait(response)

    def tell(self, receipt: Receipt) -> None:
        """Record a receipt and push it to its client."""
        self.book[receipt.key] = receipt
        queue = self.followers.get(receipt.key.client)
        if queue is not None:
            queue.put_nowait(pb.FollowResponse(receipt=receipt_to_proto(receipt)))

    def tell_all(self, state: ReceiptState, *, version: int = 0, reason: str = "") -> None:
        for receipt in list(self.book.values()):
            self.tell(replace(receipt, state=state, version=version, reason=reason))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that happened here makes the condition true."""
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(condition)

    async def _note(self, call: str) -> None:
        async with self._changed:
            self.calls.append(call)
            self._changed.notify_all()

    # --- the wire's side

    async def Hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloResponse:  # noqa: N802
        return rpc.answer_hello(request)

    async def Follow(self, request: pb.FollowRequest, context: Any) -> AsyncIterator[pb.FollowResponse]:  # noqa: N802
        client = current_identity().client_ref
        if self.full:
            after_s = self.full.pop(0)
            await self._note("Follow refused")
            raise ComeBack("as many are here as can be", after_s)
        queue: asyncio.Queue[pb.FollowResponse] = asyncio.Queue()
        self.followers[client] = queue
        await self._note("Follow")
        yield pb.FollowResponse(welcome=pb.Welcome(incarnation="1"))
        for offer in self.offers:
            yield pb.FollowResponse(offer=offer)
        while True:
            yield await queue.get()

    async def FetchModel(self, request: pb.FetchModelRequest, context: Any) -> AsyncIterator[bytes]:  # noqa: N802
        await self._note("FetchModel")
        if request.model_hash not in self.models:
            raise NotFound("model", request.model_hash)
        model = self.models[request.model_hash]
        outgoing = transfer.Outgoing("model", model.layout.hash, model.vectors, meta=model.layout.to_bytes())
        async for frame in model_frames(outgoing.frames(), request, context):
            yield frame

    async def Admit(self, request: pb.AdmitRequest, context: Any) -> pb.AdmitResponse:  # noqa: N802
        key = UpdateKey(key_from_proto(request.key), current_identity().client_ref)
        self._check_signature(request, key)
        await self._note("Admit")
        known = self.book.get(key)
        if known is not None:
            return pb.AdmitResponse(receipt=receipt_to_proto(known))
        return pb.AdmitResponse(ticket=b"let me in")

    def _check_signature(self, request: pb.AdmitRequest, key: UpdateKey) -> None:
        from hierfl.pki import verify

        number = int(key.client.client.removeprefix("client-"))
        certificate = Kit.load(self.federation.client_kit(number)).certificate
        verify(certificate, request.signature, update_statement(key, request.digest, request.weight), UPDATE_CONTEXT)

    async def Upload(self, frames: AsyncIterator[bytes], context: Any) -> pb.UploadResponse:  # noqa: N802
        if self.refuse_uploads:
            self.refuse_uploads -= 1
            await rpc.first_frame(frames)
            await self._note("Upload refused")
            await context.abort(grpc.StatusCode.UNAVAILABLE, "try later")
        incoming = transfer.Incoming(transfer.Expect("update", None, None, 2**24, encoding=self.encoding))
        await rpc.frames_of(frames, incoming)
        if self.late_tickets:
            self.late_tickets -= 1
            raise RoundClosed("the ticket is too old")
        key = UpdateKey(incoming.header.key, current_identity().client_ref)  # type: ignore[arg-type]  # an update has one
        head = documents.decode(incoming.meta, UpdateHead, "head")
        self.received.append(Received(key, incoming.digest, head, incoming.vectors()))
        receipt = self.book[key] = Receipt(key=key, digest=incoming.digest, state=self.after_upload)
        await self._note("Upload")
        return pb.UploadResponse(receipt=receipt_to_proto(receipt))

    async def Decline(self, request: pb.DeclineRequest, context: Any) -> pb.DeclineResponse:  # noqa: N802
        self.bodies.append(request.SerializeToString())
        self.declined.append((key_from_proto(request.key), request.code))
        await self._note("Decline")
        return pb.DeclineResponse()

    async def GetReceipts(self, request: pb.GetReceiptsRequest, context: Any) -> pb.GetReceiptsResponse:  # noqa: N802
        client = current_identity().client_ref
        keys = [UpdateKey(key_from_proto(key), client) for key in request.keys]
        unknown = [Receipt(key=key, digest="", state=ReceiptState.OFFERED) for key in keys if key not in self.book]
        await self._note("GetReceipts")
        if self.deaf:
            self.deaf -= 1
            raise Interrupted("the region is busy")
        known = [self.book[key] for key in keys if key in self.book]
        return pb.GetReceiptsResponse(receipts=[receipt_to_proto(receipt) for receipt in [*known, *unknown]])


@pytest.fixture
async def combiner(federation: Federation, model: Model) -> AsyncIterator[FakeCombiner]:
    combiner = FakeCombiner(federation, {model.hash: model})
    await combiner.start()
    try:
        yield combiner
    finally:
        await combiner.stop()


# ---------------------------------------------------------------- an app that remembers what it was asked


@dataclass
class LinearApp:
    """Adds ``step`` to every value; counts its calls. ``misbehave`` replaces what ``train`` does."""

    calls: list[Task] = field(default_factory=list)
    evaluations: int = 0
    misbehave: Callable[[Task], Any] | None = None
    can_evaluate: bool = True

    def init(self, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"w": np.ones(3, np.float32), "b": np.zeros((), np.float32), "steps": np.array(10)}

    def train(self, task: Task) -> Any:
        self.calls.append(task)
        if self.misbehave is not None:
            return self.misbehave(task)
        new = {name: task.params[name] + np.float32(task.config["step"]) for name in ("w", "b")}
        return Update({**new, "steps": task.params["steps"] + 1}, num_examples=120, metrics={"loss": 0.5, "f1": 0.9})

    def evaluate(self, task: Task) -> Metrics:
        self.evaluations += 1
        return Metrics(loss=0.25, num_examples=40, accuracy=0.75)

    @property
    def app(self) -> App:
        return App(
            name="linear", init=self.init, train=self.train, evaluate=self.evaluate if self.can_evaluate else None
        )


@pytest.fixture
def linear() -> LinearApp:
    return LinearApp()


@pytest.fixture
def model() -> Model:
    return Model(*make_layout(LinearApp().init({})))


@dataclass
class Running:
    """A client process's inside, in this one."""

    federation: Federation
    directory: Path
    linear: LinearApp
    lines: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def __call__(self, *, clients: int = 1, min_k: int = 2, max_rounds: int | None = None) -> AsyncIterator[Any]:
        kits = [Kit.load(self.federation.client_kit(number)) for number in range(clients)]
        policy = SitePolicy(app=self.linear.app, min_k=min_k)
        task = asyncio.create_task(
            serve(policy, kits, self.directory, {"data": "/here"}, max_rounds=max_rounds, say=self.lines.append)
        )
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @property
    def said(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def running(federation: Federation, combiner: FakeCombiner, tmp_path: Path, linear: LinearApp) -> Running:
    return Running(federation, tmp_path / "client", linear)


@pytest.fixture
def plan(model: Model) -> Callable[..., Plan]:
    """``plan(attempt=2)``: a plan over the test's model."""
    return lambda **changes: make_plan(changes.pop("model", model), **changes)
