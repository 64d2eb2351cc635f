"""Updates of several groups and chunks for a combiner with shards, handed in by clients of its ``conftest.py``."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
from updates import values

from hierfl import documents, encodings
from hierfl.aggregation import Accumulator
from hierfl.columns import GroupKind
from hierfl.errors import TransferIncomplete, Unreachable
from hierfl.plan import Plan
from hierfl.records import UpdateHead
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc
from hierfl.wire.transfer import Outgoing

NUM_VALUES = 300_000
ENCODINGS: dict[str, dict[str, object]] = {
    "float32": {},
    "bfloat16": {},
    "int8": {"block": 1024},
    "topk": {"fraction": 0.3},
}


def large(plan: Plan, encoding: str = "float32", num_values: int = NUM_VALUES) -> Plan:
    """Groups of more than one chunk, one of them wide, for all sites."""
    train = replace(plan.task.groups[0], num_values=num_values)
    wide = replace(train, name="wide", kind=GroupKind.WIDE, num_values=2000)
    spec = encodings.spec(encoding, ENCODINGS[encoding])
    task = replace(plan.task, groups=(train, wide), encoding=spec)
    return replace(plan, task=task, min_clients=4, caps=replace(plan.caps, max_upload_bytes=2**30))


def update(plan: Plan, number: int, **change: Any) -> Outgoing:
    vectors = {one.name: values(one.num_values, 100 * number + 7) for one in plan.task.groups}
    vectors["train"][:: number + 2] *= np.float32(0.5)
    wire = encodings.encode_update(plan.task.update_encoding, plan.task.groups, vectors, 1)
    for name, index, value in change.get("bad", ()):
        wire[name] = wire[name].copy()
        wire[name][index] = value
    head = UpdateHead(
        weight=number + 1,
        metrics={"num_examples": number + 1},
        base_model_hash=plan.base.model_hash,
        task_hash=plan.task.hash,
    )
    return Outgoing("update", plan.base.layout_hash, wire, documents.encode(head), plan.task.encoding.name)


async def hand_in(client: Any, plan: Plan, number: int, outgoing: Outgoing | None = None) -> pb.Receipt:
    outgoing = outgoing or update(plan, number)
    while True:
        admitted = await client.admit(plan.key, outgoing, number + 1)
        match admitted.WhichOneof("answer"):
            case "receipt":
                return admitted.receipt
            case "ticket":
                try:
                    return (await rpc.upload_frames(client.stub.Upload, outgoing, plan.key, admitted.ticket)).receipt
                except TransferIncomplete:
                    continue
        await asyncio.sleep(admitted.retry_after_ms / 1000)


async def persist(connect: Any, kit: Any, address: str, plan: Plan, number: int) -> None:
    """As the SDK does: come back whenever sent away, hand in whenever asked, until the update is sealed."""
    async with asyncio.timeout(60):
        while True:
            try:
                client = await connect(kit, address)
                while True:
                    event = await client._next_event()
                    if event.WhichOneof("event") == "offer":
                        await hand_in(client, plan, number)
                    elif event.receipt.state == pb.RECEIPT_STATE_SEALED:
                        return
            except (Unreachable, grpc.RpcError):
                await asyncio.sleep(0.05)


async def sealed_by(combiner: Any, controller: Any, connect: Any, kits: Any, plan: Plan) -> tuple[Any, Any, str]:
    await controller.offer(plan)
    await asyncio.gather(
        *(
            persist(connect, kit, combiner.addresses[n % len(combiner.addresses)], plan, n)
            for n, kit in enumerate(kits[:4])
        )
    )
    _, head, partial, digest = await controller.partials.get()
    return head, partial, digest


def expected(plan: Plan) -> dict[str, np.ndarray]:
    total = Accumulator(plan.task.groups, plan.task.update_encoding)
    for number in range(4):
        vectors = {one.name: values(one.num_values, 100 * number + 7) for one in plan.task.groups}
        vectors["train"][:: number + 2] *= np.float32(0.5)
        wire = encodings.encode_update(plan.task.update_encoding, plan.task.groups, vectors, 1)
        total.fold({name: [vector] for name, vector in wire.items()}, number + 1)
    return dict(total.partial(4).sums)


def is_same(partial: Any, sums: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(partial.sums[name], array) for name, array in sums.items())
