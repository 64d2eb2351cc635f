"""What regions and operators may say to the controller: each RPC as a few lines, decided elsewhere.

Who calls is in the certificate (``hierfl/wire/access.py``), never in a message; errors become statuses there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import NoReturn, TypeAlias

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2_grpc

from controller import messages
from controller.leader import Leader
from controller.loop import RunLoop
from controller.models import ModelCache
from controller.receiving import receive_partial, take_abstention
from controller.registry import Progress, Traffic
from hierfl import documents, observe
from hierfl.border import LEDGER_HEAD_METADATA, head_statement
from hierfl.errors import NotTheLeader, StaleEpoch, ValueOutOfRange, WireError
from hierfl.job import Job
from hierfl.layout import Layout
from hierfl.pki import Kit
from hierfl.rounds import Presence
from hierfl.runs import RunState
from hierfl.types import AttemptKey, Float32Array, ModelHash, RegionId
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc, tls
from hierfl.wire.access import AccessInterceptor, current_identity
from hierfl.wire.convert import key_from_proto, key_to_proto
from hierfl.wire.fetch import model_frames
from hierfl.wire.models import layout_of
from hierfl.wire.resume import Unfinished
from hierfl.wire.transfer import Expect, Incoming

__all__ = ["make_server", "make_standby_server"]

Context: TypeAlias = grpc.aio.ServicerContext

MAX_MODEL_BYTES = 2**40
"""Of version 0, from an operator of this federation: 1 TiB; the disk is the nearer limit."""
INLINE_BYTES = 2**20
"""The frames of a smaller model are made on the event loop: handing them to a thread would cost more."""
MAX_CODE_CHARACTERS = 64
MAX_HEAD_CHARACTERS = 256


def make_server(leader: Leader) -> grpc.aio.Server:
    """A server with the three services, not listening yet (``tls.bind``)."""
    interceptor = AccessInterceptor(leader.kit.trust, leader.kit.identity)
    server = grpc.aio.server(interceptors=[interceptor], options=tls.server_options())
    models = ModelCache(leader.blobs)
    rpc.add_service(server, "ControllerService", ControllerService(leader, models))
    rpc.add_service(server, "OperatorService", OperatorService(leader, models))
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    return server


def make_standby_server(kit: Kit, why: Callable[[], NotTheLeader]) -> grpc.aio.Server:
    """A server of the same services whose every call is answered with ``why``, not listening yet."""
    server = grpc.aio.server(interceptors=[AccessInterceptor(kit.trust, kit.identity)], options=tls.server_options())
    for name in ("ControllerService", "OperatorService"):
        rpc.add_service(server, name, StandsBy(why))
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    return server


class StandsBy:
    """Any service, at a controller that does not lead."""

    def __init__(self, why: Callable[[], NotTheLeader]) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Callable[[object, Context], Awaitable[NoReturn]]:
        async def refuse(request: object, context: Context) -> NoReturn:
            del request, context
            raise self._why()

        return refuse


class ControllerService:
    """For combiners. The calling region is in the certificate."""

    def __init__(self, leader: Leader, models: ModelCache) -> None:
        self._leader, self._models = leader, models
        self._unfinished: Unfinished[tuple[RegionId, AttemptKey]] = Unfinished()

    async def Hello(self, request: pb.HelloRequest, _: Context) -> pb.HelloResponse:  # noqa: N802  the RPC's name
        return rpc.answer_hello(request, "the controller")

    async def Attach(self, request: pb.AttachRequest, _: Context) -> AsyncIterator[pb.AttachResponse]:  # noqa: N802
        region, leader = _region(), self._leader
        pending = [key_from_proto(one.key) for one in request.pending]
        session = leader.attach(region, request)
        try:
            yield leader.attached()
            for verdict in filter(None, (leader.verdict(key, region) for key in pending)):
                yield verdict
            while (event := await session.events.get()) is not None:
                yield event
        finally:
            leader.registry.detach(session)
        if session.replaced_by:
            raise StaleEpoch(f"region {region} attached anew, under epoch {session.replaced_by}")

    async def Report(self, request: pb.ReportRequest, _: Context) -> pb.ReportResponse:  # noqa: N802
        region, registry = _region(), self._leader.registry
        registry.check_epoch(region, request.region_epoch)
        progress = {key_from_proto(one.key): _progress(one) for one in request.progress}
        registry.report(region, progress, _traffic(request))
        return pb.ReportResponse(leader_epoch=self._leader.epoch)

    async def Abstain(self, request: pb.AbstainRequest, _: Context) -> pb.AbstainResponse:  # noqa: N802
        region, registry = _region(), self._leader.registry
        registry.check_epoch(region, request.region_epoch)
        registry.heard(region)
        if not 1 <= len(request.code) <= MAX_CODE_CHARACTERS:
            raise WireError(f"abstain: a code has 1 to {MAX_CODE_CHARACTERS} characters")
        take_abstention(self._leader, key_from_proto(request.key), region, request.code)
        return pb.AbstainResponse()

    async def Uplink(self, frames: rpc.Frames, context: Context) -> pb.UplinkResponse:  # noqa: N802
        region, leader, metadata = _region(), self._leader, context.invocation_metadata() or ()
        with observe.remote_parent(metadata), observe.span(observe.SPAN_RECEIVE, region=region) as span:
            answer = await receive_partial(leader, region, frames, self._unfinished)
            span.set(bytes=answer.size_bytes, run=answer.run, round=answer.round, attempt=answer.attempt)
        head = _ledger_head(metadata)
        return pb.UplinkResponse(
            key=key_to_proto(answer.key),
            digest=answer.digest,
            countersignature=leader.countersign(head_statement(head)) if head else b"",
            certificate=leader.kit.certificate_der,
        )

    async def FetchModel(  # noqa: N802
        self, request: pb.FetchModelRequest, context: Context
    ) -> AsyncIterator[bytes]:
        async for frame in _sent(self._models, request, context):
            yield frame


class OperatorService:
    """For the federation's operators."""

    def __init__(self, leader: Leader, models: ModelCache) -> None:
        self._leader, self._models = leader, models
        self._unfinished: Unfinished[str] = Unfinished()
        """Uploads that were cut, by who sends them."""

    async def Hello(self, request: pb.HelloRequest, _: Context) -> pb.HelloResponse:  # noqa: N802
        return rpc.answer_hello(request, "the controller")

    async def UploadModel(self, frames: rpc.Frames, _: Context) -> pb.UploadModelResponse:  # noqa: N802
        incoming = Incoming(Expect("model", None, None, MAX_MODEL_BYTES), keeps_frames=False)
        incoming.feed(await rpc.first_frame(frames))
        await self._unfinished.receive(current_identity().uri, frames, incoming)
        layout, vectors = await asyncio.to_thread(_uploaded, incoming)
        return pb.UploadModelResponse(model_hash=await self._leader.put_model(layout, vectors), layout_hash=layout.hash)

    async def SubmitRun(self, request: pb.SubmitRunRequest, _: Context) -> pb.SubmitRunResponse:  # noqa: N802
        job = documents.decode(request.job, Job, "job")
        model_hash = ModelHash(request.model_hash)
        layout = self._leader.blobs.layout_of(model_hash)
        return pb.SubmitRunResponse(run=self._leader.submit(job, layout, model_hash, request.request_id))

    async def ListRuns(self, request: pb.ListRunsRequest, _: Context) -> pb.ListRunsResponse:  # noqa: N802
        del request
        return pb.ListRunsResponse(runs=[messages.run_summary(loop.row) for loop in self._leader.runs.values()])

    async def GetRun(self, request: pb.GetRunRequest, _: Context) -> pb.GetRunResponse:  # noqa: N802
        loop = self._leader.run(request.run)
        return pb.GetRunResponse(
            summary=messages.run_summary(loop.row),
            rounds=[messages.round_summary(told) for told in loop.told.values()],
            job=documents.encode(loop.row.job),
        )

    async def FollowRun(  # noqa: N802
        self, request: pb.FollowRunRequest, _: Context
    ) -> AsyncIterator[pb.FollowRunResponse]:
        loop = self._leader.run(request.run)
        changed, last, num_told = loop.bell.follow(), None, 0
        try:
            while True:
                changed.clear()
                for told in list(loop.told.values())[num_told:]:
                    num_told += 1
                    yield _snapshot(self._leader, loop, messages.round_summary(told))
                snapshot, is_last = _snapshot(self._leader, loop), loop.row.state.is_terminal
                if snapshot != last:
                    yield snapshot
                    last = snapshot
                if is_last:
                    return
                await changed.wait()
        finally:
            loop.bell.unfollow(changed)

    async def CancelRun(self, request: pb.CancelRunRequest, _: Context) -> pb.CancelRunResponse:  # noqa: N802
        return pb.CancelRunResponse(state=await self._leader.cancel(request.run))

    async def ResumeRun(self, request: pb.ResumeRunRequest, _: Context) -> pb.ResumeRunResponse:  # noqa: N802
        return pb.ResumeRunResponse(state=await self._leader.resume(request.run))

    async def ListModels(self, request: pb.ListModelsRequest, _: Context) -> pb.ListModelsResponse:  # noqa: N802
        runs = [self._leader.run(request.run)] if request.run else list(self._leader.runs.values())
        return await asyncio.to_thread(_models, self._leader, runs)

    async def GetStatus(self, request: pb.GetStatusRequest, _: Context) -> pb.GetStatusResponse:  # noqa: N802
        del request
        leader = self._leader
        return pb.GetStatusResponse(
            federation=leader.federation,
            leader_epoch=leader.epoch,
            regions=[_region_status(leader, region) for region in leader.registry.regions],
            runs=[messages.run_summary(loop.row) for loop in leader.runs.values()],
        )

    async def FetchModel(  # noqa: N802
        self, request: pb.FetchModelRequest, context: Context
    ) -> AsyncIterator[bytes]:
        async for frame in _sent(self._models, request, context):
            yield frame


