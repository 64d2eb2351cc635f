"""The operator's side of the controller: submit, follow, list, fetch. The only gRPC user of the command line.

One ``Operator`` is one connection; every method is one call, and raises the error tree of ``hierfl/errors.py``.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from hierfl import documents
from hierfl.errors import HierFLError, Interrupted, NotTheLeader, TransferIncomplete, Unreachable
from hierfl.job import Job
from hierfl.layout import Layout, model_hash
from hierfl.pki import Identity, Kit, RoleName
from hierfl.types import Float32Array, ModelHash, RunId
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc, tls, transfer
from hierfl.wire.fetch import fetch_model
from hierfl.wire.status import from_rpc_error

__all__ = ["Operator", "connect"]

CONNECT_S = 5.0
"""Longest wait for a controller's first answer: an operator sits in front of it."""
PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Before an upload that was cut goes on: each as long as the connection may need to be there again."""
ELECTION_S = 15.0
"""So long a command waits for one of several controllers to take the lead."""
RETRY_S = 0.5
MAX_MODEL_BYTES = 2**40
"""Bound on a model fetched from a controller that this operator's own CA vouches for: 1 TiB."""


@asynccontextmanager
async def connect(kit: Kit, *addresses: str) -> AsyncIterator[Operator]:
    """Open a connection to the controller that leads, of those at ``addresses`` (``host:port``).

    Raises:
        Unreachable: Nobody answers there, or what answers is not this federation's controller.
        NotTheLeader: None of several leads, for ``ELECTION_S``.
        VersionMismatch: No protocol version in common.
    """
    operator = Operator(kit, addresses)
    try:
        await operator.reconnect()
        yield operator
    finally:
        await operator.close()


async def _hello(stub: rpc.Stub, address: str) -> None:
    try:
        async with asyncio.timeout(CONNECT_S):
            await rpc.hello(stub, "the controller", address)
    except TimeoutError:
        raise Unreachable(
            f"the controller at {address} gave no answer in {CONNECT_S:g} s: check the address, that it runs, and "
            "that the network lets this machine out to it"
        ) from None


