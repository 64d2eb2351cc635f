"""One region's round over real gRPC and certificates, without Ray."""

from __future__ import annotations

import asyncio

import numpy as np


async def test_three_clients_become_one_exact_sum_and_learn_that_it_was_counted(
    start_combiner, controller, client_kits, connect, plan, toy_model
):
    async with start_combiner(intakes=2) as combiner:
        clients = [await connect(kit, combiner.addresses[n % 2]) for n, kit in enumerate(client_kits[:3])]
        await controller.offer(plan)
        assert [await client.offer() for client in clients] == [plan] * 3
        receipts = await asyncio.gather(
            *(client.hand_in(plan, value=0.5 * n, weight=n + 1) for n, client in enumerate(clients))
        )
        assert {receipt.state for receipt in receipts} == {2}  # STAGED
        key, head, partial, digest = await controller.partials.get()
        assert key == plan.key
        assert (head.num_sites, head.num_updates, head.weight, head.metrics) == (3, 3, 6, {"num_examples": 6})
        expected = sum((n + 1) * int(0.5 * n * 2**32) for n in range(3))
        assert np.array_equal(partial.sums["train"], np.full(3000, expected))
        assert [(await client.event("receipt")).state for client in clients] == [3] * 3  # SEALED
        controller.commit(plan, digest, toy_model(1.0))
        last = [await client.event("receipt") for client in clients]
        assert [(receipt.state, receipt.model_version) for receipt in last] == [(4, 1)] * 3  # COMMITTED
        assert [receipt.state for client in clients for receipt in await client.receipts(plan.key)] == [4] * 3
