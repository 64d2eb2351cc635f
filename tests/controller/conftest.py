"""A controller on the test's own loop, real certificates, real gRPC on loopback, and regions that speak for themselves.

``Region`` stands in for a combiner: it attaches, checks and answers offers with exact sums, and keeps what it is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from cryptography import x509

from controller.app import ControllerApp
from hierfl import documents, provision
from hierfl.aggregation import Accumulator
from hierfl.border import LEDGER_HEAD_METADATA, head_statement
from hierfl.job import Arithmetic, Job, JobHead, RoundRules, StrategyChoice
from hierfl.layout import Layout
from hierfl.operator import Operator
from hierfl.operator import connect as connect_operator
from hierfl.pki import Identity, Kit, RoleName, verify, verify_leaf
from hierfl.plan import PLAN_CONTEXT, Plan, plan_statement
from hierfl.records import LEDGER_HEAD_CONTEXT, PartialHead
from hierfl.types import RegionId, RunId
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc, tls
from hierfl.wire.convert import key_from_proto
from hierfl.wire.fetch import fetch_model
from hierfl.wire.packed import outgoing_partial
from hierfl.wire.transfer import Expect, Outgoing

LAYOUT = Layout.of({"w": np.zeros(3, np.float32)})


def _provisioned(path: Path, *regions: str) -> Path:
    provision.init(path, "fed")
    for region in regions:
        provision.add_region(path, region)
    provision.add_operator(path, "olga")
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of a federation of two regions, made once."""
    return _provisioned(tmp_path_factory.mktemp("two"), "eu", "us")


@pytest.fixture(scope="session")
def folder_of_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _provisioned(tmp_path_factory.mktemp("three"), "ap", "eu", "us")


@pytest.fixture
def job() -> Callable[..., Job]:
    """Makes jobs: ``job(2, min_clients=3)``."""
    return _job


def _job(
    rounds: int = 1, *, app: str = "digits", strategy: str = "fedavg", learning_rate: float = 1.0, **rules: object
) -> Job:
    """Two regions are a quorum, no evaluation, unless ``rules`` say otherwise."""
    usual = {"min_regions": 2, "evaluate_every": 0, "silence_s": 1.0, "report_timeout_s": 30.0}
    made = Job(job=JobHead(name="Digits", app="digits", rounds=rounds), round=RoundRules(**(usual | rules)))
    chosen = StrategyChoice(name=strategy, options={"learning_rate": learning_rate})
    return replace(made, strategy=chosen, arithmetic=Arithmetic(k=2))


class Region:
    """One region's connection to the controller, as a combiner has it."""

    def __init__(self, kit: Kit, address: str, region_epoch: int, store_id: str) -> None:
        self.kit, self.name = kit, RegionId(kit.identity.region)
        self.region_epoch, self.store_id = region_epoch, store_id
        server = Identity("fed", RoleName.CONTROLLER)
        self.channel = tls.open_channel(kit, address, server)
        self.stub = rpc.stub(self.channel, "ControllerService")
        self.stub.who, self.stub.address = "the controller", address
        self.events: asyncio.Queue[pb.AttachResponse | grpc.RpcError] = asyncio.Queue()
        self.greeting: pb.Attached | None = None
        self._stream: asyncio.Task[None] | None = None
        self._heart: asyncio.Task[None] | None = None

    async def attach(self, pending: Sequence[tuple[pb.AttemptKey, str]] = (), leader_epoch: int = 0) -> pb.Attached:
        """Open the stream, wait for its first message, and report as often as that asks for."""
        request = pb.AttachRequest(
            region_epoch=self.region_epoch,
            store_id=self.store_id,
            capacity=1,
            leader_epoch=leader_epoch,
            pending=[pb.PendingPartial(key=key, digest=digest) for key, digest in pending],
        )
        self._stream = asyncio.create_task(self._read(request))
        self.greeting = (await self.next("attached")).attached
        self._heart = asyncio.create_task(self._beat())
        return self.greeting

    async def _read(self, request: pb.AttachRequest) -> None:
        try:
            async for event in self.stub.Attach(request):
                if event.WhichOneof("event") == "attached" and self.greeting is not None:
                    self.greeting = event.attached
                else:
                    self.events.put_nowait(event)
        except grpc.RpcError as error:
            self.events.put_nowait(error)

    async def _beat(self) -> None:
        while True:
            try:
                await self.report()
            except grpc.RpcError:
                return
            await asyncio.sleep(self.greeting.report_every_s)

    async def report(self, **progress: object) -> None:
        told = [pb.AttemptProgress(**progress)] if progress else []
        await self.stub.Report(pb.ReportRequest(region_epoch=self.region_epoch, clients_connected=3, progress=told))

    async def next(self, kind: str) -> pb.AttachResponse:
        """The next event, which must be of this kind."""
        async with asyncio.timeout(10):
            event = await self.events.get()
        if isinstance(event, grpc.RpcError):
            raise self.stub.error(event)
        assert event.WhichOneof("event") == kind, event
        return event

    async def plan(self) -> tuple[pb.Offer, Plan]:
        """The next event: an offer, signed by the controller under the epoch that it says."""
        offer = (await self.next("offer")).offer
        signer = x509.load_der_x509_certificate(offer.certificate)
        identity = verify_leaf(offer.certificate, self.kit.trust, signer.not_valid_before_utc)
        assert identity.role is RoleName.CONTROLLER
        verify(signer, offer.signature, plan_statement(offer.leader_epoch, offer.plan), PLAN_CONTEXT)
        plan = Plan.from_bytes(offer.plan)
        assert plan.region == self.name
        assert plan.key == key_from_proto(offer.key)
        return offer, plan

    def partial(
        self,
        plan: Plan,
        deltas: Sequence[Sequence[float]] = ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)),
        *,
        num_sites: int | None = None,
        metrics: Mapping[str, int] | None = None,
        **head: object,
    ) -> Outgoing:
        """An exact sum of weight-1 updates, sealed as a combiner would; ``head`` falsifies fields."""
        total = Accumulator(plan.task.groups)
        for delta in deltas:
            vectors = {group.name: [np.array(delta, np.float32)] for group in plan.task.groups}
            total.fold(vectors, 1, metrics or {"num_examples": 2, "train_loss_sum": 3 << 20})
        summed = total.partial(len(deltas) if num_sites is None else num_sites)
        fields: dict[str, object] = {
            "region": self.name,
            "run": plan.run,
            "base_model_hash": plan.base.model_hash,
            "task_hash": plan.task.hash,
            "groups": plan.task.groups,
            "weight": summed.weight,
            "num_sites": summed.num_sites,
            "num_updates": summed.num_updates,
            "metrics": summed.metrics,
            "region_epoch": self.region_epoch,
            "seal_id": "seal",
        }
        meta = documents.encode(PartialHead(**(fields | head)))
        return outgoing_partial(plan.base.layout_hash, plan.task.groups, summed.sums, meta)

    async def uplink(self, plan: Plan, outgoing: Outgoing, ledger_head: str = "sha256:aa") -> pb.UplinkResponse:
        metadata = ((LEDGER_HEAD_METADATA, ledger_head),)
        response = await rpc.upload_frames(self.stub.Uplink, outgoing, plan.key, metadata=metadata)
        assert response.digest == outgoing.digest
        signer = x509.load_der_x509_certificate(response.certificate)
        verify(signer, response.countersignature, head_statement(ledger_head), LEDGER_HEAD_CONTEXT)
        return response

    async def abstain(self, plan: Plan, code: str = "too_few_sites") -> None:
        key = pb.AttemptKey(run=plan.run, task=pb.TASK_KIND_TRAIN, round=plan.round, attempt=plan.attempt)
        if plan.task.kind == "evaluate":
            key.task = pb.TASK_KIND_EVALUATE
        await self.stub.Abstain(pb.AbstainRequest(key=key, region_epoch=self.region_epoch, code=code))

    async def answer(self, deltas: Sequence[Sequence[float]] = ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))) -> Plan:
        """Take the next offer and answer it."""
        _, plan = await self.plan()
        await self.uplink(plan, self.partial(plan, deltas))
        return plan

    async def model(self, model_hash: str) -> np.ndarray:
        """Fetch a model, checked against its hash; its train vector."""
        incoming = await fetch_model(self.stub, model_hash, Expect("model", LAYOUT.hash, None, 2**20))
        return incoming.vectors()["train"]

    async def close(self) -> None:
        """Leave without a word, as a killed process does."""
        for task in (self._heart, self._stream):
            if task is not None:
                task.cancel()
        await asyncio.gather(*(t for t in (self._heart, self._stream) if t is not None), return_exceptions=True)
        await self.channel.close()