async def _sent(models: ModelCache, request: pb.FetchModelRequest, context: Context) -> AsyncIterator[bytes]:
    outgoing = await models.get(request.model_hash, request.bases)
    beside = outgoing.length_bytes > INLINE_BYTES  # its file may have to be read
    async for frame in model_frames(outgoing.frames(), request, context, beside=beside):
        yield frame


def _region() -> RegionId:
    return RegionId(current_identity().region)


def _progress(one: pb.AttemptProgress) -> Progress:
    if len(one.phase) > MAX_CODE_CHARACTERS:
        raise WireError(f"report: a phase has at most {MAX_CODE_CHARACTERS} characters")
    return Progress(
        phase=one.phase, clients_ready=one.clients_ready, clients_reported=one.clients_reported, cohort=one.cohort
    )


def _traffic(request: pb.ReportRequest) -> Traffic:
    return Traffic(
        clients_connected=request.clients_connected,
        sites_connected=request.sites_connected,
        bytes_from_sites=request.bytes_from_sites,
        bytes_to_sites=request.bytes_to_sites,
    )


def _ledger_head(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The border-ledger head that came with an uplink; empty where none did."""
    head = next((value for key, value in metadata if key == LEDGER_HEAD_METADATA), "")
    if not isinstance(head, str) or len(head) > MAX_HEAD_CHARACTERS:
        raise WireError(f"uplink: a ledger head has at most {MAX_HEAD_CHARACTERS} characters")
    return head


def _uploaded(incoming: Incoming) -> tuple[Layout, dict[str, Float32Array]]:
    """Layout and vectors of version 0. Raises ``WireError`` where they do not fit, or a value is not finite."""
    layout, vectors = layout_of(incoming), incoming.vectors()
    for name, vector in vectors.items():
        if not np.isfinite(vector).all():
            where = int(np.argmin(np.isfinite(vector)))
            raise ValueOutOfRange(f"the model's {layout.tensor_at(name, where)!r} holds a value that is not finite")
    return layout, vectors


def _snapshot(leader: Leader, loop: RunLoop, committed: pb.RoundSummary | None = None) -> pb.FollowRunResponse:
    """A run as it is now; ``committed`` tells of one more round."""
    open_ = loop.open
    key = open_.row.key if open_ is not None else None
    views = open_.view(leader.registry, leader.clock()).regions if open_ is not None else loop.regions()
    ended = loop.row.state is not RunState.RUNNING
    return pb.FollowRunResponse(
        summary=messages.run_summary(loop.row),
        round=key.round if key else 0,
        attempt=key.attempt if key else 0,
        phase=loop.row.state if ended else open_.row.state if open_ is not None else "waiting",
        waiting_for="" if ended else loop.waiting_for,
        regions=messages.region_progress(views, loop.row.job.round.min_clients),
        committed=committed,
    )


def _models(leader: Leader, runs: list[RunLoop]) -> pb.ListModelsResponse:
    """Versions of these runs; a layout stands with the first model that has it, and only there."""
    told: set[str] = set()
    models = []
    for loop in runs:
        for row in leader.store.models(loop.row.run):
            layout = b"" if row.layout_hash in told else leader.blobs.layout_of(row.model_hash).to_bytes()
            told.add(row.layout_hash)
            models.append(messages.model(row, layout))
    return pb.ListModelsResponse(models=models)


def _region_status(leader: Leader, region: RegionId) -> pb.RegionStatus:
    registry = leader.registry
    presence, traffic = registry.presence(region, leader.silence_s), registry.traffic(region)
    return pb.RegionStatus(
        region=region,
        state=Presence.ABSENT if presence is Presence.EXPECTED else presence,
        region_epoch=registry.region_epoch(region),
        silent_for_s=registry.silent_for_s(region),
        clients_connected=traffic.clients_connected,
        sites_connected=traffic.sites_connected,
        bytes_from_sites=traffic.bytes_from_sites,
        bytes_to_sites=traffic.bytes_to_sites,
    )
