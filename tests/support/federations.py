"""Federations for end-to-end tests: the shipped parts in one event loop, over real gRPC and real certificates.

Only Ray and the process borders are left out here; ``test_processes.py`` has those.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from combiners.local import LocalCombiner
from combiners.settings import IntakeSettings, RegionSettings
from controller.app import ControllerApp
from hierfl import provision
from hierfl.client.app import App
from hierfl.client.offers import SitePolicy
from hierfl.client.params import make_layout
from hierfl.client.runner import serve
from hierfl.client.task import Metrics, Task, Update
from hierfl.job import Arithmetic, Job, JobHead, PartialChoice, RoundRules, UpdateChoice
from hierfl.operator import Operator, connect
from hierfl.pki import Kit
from hierfl.residency import ZonePolicy
from hierfl.types import RunId
from hierfl.wire import hierfl_pb2 as pb

NUM_VALUES = 1000
PLAIN_UPDATES = UpdateChoice()


def noisy_app(
    *, delay_s: float = 0.0, num_values: int = NUM_VALUES, on_train: Callable[[int], None] = lambda seed: None
) -> App:
    """An app whose update depends on ``task.seed`` only; it takes up to ``delay_s`` at random to make it."""

    def init(config: Mapping[str, object]) -> dict[str, np.ndarray]:
        del config
        rng = np.random.default_rng(7)
        return {
            "body": rng.standard_normal(num_values).astype(np.float32),
            "head": rng.standard_normal((3, 5)).astype(np.float32),
        }

    def train(task: Task) -> Update:
        on_train(task.seed)
        if delay_s:
            time.sleep(random.SystemRandom().uniform(0, delay_s))  # another order of arrival each time
        rng = np.random.default_rng(task.seed)
        params = {
            name: array + rng.normal(scale=1e-2, size=array.shape).astype(np.float32)
            for name, array in task.params.items()
        }
        return Update(params, num_examples=int(rng.integers(1, 1000)), metrics={"loss": float(rng.uniform())})

    def evaluate(task: Task) -> Metrics:
        total = sum(float(np.abs(array).sum()) for array in task.params.values())
        return Metrics(loss=total / num_values, num_examples=10, accuracy=0.5)

    return App(name="noisy", init=init, train=train, evaluate=evaluate)


async def directly(name: str, address: str) -> str:
    """Nothing stands between a server and who dials it."""
    del name
    return address


class InProcess:
    """A running federation. ``regions`` maps a region to the names of its sites; ``between`` gives the address at
    which the server of a region, or ``"controller"``, is dialled."""

    def __init__(
        self,
        directory: Path,
        regions: Mapping[str, list[str]],
        intakes: int,
        app: App,
        settings: RegionSettings,
        between: Callable[[str, str], Awaitable[str]] = directly,
        intake: IntakeSettings | None = None,
        bootstrap: int | None = None,
    ) -> None:
        """``bootstrap``: so many of a region's intakes are in its kits; all where not given."""
        self.directory, self.regions, self.intakes, self.app = directory, regions, intakes, app
        if between is not directly:  # a list of the intakes would lead around it
            settings = replace(settings, settle_s=3600.0)
        self.settings, self.intake, self.bootstrap = settings, intake, bootstrap
        self._between = between
        self._dialled: dict[str, tuple[str, ...]] = {}
        self.combiners: dict[str, LocalCombiner] = {}
        self.said: list[str] = []
        self._spoken = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._clients: dict[str, asyncio.Task[bool]] = {}

    def kit(self, *parts: str) -> Path:
        return self.directory.joinpath("kits", *parts)

    def provision(self) -> None:
        provision.init(self.directory, "test-federation")
        provision.add_operator(self.directory, "admin")
        for region, sites in self.regions.items():
            provision.add_region(self.directory, region)
            for site in sites:
                provision.add_site(self.directory, region, site)

    async def start_controller(self, stack: AsyncExitStack) -> None:
        await self._open_controller("127.0.0.1:0")
        stack.push_async_callback(lambda: self.controller.__aexit__(None, None, None))

    async def _open_controller(self, listen: str) -> None:
        app = ControllerApp(Kit.load(self.kit("controller")), self.directory / "controller", listen)
        self.controller = await app.__aenter__()

    async def restart_controller(self) -> None:
        """Close the controller; start another on its directory and its address."""
        await self.controller.__aexit__(None, None, None)
        await self._open_controller(self.controller.address)

    async def start_combiner(self, stack: AsyncExitStack, region: str) -> None:
        await self._open_combiner(region, "127.0.0.1:0")
        stack.push_async_callback(lambda: self.combiners[region].__aexit__(None, None, None))

    async def _open_combiner(self, region: str, listen: str) -> None:
        policy = ZonePolicy(k=min(3, len(self.regions[region])), max_share=1.0)
        combiner = LocalCombiner(
            Kit.load(self.kit("regions", region, "combiner")),
            self.directory / "regions" / region,
            await self._between("controller", self.controller.address),
            intakes=self.intakes,
            listen=listen,
            intake=self.intake,
            region=replace(self.settings, policy=policy),
        )
        self.combiners[region] = await combiner.__aenter__()
        self._dialled[region] = tuple([await self._between(region, each) for each in combiner.addresses])

    async def restart_combiner(self, region: str) -> None:
        """End a combiner as a crash would; start another on its directory and its address."""
        (address,) = self.combiners[region].addresses
        await self.combiners[region].kill()
        await self._open_combiner(region, address)

    def start_clients(self, region: str) -> None:
        addresses = self._dialled[region][: self.bootstrap]
        for site in self.regions[region]:
            provision.set_addresses(self.kit("sites", region, site, "client-00"), addresses)
        kits = [Kit.load(self.kit("sites", region, site, "client-00")) for site in self.regions[region]]
        policy = SitePolicy(app=self.app, min_k=2)
        clients = serve(policy, kits, self.directory / "clients" / region, {}, workers=4, say=self._say)
        self._clients[region] = asyncio.create_task(clients)

    async def stop_clients(self, *regions: str) -> None:
        """Of these regions, or of all."""
        tasks = [self._clients.pop(region) for region in regions or tuple(self._clients)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _say(self, line: str) -> None:
        self.said.append(line)
        self._loop.call_soon_threadsafe(self._spoken.set)

    async def hear(self, words: str, times: int = 1) -> None:
        """Wait until the clients have said so many lines with these words."""
        async with asyncio.timeout(30):
            while sum(words in line for line in self.said) < times:
                self._spoken.clear()
                await self._spoken.wait()

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[Operator]:
        async with connect(Kit.load(self.kit("operators", "admin")), self.controller.address) as operator:
            yield operator

    async def train(self, job: Job) -> pb.GetRunResponse:
        """Submit a job from the app's own first model and wait for its end."""
        return await self.outcome(await self.submit(job))

    async def submit(self, job: Job) -> RunId:
        layout, vectors = make_layout(self.app.init(job.app))
        async with self.operator() as operator:
            return await operator.submit(job, await operator.upload_model(layout, vectors))

    async def outcome(self, run: RunId) -> pb.GetRunResponse:
        """A run, once it has ended."""
        async with self.operator() as operator, asyncio.timeout(60):
            async for _ in operator.follow(run):
                pass
            return await operator.run(run)


def job(
    *,
    rounds: int = 3,
    min_regions: int = 1,
    min_clients: int = 1,
    seed: int = 3,
    updates: UpdateChoice = PLAIN_UPDATES,
    drop_bits: int = 0,
    **rules: float,
) -> Job:
    """``rules``: of ``[round]``, in place of what tests usually want."""
    usual = {"report_timeout_s": 40, "silence_s": 2}
    return Job(
        job=JobHead(name="test", app="noisy", rounds=rounds, seed=seed),
        updates=updates,
        partials=PartialChoice(drop_bits=drop_bits),
        round=RoundRules(min_regions=min_regions, min_clients=min_clients, **{**usual, **rules}),
        arithmetic=Arithmetic(k=2),
    )


def require(condition: bool, what: str) -> None:
    """Skip where a tool is missing; fail where everything has to be there."""
    if not condition:
        if os.environ.get("HIERFL_REQUIRE_ALL"):
            pytest.fail(f"needs {what}")
        pytest.skip(f"needs {what}")