class Federation:
    """The controller of one test, and what connects to it."""

    def __init__(self, folder: Path, directory: Path) -> None:
        self.folder, self.directory = folder, directory
        self.address = ""
        self.app: ControllerApp | None = None
        self._stack = AsyncExitStack()

    def kit(self, *path: str) -> Kit:
        return Kit.load(self.folder.joinpath("kits", *path))

    @asynccontextmanager
    async def controller(self) -> AsyncIterator[ControllerApp]:
        async with ControllerApp(self.kit("controller"), self.directory) as app:
            self.app, self.address = app, app.address
            yield app
            assert not app.leader.failed.done(), app.leader.failed.exception()

    async def region(self, name: str, region_epoch: int = 1, store_id: str = "zone", **attach: object) -> Region:
        """A region that is attached."""
        made = self.region_of(name, region_epoch, store_id)
        await made.attach(**attach)
        return made

    def region_of(self, name: str, region_epoch: int = 1, store_id: str = "zone") -> Region:
        made = Region(self.kit("regions", name, "combiner"), self.address, region_epoch, store_id)
        self._stack.push_async_callback(made.close)
        return made

    async def operator(self) -> Operator:
        return await self._stack.enter_async_context(connect_operator(self.kit("operators", "olga"), self.address))

    async def submit(self, operator: Operator, wanted: Job, values: Sequence[float] = (0.0, 0.0, 0.0)) -> RunId:
        model = await operator.upload_model(LAYOUT, {"train": np.array(values, np.float32)})
        return await operator.submit(wanted, model)

    async def until(
        self, operator: Operator, run: str, reached: Callable[[pb.FollowRunResponse], bool]
    ) -> pb.FollowRunResponse:
        """Follow a run until a snapshot is as asked for."""
        async with asyncio.timeout(20):
            async for snapshot in operator.follow(run):
                if reached(snapshot):
                    return snapshot
        raise AssertionError("the run ended before")

    async def close(self) -> None:
        await self._stack.aclose()


@pytest.fixture
async def federation(folder: Path, tmp_path: Path) -> AsyncIterator[Federation]:
    """A federation of two regions whose controller is not running yet."""
    made = Federation(folder, tmp_path / "controller")
    yield made
    await made.close()


@pytest.fixture
async def running(federation: Federation) -> AsyncIterator[Federation]:
    """A federation of eu and us whose controller runs on the test's own loop."""
    async with federation.controller():
        yield federation
        await federation.close()


@pytest.fixture
async def three(folder_of_three: Path, tmp_path: Path) -> AsyncIterator[Federation]:
    """The same with a third region, ap, which a round can do without."""
    federation = Federation(folder_of_three, tmp_path / "controller")
    async with federation.controller():
        yield federation
        await federation.close()
