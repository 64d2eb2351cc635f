"""A small federation that has finished a run: its folders are what the audit looks at."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from federations import InProcess, job, noisy_app

from combiners.settings import RegionSettings
from hierfl.job import StrategyChoice

REGIONS = {"eu": ["eu-a", "eu-b", "eu-c"], "us": ["us-a", "us-b", "us-c"]}
ROUNDS = 2


def train(folder: Path, drop_bits: int = 0) -> str:
    """Two rounds of FedAdam and the last evaluation, all updates counted and all clients told; returns the run."""
    return asyncio.run(_train(folder, drop_bits))


async def _train(folder: Path, drop_bits: int) -> str:
    federation = InProcess(folder, REGIONS, 1, noisy_app(num_values=50), RegionSettings())
    federation.provision()
    async with AsyncExitStack() as stack:
        await federation.start_controller(stack)
        for region in REGIONS:
            await federation.start_combiner(stack, region)
            federation.start_clients(region)
        stack.push_async_callback(federation.stop_clients)
        wanted = job(rounds=ROUNDS, min_regions=2, min_clients=3, drop_bits=drop_bits)
        found = await federation.train(replace(wanted, strategy=StrategyChoice(name="fedadam")))
        assert found.summary.state == "finished", found.summary.reason
        await federation.hear("counted in model version", times=6 * (ROUNDS + 1))
    return str(found.summary.run)
