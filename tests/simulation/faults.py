"""What goes wrong in a history: drawn from its seed, and over after a while."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace

from hierfl.client.held import Held
from hierfl.client.session import Session
from hierfl.errors import HierFLError
from hierfl.failpoints import POINTS
from hierfl.records import UPDATE_CONTEXT, update_statement
from hierfl.types import ClientRef, RunId, TaskKind, UpdateKey
from hierfl.wire import hierfl_pb2 as pb
from tests.simulation.kits import CONTROLLERS
from tests.simulation.loop import Node, current
from tests.simulation.rays import RayOdds
from tests.simulation.wire import Odds
from tests.simulation.world import Client, Region, World

__all__ = ["Storm"]

LEVELS = (0.0, 0.0, 0.03, 0.12)
NOT_COUNTED = pb.RECEIPT_STATE_NOT_COUNTED
MEAN_S = 1.5
"""Mean time from the start to a fault: a round takes about one second."""


CALLS = (
    *(
        "freeze",
        "freeze",
        "freeze",
        "freeze",
        "freeze",
        "freeze",
        "open",
        "close",
        "resume",
        "deliver",
        "register",
        "tick",
        "tick",
    ),
    *("Attach", "Uplink", "Uplink", "Report", "Abstain", "FetchModel", "Follow", "Admit", "Admit", "GetReceipts"),
)
"""By Ray in a region, by gRPC elsewhere."""


@dataclass
class Aim:
    """A call that is waited for, and what happens then."""

    method: str
    left: int
    """So many of them, until it is this one."""
    is_caller: bool
    is_kill: bool
    after_s: float


class Storm:
    """The faults of one history; what was done is in ``log``, for whoever looks into a seed."""

    def __init__(self, world: World, runs: list[RunId], only: Collection[str] = ()) -> None:
        self.world, self.dice, self.runs = world, world.dice, runs
        self.log: list[str] = []
        self.twins: set[ClientRef] = set()
        self.names: list[str] = []
        """Of the faults drawn."""
        self.aims: list[Aim] = []
        self.points: list[Aim] = []
        world.loop.on_failpoint = self._reached
        world.loop.on_freezing = self._freezing
        world.network.on_call = self._called
        for region in world.regions:
            region.rays.on_call = self._called
        self.menu: list[tuple[int, Callable[[], Awaitable[None] | None]]] = [
            (3, self.kill_intake),
            (3, self.kill_region),
            (3, self.kill_controller),
            (2, self.kill_client),
            (2, self.kill_cluster),
            (4, self.region_dies_at_disk),
            (4, self.controller_dies_at_disk),
            (2, self.client_dies_at_disk),
            (3, self.freeze_intake),
            (3, self.freeze_region),
            (3, self.freeze_controller),
            (3, self.cut_off_region),
            (2, self.cut_off_client),
            (2, self.client_leaves),
            (1, self.drain_region),
            (1, self.evil_twin),
            (1, self.cancel),
            (1, self.submit_again),
            (2, self.region_freezes_at_disk),
            (3, self.controller_freezes_at_disk),
            (8, self.aim),
            (12, self.at_failpoint),
            (2, self.other_keys),
        ]

        if only:
            self.menu = [(weight, fault) for weight, fault in self.menu if fault.__name__ in only]

    def say(self, text: str) -> None:
        self.log.append(f"{self.world.loop.now_s:8.3f} {text}")

    def odds(self) -> None:
        """Every history has weather of its own."""
        draw = lambda: self.dice.choice(LEVELS)  # noqa: E731
        self.world.network.odds = Odds(*(draw() for _ in range(6)))
        for region in self.world.regions:
            region.rays.odds = RayOdds(draw() / 2, draw() / 2, draw())
        self.say(f"odds {self.world.network.odds} {[region.rays.odds for region in self.world.regions]}")

    async def blow(self, until_s: float, is_over: Callable[[], bool]) -> None:
        """A few faults, one after the other, at moments of their own."""
        self.odds()
        count = self.dice.choice((1, 2, 2, 3, 4, 6))
        moments = sorted(self.world.loop.now_s + self.dice.expovariate(1 / MEAN_S) for _ in range(count))
        for moment in moments:
            await asyncio.sleep(max(0.0, moment - self.world.loop.now_s))
            (fault,) = self.dice.choices([one for _, one in self.menu], [weight for weight, _ in self.menu])
            self.names.append(fault.__name__)
            made = fault()
            if made is not None:
                self.world.loop.create_task(made)  # type: ignore[arg-type]
            if is_over():
                return
        while self.world.loop.now_s < until_s and not is_over():
            await asyncio.sleep(0.25)

    def pass_over(self) -> None:
        """No more faults, no more processes that do not run."""
        self.say("healed")
        world = self.world
        self.aims.clear()
        self.points.clear()
        world.network.heal()
        for region in world.regions:
            region.rays.odds = RayOdds()
        for node in world.loop.nodes():
            node.dies_after = node.freezes_after = None
            if node.is_frozen:
                node.thaw()

    # ---------------------------------------------------------------- processes that die

    def _kill(self, node: Node | None) -> None:
        if node is not None and node.is_alive:
            self.say(f"kill {node.name}")
            self.world.kill(node)

    def _region(self) -> Region:
        return self.dice.choice(self.world.regions)

    def _client(self) -> Client:
        return self.dice.choice(self.world.clients)

    def kill_intake(self) -> None:
        self._kill(self.dice.choice(self._region().intakes).node)

    def kill_region(self) -> None:
        self._kill(self._region().actor.node)

    def kill_controller(self) -> None:
        self._kill(self.world.controller)

    def kill_client(self) -> None:
        self._kill(self._client().node)

    def kill_cluster(self) -> None:
        region = self._region()
        for actor in (region.actor, *region.intakes):
            self._kill(actor.node)

    def _dies_at_disk(self, node: Node | None, most: int) -> None:
        if node is not None and node.runs:
            node.dies_after = self.dice.randrange(most)
            self.say(f"{node.name} dies after {node.dies_after} steps at its disk")

    def region_dies_at_disk(self) -> None:
        self._dies_at_disk(self._region().actor.node, 25)

    def controller_dies_at_disk(self) -> None:
        self._dies_at_disk(self.world.controller, 25)

    def client_dies_at_disk(self) -> None:
        self._dies_at_disk(self._client().node, 10)

    # ---------------------------------------------------------------- right in the middle of a call

    def aim(self) -> None:
        """The next time, or one of the next, that a call is made, one of its two ends is killed or frozen."""
        method, ordinal = self.dice.choice(CALLS), self.dice.choice((1, 1, 2, 3, 5))
        is_caller, is_kill = self.dice.random() < 0.4, self.dice.random() < 0.6
        after_s = self.dice.choice((0.0, 0.001, 0.002, 0.004, 0.01))
        self.say(f"aim at {'the caller' if is_caller else 'the target'} of {method} number {ordinal}")
        self.aims.append(Aim(method, ordinal, is_caller, is_kill, after_s))

    def at_failpoint(self) -> None:
        """Whoever reaches a failpoint, the next time or one of the next, dies or freezes there."""
        point, ordinal, is_kill = (
            self.dice.choice(tuple(POINTS)),
            self.dice.choice((1, 1, 2, 3)),
            self.dice.random() < 0.6,
        )
        self.say(f"{'kill' if is_kill else 'freeze'} at {point} number {ordinal}")
        self.points.append(Aim(point, ordinal, False, is_kill, 0.0))

    def _reached(self, point: str) -> None:
        for aim in [aim for aim in self.points if aim.method == point]:
            aim.left -= 1
            if aim.left == 0:
                self.points.remove(aim)
                node = current()
                self.say(f"{node.name} is at {point}")
                if aim.is_kill:
                    node.die()
                self._freezing(node)

    def _called(self, method: str, caller: Node, target: Node) -> None:
        for aim in [aim for aim in self.aims if aim.method == method]:
            aim.left -= 1
            if aim.left == 0:
                self.aims.remove(aim)
                victim = caller if aim.is_caller else target
                self.world.loop.world.call(self.world.loop.call_later, aim.after_s, self._hit, victim, aim.is_kill)

    def _hit(self, node: Node, is_kill: bool) -> None:
        if is_kill:
            self._kill(node)
        elif node.runs:
            self.world.loop.world.spawn(self._freeze(node, self._successor_of(node)))

    def _successor_of(self, node: Node) -> Callable[[], None]:
        """How somebody takes its place."""
        world = self.world
        for region in world.regions:
            if region.actor.node is node:
                return lambda: world.start_region(region)
            for actor in region.intakes:
                if actor.node is node:
                    return lambda: world.start_intake(region, actor)
        if node is world.controller:
            address = CONTROLLERS[0] if node.name.startswith("ctl-b") else CONTROLLERS[1]
            return lambda: world.start_controller(address)
        return lambda: None

    def _freezing(self, node: Node) -> None:
        """It is in the middle of something at its disk: it does no more than that."""
        self.world.loop.world.spawn(self._freeze(node, self._successor_of(node)))
        node.freeze()
        self.world.zombies.append(node)

    def _freezes_at_disk(self, node: Node | None, most: int) -> None:
        if node is not None and node.runs:
            node.freezes_after = self.dice.randrange(most)
            self.say(f"{node.name} freezes after {node.freezes_after} steps at its disk")

    def region_freezes_at_disk(self) -> None:
        self._freezes_at_disk(self._region().actor.node, 25)

    def controller_freezes_at_disk(self) -> None:
        self._freezes_at_disk(self.world.controller, 25)

    # ---------------------------------------------------------------- processes that come back

    async def _freeze(self, node: Node | None, replace_it: Callable[[], None]) -> None:
        """Frozen for a while; where somebody has taken its place meanwhile it lives on for a moment, a zombie."""
        if node is None or not node.is_alive:
            return
        is_replaced = self.dice.random() < 0.7
        self.say(f"freeze {node.name}" + (", replaced" if is_replaced else ""))
        self.world.freeze(node)
        await asyncio.sleep(self.dice.uniform(0.2, 4.0))
        if is_replaced and node.is_frozen:
            replace_it()
        await asyncio.sleep(self.dice.uniform(0.1, 6.0))
        if node.is_frozen and node.is_alive:
            self.say(f"thaw {node.name}")
            node.thaw()
        await asyncio.sleep(self.dice.uniform(0.5, 4.0))
        if is_replaced:
            self._kill(node)

    async def freeze_intake(self) -> None:
        await self._freeze_one(self.dice.choice(self._region().intakes).node)

    async def freeze_region(self) -> None:
        await self._freeze_one(self._region().actor.node)

    async def freeze_controller(self) -> None:
        await self._freeze_one(self.world.controller)

    async def _freeze_one(self, node: Node | None) -> None:
        if node is not None and node.runs:
            await self._freeze(node, self._successor_of(node))

    # ---------------------------------------------------------------- the network

    async def _cut_off(self, here: str, there: tuple[str, ...]) -> None:
        ways = self.dice.choice(("both", "out", "in"))
        self.say(f"cut {here} from {there}: {ways}")
        for other in there:
            source, target = (here, other) if ways != "in" else (other, here)
            self.world.network.block(source, target, both=ways == "both")
        await asyncio.sleep(self.dice.uniform(0.5, 12.0))
        for other in there:
            self.world.network.blocked -= {(here, other), (other, here)}
        self.say(f"{here} is back")

    async def cut_off_region(self) -> None:
        await self._cut_off(self._region().name, ("ctl-a", "ctl-b"))

    async def cut_off_client(self) -> None:
        client = self._client()
        await self._cut_off(client.name, (client.name.partition("-")[0],))

    # ---------------------------------------------------------------- what people do

    async def client_leaves(self) -> None:
        client = self._client()
        node = client.node
        if node is None or not node.is_alive:
            return
        self.say(f"{client.name} leaves")
        client.node = None  # nobody starts it again
        self.world.kill(node)
        await asyncio.sleep(self.dice.uniform(2.0, 15.0))
        self.world.start_client(client)

    async def drain_region(self) -> None:
        region = self._region()
        node, host = region.actor.node, region.actor.host
        if node is None or host is None or not node.runs:
            return
        self.say(f"drain {region.name}")

        async def drain() -> None:
            await host.drain(2.0)
            await host.stop()

        task = node.spawn(drain())
        for _ in range(20):
            await asyncio.sleep(0.25)
            if task.done():
                break
        self._kill(node)

    def evil_twin(self) -> None:
        client = self._client()
        if client.kit.identity.client_ref in self.twins:
            return  # two of them would want one folder
        self.say(f"another process as {client.name}")
        twin = replace(
            client, salt=client.salt + 100, directory=client.directory.parent / "evil", node=None, session=None
        )
        self.twins.add(client.kit.identity.client_ref)
        self.world.clients.append(twin)
        self.world.start_client(twin)

    async def cancel(self) -> None:
        run = self.dice.choice(self.runs)
        self.say(f"cancel {run}")
        await self.world.cancel(run)

    async def submit_again(self) -> None:
        self.say("the same job once more")
        self.runs.append(await self.world.submit(self.world.jobs[0], f"again-{len(self.runs)}"))

    async def other_keys(self) -> None:
        """An update is handed in for rounds, attempts and runs that are not, or not any more: nobody takes it."""
        client = self._client()
        node, session = client.node, client.session
        if node is None or session is None or not node.runs:
            return
        self.say(f"{client.name} hands in under other keys")
        held = next(iter(session.updates), None)
        if held is not None:
            node.spawn(self._hand_in_elsewhere(session, held))

    async def _hand_in_elsewhere(self, session: Session, held: Held) -> None:
        key = held.key
        for other in (
            replace(key, round=key.round + 5),
            replace(key, round=max(1, key.round - 1), attempt=key.attempt + 3),
            replace(key, attempt=key.attempt + 7),
            replace(key, run=RunId("toy-none")),
            replace(key, task=TaskKind.EVALUATE),
        ):
            outgoing, weight = session.updates.outgoing(held), held.head.weight
            statement = update_statement(UpdateKey(other, session.client), held.digest, weight)
            try:
                answer = await session.link.admit(
                    other, outgoing, weight, session.link.kit.sign(statement, UPDATE_CONTEXT)
                )
            except HierFLError:
                continue
            if answer.HasField("ticket") or (answer.HasField("receipt") and answer.receipt.state != NOT_COUNTED):
                self.world.failures.append(f"{other} was taken: {answer}")
