"""A federation of simulated processes: two controllers, a Region and its intakes in each region, clients.

What keeps such processes running outside is here, too: who is found dead is started again, whoever takes over from one
that is frozen has its name from then on.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from combiners.host import RegionHost
from combiners.intake import IntakeHost
from combiners.settings import IntakeSettings, RegionSettings
from controller.app import ControllerApp
from hierfl.client.app import App
from hierfl.client.offers import SitePolicy
from hierfl.client.session import Session, Site
from hierfl.client.task import Task, Update
from hierfl.errors import HierFLError
from hierfl.job import Arithmetic, Job, JobHead, RoundRules
from hierfl.layout import Layout
from hierfl.pki import Kit
from hierfl.residency import ZonePolicy
from hierfl.runs import RunState
from hierfl.types import RegionId, RunId
from tests.simulation import rays
from tests.simulation.kits import CONTROLLERS, Kits
from tests.simulation.loop import Node, SimLoop
from tests.simulation.product import InlineWorker
from tests.simulation.stores import Memory, MemoryStore
from tests.simulation.wire import Network

__all__ = ["Client", "Region", "World"]

LAYOUT = Layout.of({"w": np.zeros(3, np.float32)})
POLICY = ZonePolicy(k=2, max_share=0.9)
RESTART_S = (0.2, 2.0)


@dataclass
class Client:
    """One client and its folder; ``session`` is of the process that runs, if one does."""

    name: str
    kit: Kit
    directory: Path
    salt: int
    """Of its training: another one makes other updates."""
    node: Node | None = None
    session: Session | None = None


@dataclass
class Region:
    """One region's cluster."""

    name: RegionId
    kit: Kit
    directory: Path
    rays: rays.Rays
    actor: rays.Actor
    intakes: list[rays.Actor] = field(default_factory=list)
    newest_epoch: int = 0


