"""Uploads that are cut at a combiner, over real gRPC: who comes back goes on, who does not leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest

from combiners.settings import IntakeSettings
from hierfl.errors import TransferIncomplete
from hierfl.plan import Plan
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc

PATIENCE_S = 10.0


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another coroutine of this process brings about."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


class Cut:
    """One upload by hand: its header, its only chunk, and no trailer."""

    def __init__(self, client: Any, plan: Plan, value: float = 1.0, *, asks: bool = True) -> None:
        self.client, self.plan = client, plan
        self.outgoing, self.weight = client.update(plan, value)
        self._asks = asks
        self.there = 0

    async def begin(self, combiner: Any) -> Any:
        """Send header and chunk; returns the call once the intake has the chunk."""
        desk = combiner.intakes[0].desk
        ticket = (await self.client.admit(self.plan.key, self.outgoing, self.weight)).ticket
        frames = list(self.outgoing.frames(self.plan.key, ticket))
        before = desk.bytes_in
        call = self.client.stub.Upload(metadata=((rpc.RESUME, self.outgoing.digest),) if self._asks else ())
        await call.write(frames[0])
        self.there = rpc.chunks_there(tuple(await call.initial_metadata()))
        if not self.there:
            await call.write(frames[1])
            await until(lambda: desk.bytes_in > before)
        return call

    async def cut(self, combiner: Any) -> None:
        """Break off, and wait until the intake has noticed."""
        desk = combiner.intakes[0].desk
        call = await self.begin(combiner)
        call.cancel()
        await until(lambda: len(desk.unfinished) == int(self._asks) and not desk.line._inside)


@pytest.fixture
def ready(start_combiner, controller, client_kits, connect, plan):
    """``await ready(combiner)``: clients that have joined it and have its offer."""

    async def join(combiner: Any, count: int = 3) -> list[Any]:
        clients = [await connect(kit, combiner.addresses[0]) for kit in client_kits[:count]]
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        return clients

    return join


def is_free(combiner: Any) -> bool:
    desk = combiner.intakes[0].desk
    return (desk.line._num_inside, desk.line._bytes_inside, len(desk.unfinished)) == (0, 0, 0)


async def test_a_cut_update_goes_on_and_is_counted_once(start_combiner, controller, ready, plan):
    async with start_combiner() as combiner:
        clients = await ready(combiner)
        await Cut(clients[0], plan).cut(combiner)
        desk = combiner.intakes[0].desk
        before = desk.bytes_in
        receipts = await asyncio.gather(*(client.hand_in(plan) for client in clients))
        assert {receipt.state for receipt in receipts} == {pb.RECEIPT_STATE_STAGED}
        _, head, partial, _ = await controller.partials.get()
        assert (head.num_sites, head.num_updates, head.weight) == (3, 3, 3)
        assert np.array_equal(partial.sums["train"], np.full(3000, 3 * 2**32))
        assert desk.bytes_in - before < 2.5 * 12_000, "two of three sent their chunk"
        await until(lambda: is_free(combiner))


async def test_who_comes_back_gets_in_past_a_full_line_on_the_place_it_had(start_combiner, ready, plan):
    settings = IntakeSettings(max_uploads=1, max_following=3, ticket_s=0.5)  # the third's ticket is not used
    async with start_combiner(intake=settings) as combiner:
        clients = await ready(combiner)
        await Cut(clients[0], plan).cut(combiner)
        desk = combiner.intakes[0].desk
        others = [asyncio.create_task(client.hand_in(plan)) for client in clients[1:]]
        outgoing, weight = clients[1].update(plan)
        third = asyncio.create_task(clients[1].admit(plan.key, outgoing, weight))
        await until(lambda: desk.line.is_full)
        assert (await clients[2].admit(plan.key, *clients[2].update(plan))).retry_after_ms > 0
        async with asyncio.timeout(PATIENCE_S):
            assert (await clients[0].hand_in(plan)).state == pb.RECEIPT_STATE_STAGED
            await asyncio.gather(*others)
        third.cancel()


async def test_a_client_that_never_comes_back_costs_a_while_and_nothing_more(start_combiner, controller, ready, plan):
    settings = IntakeSettings(max_uploads=1, resume_s=0.2)
    async with start_combiner(intake=settings) as combiner:
        clients = await ready(combiner, 4)
        await Cut(clients[3], plan).cut(combiner)
        waiting = [asyncio.create_task(client.hand_in(plan)) for client in clients[:3]]
        await clients[3].leave()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*waiting)
            _, head, _, _ = await controller.partials.get()
        assert head.num_updates == 3
        assert is_free(combiner)


async def test_what_is_kept_gives_way_when_its_attempt_closes(start_combiner, controller, ready, plan):
    async with start_combiner() as combiner:
        clients = await ready(combiner)
        await Cut(clients[0], plan).cut(combiner)
        controller.withdraw(plan.key, "run_cancelled")
        await clients[0].event("withdrawal")
        assert is_free(combiner)


async def test_what_is_kept_gives_way_when_the_incarnation_is_void(start_combiner, ready, plan):
    async with start_combiner() as combiner:
        clients = await ready(combiner)
        await Cut(clients[0], plan).cut(combiner)
        combiner.intakes[0].desk._void()
        assert is_free(combiner)
        await clients[0].ended.wait()


async def test_another_digest_after_a_cut_is_what_is_handed_in_first_and_the_cut_one_is_refused(
    start_combiner, ready, plan
):
    async with start_combiner() as combiner:
        clients = await ready(combiner)
        await Cut(clients[0], plan, 1.0).cut(combiner)
        first = await clients[0].hand_in(plan, value=2.0)
        assert first.state == pb.RECEIPT_STATE_STAGED, "nothing was claimed by what did not come whole"
        again = await clients[0].hand_in(plan, value=1.0)
        assert (again.state, again.reason) == (pb.RECEIPT_STATE_NOT_COUNTED, "digest_conflict")


async def test_another_digest_that_is_cut_under_a_key_that_has_one_is_refused(start_combiner, ready, plan):
    async with start_combiner() as combiner:
        clients = await ready(combiner)
        assert (await clients[0].hand_in(plan, value=1.0)).state == pb.RECEIPT_STATE_STAGED
        refused = await clients[0].hand_in(plan, value=2.0)
        assert (refused.state, refused.reason) == (pb.RECEIPT_STATE_NOT_COUNTED, "digest_conflict")
        assert is_free(combiner)


@pytest.fixture
async def calls() -> AsyncIterator[list[Any]]:
    """Calls that a test leaves open."""
    made: list[Any] = []
    yield made
    for call in made:
        call.cancel()


async def test_a_stream_that_is_not_known_to_be_dead_is_stopped_by_the_one_that_takes_over(
    start_combiner, controller, ready, plan, calls
):
    async with start_combiner(intake=IntakeSettings(max_uploads=1)) as combiner:
        clients = await ready(combiner)
        older = Cut(clients[0], plan)
        calls.append(await older.begin(combiner))
        receipt = await clients[0].hand_in(plan)
        assert receipt.state == pb.RECEIPT_STATE_STAGED
        with pytest.raises(grpc.RpcError) as caught:
            await calls[0]
        assert isinstance(clients[0].stub.error(caught.value), TransferIncomplete)
        await asyncio.gather(*(client.hand_in(plan) for client in clients[1:]))
        _, head, _, _ = await controller.partials.get()
        assert head.num_updates == 3
        assert is_free(combiner)


async def test_of_an_older_senders_upload_nothing_is_kept(start_combiner, ready, plan):
    async with start_combiner() as combiner:
        clients = await ready(combiner)
        await Cut(clients[0], plan, asks=False).cut(combiner)
        assert is_free(combiner)
        again = Cut(clients[0], plan)
        (await again.begin(combiner)).cancel()
        assert again.there == 0
