"""Sums at shards: the same bits as without, counted once whatever becomes of a shard, nothing left of what is over."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from sharded import ENCODINGS, expected, hand_in, is_same, large, persist, sealed_by, update
from updates import chosen, group

from combiners.local import LocalShard
from combiners.settings import IntakeSettings
from combiners.shard import Shard, Share
from hierfl.errors import HierFLError, TransferIncomplete, ValueOutOfRange
from hierfl.types import AttemptKey, RunId, TaskKind
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("shards", [0, 1, 3])
async def test_the_bits_are_the_same_with_and_without_shards(
    start_combiner, controller, connect, client_kits, plan, encoding, shards
):
    plan = large(plan, encoding)
    async with start_combiner(intakes=1, intake=IntakeSettings(shards=shards)) as combiner:
        head, partial, _ = await sealed_by(combiner, controller, connect, client_kits, plan)
        assert (head.num_sites, head.num_updates, head.weight, head.metrics) == (4, 4, 10, {"num_examples": 10})
        assert is_same(partial, expected(plan))
        assert len(combiner.shards) == shards
        assert all(shard.shard.num_staged == 0 for shard in combiner.shards)
    assert all(shard.ended().done() for shard in combiner.shards), "they end with their intake"


async def test_many_intakes_with_shards_of_their_own_add_up_to_the_same(
    start_combiner, controller, connect, client_kits, plan
):
    plan = large(plan, "int8")
    async with start_combiner(intakes=4, intake=IntakeSettings(shards=2)) as combiner:
        _, partial, _ = await sealed_by(combiner, controller, connect, client_kits, plan)
        assert is_same(partial, expected(plan))
        assert len(combiner.shards) == 8


async def test_small_updates_that_come_with_their_request_go_to_the_shards_too(
    start_combiner, controller, connect, client_kits, plan
):
    async with start_combiner(intake=IntakeSettings(shards=2)) as combiner:
        clients = [await connect(kit, combiner.addresses[0]) for kit in client_kits[:3]]
        await controller.offer(plan)
        for client in clients:
            await client.offer()
            outgoing, weight = client.update(plan)
            whole = await client.admit(plan.key, outgoing, weight, update=list(outgoing.frames(plan.key)))
            assert whole.receipt.state == pb.RECEIPT_STATE_STAGED
        _, head, partial, _ = await controller.partials.get()
        assert head.num_updates == 3
        assert np.array_equal(partial.sums["train"], np.full(3000, 3 * 2**32))


@pytest.mark.parametrize(
    ("encoding", "bad", "says"),
    [
        ("float32", [("train", 250_000, np.nan)], "counted from value"),
        ("int8", [("train", 5, -128)], "must be from -127 to 127"),
        ("topk", [("train.index", 40_000, 1)], "must be above the one before it"),
    ],
)
async def test_an_update_with_a_bad_value_in_one_range_is_refused_and_no_shard_keeps_of_it(
    start_combiner, controller, connect, client_kits, plan, encoding, bad, says
):
    plan = large(plan, encoding)
    async with start_combiner(intake=IntakeSettings(shards=3)) as combiner:
        client = await connect(client_kits[4], combiner.addresses[0])
        others = [await connect(kit, combiner.addresses[0]) for kit in client_kits[:4]]
        await controller.offer(plan)
        await asyncio.gather(*(one.offer() for one in [client, *others]))
        with pytest.raises(ValueOutOfRange, match=says):
            await hand_in(client, plan, 4, update(plan, 4, bad=bad))
        assert [shard.shard.num_staged for shard in combiner.shards] == [0, 0, 0]
        await asyncio.gather(*(hand_in(one, plan, number) for number, one in enumerate(others)))
        _, head, partial, _ = await controller.partials.get()
        assert head.num_updates == 4
        assert is_same(partial, expected(plan))


async def test_a_shard_that_dies_in_mid_round_ends_the_incarnation_and_every_update_counts_once(
    start_combiner, controller, connect, client_kits, plan
):
    plan = large(plan)
    async with start_combiner(intake=IntakeSettings(shards=3)) as combiner:
        first = [await connect(kit, combiner.addresses[0]) for kit in client_kits[:4]]
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in first))
        await asyncio.gather(*(hand_in(client, plan, number) for number, client in enumerate(first[:2])))
        combiner.shards[1].end()  # as a crash: nobody has asked for it
        await asyncio.gather(*(client.ended.wait() for client in first))
        await asyncio.gather(
            *(persist(connect, kit, combiner.addresses[0], plan, n) for n, kit in enumerate(client_kits[:4]))
        )
        _, head, partial, _ = await controller.partials.get()
        assert (head.num_updates, head.weight) == (4, 10)
        assert is_same(partial, expected(plan))
        assert len(combiner.shards) == 6, "three for each incarnation"
        assert all(shard.ended().done() for shard in combiner.shards[:3])


async def test_a_shard_that_dies_while_its_sums_are_sealed_loses_no_update(
    start_combiner, controller, connect, client_kits, plan, monkeypatch
):
    plan = large(plan)
    died = threading.Event()
    block = LocalShard.block

    def dying(self: LocalShard, *arguments: Any) -> Any:
        if not died.is_set() and arguments[2] == "wide":  # the first group is packed already
            died.set()
            self.end()
        return block(self, *arguments)

    monkeypatch.setattr(LocalShard, "block", dying)
    async with start_combiner(intake=IntakeSettings(shards=3)) as combiner:
        head, partial, _ = await sealed_by(combiner, controller, connect, client_kits, plan)
        assert died.is_set()
        assert (head.num_updates, head.weight) == (4, 10)
        assert is_same(partial, expected(plan))
        assert head.seal_id.endswith("-2"), "the first seal came to nothing"


async def test_an_intake_without_room_for_the_model_shares_it_among_shards_by_itself(
    start_combiner, controller, connect, client_kits, plan
):
    plan = large(plan)
    settings = IntakeSettings(memory_bytes=2**28 + 3 * 2**20)  # a model of 1.2 MB does not fit beside the program
    async with start_combiner(intake=settings) as combiner:
        _, partial, _ = await sealed_by(combiner, controller, connect, client_kits, plan)
        assert is_same(partial, expected(plan))
        assert len(combiner.shards) == 2


async def test_a_cut_update_goes_on_where_the_shards_have_it(start_combiner, controller, connect, client_kits, plan):
    plan = large(plan)
    async with start_combiner(intake=IntakeSettings(shards=2)) as combiner:
        clients = [await connect(kit, combiner.addresses[0]) for kit in client_kits[:4]]
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        outgoing = update(plan, 0)
        admitted = await clients[0].admit(plan.key, outgoing, 1)
        call = clients[0].stub.Upload(metadata=((rpc.RESUME, outgoing.digest),))
        frames = list(outgoing.frames(plan.key, admitted.ticket))
        for frame in frames[:2]:  # header and the first chunk of two
            await call.write(frame)
        desk = combiner.intakes[0].desk
        async with asyncio.timeout(20):
            while not any(shard.shard.num_staged for shard in combiner.shards):
                await asyncio.sleep(0.01)
            call.cancel()
            while not len(desk.unfinished):
                await asyncio.sleep(0.01)
        before = desk.bytes_in
        assert (await hand_in(clients[0], plan, 0, outgoing)).state == pb.RECEIPT_STATE_STAGED
        assert desk.bytes_in - before < len(frames[1]), "the first chunk did not come again"
        await asyncio.gather(*(hand_in(client, plan, n) for n, client in enumerate(clients) if n))
        _, _, partial, _ = await controller.partials.get()
        assert is_same(partial, expected(plan))
        assert [shard.shard.num_staged for shard in combiner.shards] == [0, 0]


async def test_what_a_client_that_went_away_has_sent_is_dropped_at_the_shards(
    start_combiner, controller, connect, client_kits, plan
):
    plan = large(plan)
    async with start_combiner(intake=IntakeSettings(shards=2, resume_s=0.2)) as combiner:
        clients = [await connect(kit, combiner.addresses[0]) for kit in client_kits[:4]]
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        outgoing = update(plan, 0)
        admitted = await clients[0].admit(plan.key, outgoing, 1)
        call = clients[0].stub.Upload(metadata=((rpc.RESUME, outgoing.digest),))
        for frame in list(outgoing.frames(plan.key, admitted.ticket))[:2]:
            await call.write(frame)
        async with asyncio.timeout(20):
            while not any(shard.shard.num_staged for shard in combiner.shards):
                await asyncio.sleep(0.01)
            call.cancel()
            while any(shard.shard.num_staged for shard in combiner.shards):
                await asyncio.sleep(0.01)


def test_a_shard_takes_calls_in_any_order_and_twice():
    key, one = AttemptKey(RunId("run-1"), TaskKind.TRAIN, 1, 1), group(4)
    shard = Shard()
    shard.put(key, 1, "train", 0, np.ones(4, np.float32))  # before it knows of the attempt: let go
    assert shard.num_staged == 0
    shard.open(key, Share(groups=(one,), starts={"train": 0}, encoding=chosen("float32")))
    shard.put(key, 1, "train", 2, np.ones(2, np.float32))
    with pytest.raises(TransferIncomplete):
        shard.check(key, 1, {"train": 4})
    shard.put(key, 1, "train", 0, np.ones(2, np.float32))
    shard.check(key, 1, {"train": 4})
    shard.commit(key, 1, 5)
    shard.commit(key, 1, 5)
    shard.drop(key, 2)
    shard.put(key, 2, "train", 0, np.ones(4, np.float32))  # came after its drop
    assert shard.num_staged == 0
    assert shard.freeze(key, "seal") == (5, 1)
    assert shard.block(key, "seal", "train", 1, 3).tolist() == [5 * 2**32] * 2
    shard.put(key, 3, "train", 0, np.ones(4, np.float32))
    shard.check(key, 3, {"train": 4})
    shard.commit(key, 3, 1)
    with pytest.raises(HierFLError):
        shard.block(key, "seal", "train", 0, 4)