class World:
    """See the module."""

    def __init__(self, loop: SimLoop, network: Network, kits: Kits, dice: random.Random, directory: Path) -> None:
        self.kits = kits
        self.loop, self.network, self.dice, self.directory = loop, network, dice, directory
        self.memory = Memory()
        self.app: ControllerApp | None = None
        """The controller that was started last."""
        self.controller: Node | None = None
        self.zombies: list[Node] = []
        self.failures: list[str] = []
        """Errors that a process ended with, other than those that faults explain."""
        self.is_over = False
        self.stands_still = False
        """Whether what one region learns undoes what the other does: the model stays as it was."""
        self.jobs: list[Job] = []
        """Those submitted."""
        self._starts: dict[str, int] = {}
        loop.on_killed = self.kill
        loop.on_freezing = self.freeze
        self.regions = [self._region(name) for name in kits.combiners]
        self.clients = [
            self._client(region, number) for region in self.regions for number in range(dice.choice((3, 3, 3, 4)))
        ]

    # ---------------------------------------------------------------- making it

    def _region(self, name: RegionId) -> Region:
        cluster = rays.Rays(self.loop)
        region = Region(name, self.kits.combiners[name], self.directory / name, cluster, rays.Actor(f"{name}.region"))
        region.intakes = [rays.Actor(f"{name}.intake-{n}") for n in range(self.dice.choice((1, 2, 2)))]
        return region

    def _client(self, region: Region, number: int) -> Client:
        kit = self.kits.clients[region.name][number]
        return Client(f"{region.name}-c{number}", kit, self.directory / "sites", salt=number + 1)

    def start(self) -> None:
        self.start_controller(CONTROLLERS[0])
        for region in self.regions:
            self.start_region(region)
            for actor in region.intakes:
                self.start_intake(region, actor)
        for client in self.clients:
            self.start_client(client)

    def node(self, name: str) -> Node:
        self._starts[name] = self._starts.get(name, 0) + 1
        return self.loop.node(f"{name}.{self._starts[name]}")

    # ---------------------------------------------------------------- processes

    def kill(self, node: Node) -> None:
        """A process dies, and what is connected to it notices; whoever keeps it running starts another."""
        node.kill()
        self.network.gone(node)
        for region in self.regions:
            for actor in (region.actor, *region.intakes):
                if actor.node is node:
                    actor.is_now(None, None)

    def later(self, seconds: tuple[float, float], action: Callable[..., None], *arguments: Any) -> None:
        self.loop.world.call(self.loop.call_later, self.dice.uniform(*seconds), action, *arguments)

    def _run(self, node: Node, work: Coroutine[Any, Any, None], again: Callable[[], None]) -> None:
        """Run a process's main function; when it ends, however it does, ``again`` starts the next one."""

        def ended(_: Any = None) -> None:
            if node.is_alive:
                self.kill(node)  # which comes back here
            elif not self.is_over:
                self.later(RESTART_S, again)

        async def main() -> None:
            try:
                await work
            except HierFLError:
                pass  # its log says why; it is started again
            except asyncio.CancelledError:
                pass
            except Exception as error:  # noqa: BLE001  a bug: the history fails by it
                self.failures.append(f"{node.name} ended with {type(error).__name__}: {error}")
            self.loop.world.call(self.loop.call_soon, ended)

        node.spawn(main())
        node.on_death = ended

    def start_controller(self, address: str) -> None:
        if self.controller is not None and self.controller.runs:
            return
        node = self.controller = self.node(address.partition(":")[0])
        memory = self.memory

        async def serve() -> None:
            app = ControllerApp(
                self.kits.controller, self.directory / "controller", address, open_store=lambda *_: MemoryStore(memory)
            )
            async with app:
                if self.controller is node:
                    self.app = app
                await app.failed()

        def again() -> None:
            if self.controller is node:
                self.start_controller(self.dice.choice(CONTROLLERS))

        self._run(node, serve(), again)

    def start_region(self, region: Region) -> None:
        if region.actor.node is not None and region.actor.node.runs:
            return
        node = self.node(region.actor.name)
        region.actor.is_now(node, None)
        settings = RegionSettings(
            policy=POLICY, grace_s=2.0, freeze_s=4.0, intake_silence_s=8.0, settle_s=0.5, keep_partial_bytes=2**20
        )

        async def serve() -> None:
            host = RegionHost(region.kit, region.directory, CONTROLLERS, settings)
            host.start()
            if region.actor.node is node:
                region.actor.host = host
                region.newest_epoch = max(region.newest_epoch, host.store.region_epoch)
            await asyncio.shield(host.failed)

        def again() -> None:
            if region.actor.node in (node, None):
                self.start_region(region)

        self._run(node, serve(), again)

    def start_intake(self, region: Region, actor: rays.Actor) -> None:
        if actor.node is not None and actor.node.runs:
            return
        node = self.node(actor.name)
        actor.is_now(node, None)
        settings = IntakeSettings(memory_bytes=2**30, shards=0, ticket_s=3.0, silence_s=5.0, resume_s=5.0)

        async def serve() -> None:
            port = rays.RegionHandle(region.rays, region.actor, actor)
            host = IntakeHost(actor.name.rpartition(".")[2], region.kit, port, settings)
            await host.start(f"{actor.name}:1")
            if actor.node is node:
                actor.host = host
            await asyncio.shield(host.failed)

        def again() -> None:
            if actor.node in (node, None):
                self.start_intake(region, actor)

        self._run(node, serve(), again)

    def start_client(self, client: Client) -> None:
        if client.node is not None and client.node.runs:
            return
        node = client.node = self.node(client.name)

        async def serve() -> None:
            worker = InlineWorker(self.loop, self._train_s)
            app = App(name="toy", init=lambda config: {"w": np.zeros(3, np.float32)}, train=self._trainer(client))
            site = Site(SitePolicy(app=app), {}, worker, lambda text: None)  # type: ignore[arg-type]
            client.session = Session(client.kit, site, client.directory)
            await client.session.run()

        def again() -> None:
            if client.node is node:
                self.start_client(client)

        self._run(node, serve(), again)

    def freeze(self, node: Node) -> None:
        node.freeze()
        self.network.silent(node)
        self.zombies.append(node)

    def _trainer(self, client: Client) -> Callable[[Task], Update]:
        number = int(client.name.rpartition("c")[2]) + 1

        def train(task: Task) -> Update:
            step = (client.salt + 10 * task.round) / (64.0 if task.region == "us" else 32.0)
            weight = 1 + (number * 7 + task.round) % 5
            if self.stands_still:
                step, weight = (1.0 if number % 2 else -1.0), 1
            return Update({name: array + np.float32(step) for name, array in task.params.items()}, num_examples=weight)

        return train

    def _train_s(self) -> float:
        """Most are quick, some are not."""
        return self.dice.uniform(0.01, 0.3) if self.dice.random() < 0.8 else self.dice.uniform(0.3, 3.0)

    # ---------------------------------------------------------------- operators

    def job(self, rounds: int, **rules: Any) -> Job:
        usual = {"evaluate_every": 0, "silence_s": 6.0, "report_timeout_s": 8.0, "min_clients": 2, "max_abandoned": 4}
        return Job(
            job=JobHead(name="toy", app="toy", rounds=rounds),
            round=RoundRules(**(usual | rules)),
            arithmetic=Arithmetic(k=2, max_weight=100, total_weight=20_000),
        )

    async def submit(self, job: Job, request_id: str) -> RunId:
        """Ask until some controller takes it."""
        while True:
            made = await self._as_controller(lambda leader: self._submit_to(leader, job, request_id))
            if made is not None:
                return RunId(made)
            await asyncio.sleep(0.5)

    async def _submit_to(self, leader: Any, job: Job, request_id: str) -> str:
        model = await leader.put_model(LAYOUT, {"train": np.zeros(3, np.float32)})
        return str(leader.submit(job, LAYOUT, model, request_id))

    async def _as_controller(self, work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """Do something in the controller's process; None where it did not end well, or in time."""
        node, app = self.controller, self.app
        if node is None or app is None or not node.runs or not app.address:
            return None
        task = node.spawn(work(app.leader))
        for _ in range(40):
            await asyncio.sleep(0.25)
            if task.done():
                return None if task.cancelled() or task.exception() is not None else task.result()
        return None

    def run_state(self, run: RunId) -> RunState:
        row = next((row for row in MemoryStore(self.memory).runs() if row.run == run), None)
        return RunState.SUBMITTED if row is None else row.state

    async def cancel(self, run: RunId) -> None:
        await self._as_controller(lambda leader: leader.cancel(run))

    async def resume(self, run: RunId) -> None:
        await self._as_controller(lambda leader: leader.resume(run))
