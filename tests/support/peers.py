"""A client that speaks the wire itself, with a real kit: it can do what the SDK never does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
import numpy as np

from hierfl import documents
from hierfl.identity import Identity, RoleName
from hierfl.pki import Kit
from hierfl.plan import Plan
from hierfl.records import UPDATE_CONTEXT, UpdateHead, update_statement
from hierfl.types import UpdateKey
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc, tls
from hierfl.wire.convert import key_to_proto
from hierfl.wire.transfer import Outgoing


def zeros(plan: Plan) -> dict[str, np.ndarray]:
    """Vectors that a plan takes; they change nothing."""
    return {group.name: np.zeros(group.num_values, np.float32) for group in plan.task.groups}


def update(plan: Plan, vectors: dict[str, np.ndarray] | None = None, **changes: Any) -> Outgoing:
    """An update for ``plan``; ``changes`` are of its head, or its ``layout_hash``, ``encoding`` or ``meta``."""
    layout_hash = changes.pop("layout_hash", plan.base.layout_hash)
    encoding, meta = changes.pop("encoding", None), changes.pop("meta", None)
    head: dict[str, Any] = {
        "weight": 1,
        "metrics": {"num_examples": 1},
        "base_model_hash": plan.base.model_hash,
        "task_hash": plan.task.hash,
        **changes,
    }
    meta = documents.encode(UpdateHead(**head)) if meta is None else meta
    return Outgoing("update", layout_hash, zeros(plan) if vectors is None else vectors, meta, encoding)


class Peer:
    """One connection to a combiner; ``async with`` joins and leaves. Its calls raise the errors of ``hierfl``."""

    def __init__(self, kit: Kit, address: str, app: str = "noisy") -> None:
        self.kit, self.address, self.app = kit, address, app
        self._events: asyncio.Queue[pb.FollowResponse] = asyncio.Queue()

    async def __aenter__(self) -> Peer:
        own = self.kit.identity
        server = Identity(federation=own.federation, role=RoleName.COMBINER, region=own.region)
        self._channel = tls.open_channel(self.kit, self.address, server)
        self.stub = rpc.stub(self._channel, "CombinerService")
        await rpc.hello(self.stub, "the combiner", self.address)
        self._following = asyncio.create_task(self._follow())
        await self._next("welcome")
        await self.stub.GetReceipts(self._asking())  # answered by the Region, so it knows of this client now
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
        await self._channel.close()

    async def _follow(self) -> None:
        async for event in self.stub.Follow(pb.FollowRequest(apps=[pb.App(name=self.app)])):
            self._events.put_nowait(event)

    async def _next(self, kind: str) -> Any:
        """The next event of this kind; those before it are dropped."""
        async with asyncio.timeout(30):
            while True:
                event = await self._events.get()
                if event.WhichOneof("event") == kind:
                    return getattr(event, kind)

    async def offer(self) -> Plan:
        return Plan.from_bytes((await self._next("offer")).plan)

    async def withdrawal(self) -> str:
        """Why the attempt is over."""
        return str((await self._next("withdrawal")).reason)

    async def told(self, state: int) -> pb.Receipt:
        """The next receipt of this state."""
        while (receipt := await self._next("receipt")).state != state:
            pass
        return receipt

    async def receipt(self, plan: Plan) -> pb.Receipt:
        """What the combiner says, asked."""
        return (await self._call(self.stub.GetReceipts(self._asking(plan)))).receipts[0]

    @staticmethod
    def _asking(*plans: Plan) -> pb.GetReceiptsRequest:
        return pb.GetReceiptsRequest(keys=[key_to_proto(plan.key) for plan in plans])

    async def admit(self, plan: Plan, outgoing: Outgoing, **changes: Any) -> pb.AdmitResponse:
        """Ask to be let in; ``changes`` are of the request, whose signature stays right unless it is one of them."""
        weight = changes.get("weight", 1)
        said = {"digest": outgoing.digest, "length_bytes": outgoing.length_bytes, "weight": weight, **changes}
        statement = update_statement(UpdateKey(plan.key, self.kit.identity.client_ref), said["digest"], weight)
        said.setdefault("signature", self.kit.sign(statement, UPDATE_CONTEXT))
        return await self._call(self.stub.Admit(pb.AdmitRequest(key=key_to_proto(plan.key), **said)))

    async def send(self, frames: Iterable[bytes]) -> pb.Receipt:
        """Upload these frames, whatever they are."""
        return (await self._call(rpc.send_frames(self.stub.Upload, frames))).receipt

    async def hand_in(self, plan: Plan, outgoing: Outgoing, **changes: Any) -> pb.Receipt:
        """Admit, then send all of it."""
        ticket = (await self.admit(plan, outgoing, **changes)).ticket
        return await self.send(outgoing.frames(plan.key, ticket))

    async def _call(self, call: Any) -> Any:
        try:
            return await call
        except grpc.RpcError as error:
            raise self.stub.error(error) from None