class Operator:
    """Calls of one operator to the controller that leads."""

    def __init__(self, kit: Kit, addresses: Sequence[str]) -> None:
        self._kit, self._addresses = kit, tuple(addresses)
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self.address = self._addresses[0]
        """Of the controller that this operator is connected to."""

    @property
    def can_move(self) -> bool:
        """Whether there is another controller to ask."""
        return len(self._addresses) > 1

    async def reconnect(self) -> None:
        """Find the leader anew: each address in turn, again where one of several stands by. Raises as ``connect``."""
        await self.close()
        deadline = asyncio.get_running_loop().time() + ELECTION_S
        while True:
            errors = [error for address in self._addresses if (error := await self._try(address)) is not None]
            if len(errors) < len(self._addresses):
                return
            waits = next((error for error in errors if isinstance(error, NotTheLeader)), None)
            if waits is None or not self.can_move or asyncio.get_running_loop().time() >= deadline:
                raise waits or errors[0]
            await asyncio.sleep(RETRY_S)

    async def _try(self, address: str) -> Unreachable | None:
        """Connect there, unless it is connected; what kept it from that, if it is a reason to try another address."""
        if self._channel is not None:
            return None
        server = Identity(federation=self._kit.identity.federation, role=RoleName.CONTROLLER)
        channel = tls.open_channel(self._kit, address, server)
        try:
            stub = rpc.stub(channel, "OperatorService")
            await _hello(stub, address)
        except Unreachable as error:
            await channel.close()
            return error
        except BaseException:
            await channel.close()
            raise
        self._channel, self._stub, self.address = channel, stub, address
        return None

    @property
    def _calls(self) -> Any:
        if self._stub is None:
            raise Unreachable(f"no controller leads at {', '.join(self._addresses)}")
        return self._stub

    async def close(self) -> None:
        channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            await channel.close()

    def _error(self, error: grpc.RpcError) -> HierFLError:
        return from_rpc_error(error, "the controller", self.address)

    async def _call(self, method: str, request: Any, timeout_s: float = 30.0) -> Any:
        try:
            return await getattr(self._calls, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._error(error) from None

    async def upload_model(self, layout: Layout, vectors: Mapping[str, Float32Array]) -> ModelHash:
        """Send version 0 of a run: flat float32 vectors in the layout's order. Returns the model's hash.

        An upload that is cut goes on where it broke off, if the controller can be reached again soon.
        """
        outgoing = transfer.Outgoing("model", layout.hash, vectors, meta=layout.to_bytes(), keeps_copy=False)
        response = await self._upload(outgoing)
        expected = model_hash(layout, vectors)
        if response.model_hash != expected:
            raise Unreachable(f"the controller at {self.address} received another model than was sent; try again")
        return expected

    async def _upload(self, outgoing: transfer.Outgoing) -> Any:
        for pause_s in PAUSES_S:
            try:
                return await rpc.upload_frames(self._calls.UploadModel, outgoing)
            except HierFLError as error:
                if not _is_cut(error):
                    raise
                await asyncio.sleep(pause_s)
        return await rpc.upload_frames(self._calls.UploadModel, outgoing)

    async def submit(self, job: Job, model: ModelHash) -> RunId:
        """Submit a run of ``job`` from the uploaded ``model``; asked twice, it is submitted once."""
        request = pb.SubmitRunRequest(job=documents.encode(job), model_hash=model, request_id=uuid.uuid4().hex)
        try:
            response = await self._call("SubmitRun", request)
        except Unreachable:
            await asyncio.sleep(0.5)  # its answer may have been lost; the request id is the same
            response = await self._call("SubmitRun", request)
        return RunId(response.run)

    async def runs(self) -> list[pb.RunSummary]:
        return list((await self._call("ListRuns", pb.ListRunsRequest())).runs)

    async def find(self, run: str) -> str:
        """The run of that id, or the only one whose id begins like that; otherwise ``run`` as it is."""
        ids = [summary.run for summary in await self.runs()]
        found = [each for each in ids if each.startswith(run)] if run not in ids else [run]
        return found[0] if len(found) == 1 else run

    async def run(self, run: str) -> pb.GetRunResponse:
        """One run with its rounds, by its id or a beginning of it. ``NotFound`` names the runs there are."""
        response: pb.GetRunResponse = await self._call("GetRun", pb.GetRunRequest(run=await self.find(run)))
        return response

    async def follow(self, run: str) -> AsyncIterator[pb.FollowRunResponse]:
        """Snapshots of a run: one at once, then one at each change, until it ends."""
        try:
            async for snapshot in self._calls.FollowRun(pb.FollowRunRequest(run=run)):
                yield snapshot
        except grpc.RpcError as error:
            raise self._error(error) from None

    async def cancel(self, run: str) -> str:
        """Cancel a run; returns its state afterwards."""
        return str((await self._call("CancelRun", pb.CancelRunRequest(run=await self.find(run)))).state)

    async def resume(self, run: str) -> str:
        """Go on with a paused run; returns its state afterwards."""
        return str((await self._call("ResumeRun", pb.ResumeRunRequest(run=await self.find(run)))).state)

    async def models(self, run: str = "") -> list[pb.Model]:
        request = pb.ListModelsRequest(run=await self.find(run) if run else "")
        return list((await self._call("ListModels", request)).models)

    async def fetch_model(self, model: pb.Model) -> tuple[Layout, dict[str, Float32Array]]:
        """Fetch a model and check it against its own hash: layout and flat float32 vectors."""
        expect = transfer.Expect("model", model.layout_hash, None, MAX_MODEL_BYTES, None)
        incoming = await fetch_model(self._calls, model.model_hash, expect, keeps_frames=False)
        layout = Layout.from_bytes(incoming.meta)
        vectors = incoming.vectors()
        if model_hash(layout, vectors) != model.model_hash:
            raise Unreachable(f"the controller at {self.address} sent another model than {model.model_hash[:12]}")
        return layout, vectors

    async def status(self) -> pb.GetStatusResponse:
        response: pb.GetStatusResponse = await self._call("GetStatus", pb.GetStatusRequest())
        return response


def _is_cut(error: HierFLError) -> bool:
    """Whether an upload may go on; a connection that breaks under a stream is not always called unreachable."""
    return isinstance(error, Unreachable | TransferIncomplete | Interrupted) or type(error) is HierFLError
