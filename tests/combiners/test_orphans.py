"""A controller that stays away: what is sealed is kept, and its clients are told why there is no last word."""

from __future__ import annotations

import asyncio

from hierfl.receipts import Reason
from hierfl.wire import hierfl_pb2 as pb


async def sealed(controller, client_kits, connect, combiner, plan):
    clients = [await connect(kit, combiner.addresses[0]) for kit in client_kits[:3]]
    await controller.offer(plan)
    await asyncio.gather(*(client.until_sealed(plan) for client in clients))
    _, _, _, digest = await controller.partials.get()
    return clients, digest


async def told(client, plan, reason: str) -> pb.Receipt:
    """Ask until the region gives this reason."""
    async with asyncio.timeout(20):
        while True:
            (receipt,) = await client.receipts(plan.key)
            if receipt.reason == reason:
                return receipt
            await asyncio.sleep(0.05)


async def test_while_the_controller_stays_away_a_sealed_update_says_so_and_gets_its_last_word_when_it_is_back(
    start_combiner, controller, client_kits, connect, plan, toy_model
):
    async with start_combiner(orphan_s=0.3) as combiner:
        clients, digest = await sealed(controller, client_kits, connect, combiner, plan)
        assert (await told(clients[0], plan, "")).state == pb.RECEIPT_STATE_SEALED
        address = controller.address
        await controller.stop()
        waits = await told(clients[0], plan, Reason.CONTROLLER_AWAY)
        assert waits.state == pb.RECEIPT_STATE_SEALED
        await controller.start(address)
        await controller.attached(2)
        assert (await told(clients[0], plan, "")).state == pb.RECEIPT_STATE_SEALED
        controller.commit(plan, digest, toy_model(1.0))
        assert (await clients[0].event("receipt")).state == pb.RECEIPT_STATE_COMMITTED


async def test_a_region_that_starts_without_a_controller_still_answers_for_what_it_sealed(
    start_combiner, controller, client_kits, connect, plan
):
    async with start_combiner() as combiner:
        await sealed(controller, client_kits, connect, combiner, plan)
        await combiner.kill()
    async with start_combiner(orphan_s=0.0) as combiner:
        await controller.stop()
        client = await connect(client_kits[0], combiner.addresses[0])
        assert (await told(client, plan, Reason.CONTROLLER_AWAY)).state == pb.RECEIPT_STATE_SEALED
