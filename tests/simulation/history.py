"""One seeded history: a federation trains, things go wrong and are mended, and in the end the accounts are checked."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hierfl.errors import HierFLError
from hierfl.receipts import ReceiptState
from hierfl.runs import RunState
from hierfl.types import RunId
from tests.simulation.accounting import check, on_record, read_book
from tests.simulation.faults import Storm
from tests.simulation.kits import kits
from tests.simulation.loop import SimLoop, Stuck
from tests.simulation.product import simulated
from tests.simulation.stores import MemoryStore
from tests.simulation.wire import Network
from tests.simulation.witness import Witness
from tests.simulation.world import POLICY, World

__all__ = ["History", "run_history"]

STORM_S = (1.0, 8.0)
PATIENCE_S = 300.0
"""After the last fault every run ends, and every update has its last word, within so long."""
ALONE = 0.4
"""How often there is one region only: all of the product, at half the work."""
TWICE = 0.2
"""How often the same job is submitted twice from the start."""
MOST_TOLD = 5
MEMORY = Path("/dev/shm")


@dataclass
class History:
    """What came of a seed. ``problems`` is empty where all was right."""

    seed: int
    problems: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    """Of its faults."""
    faults: list[str] = field(default_factory=list)
    """Their names."""
    simulated_s: float = 0.0
    steps: int = 0
    updates: int = 0
    sealed: int = 0
    committed: int = 0
    releases: int = 0
    states: tuple[str, ...] = ()
    """Of its runs, at the end."""


def run_history(seed: int, *, stands_still: bool = False, only: Collection[str] = ()) -> History:
    """Run one history and check its accounts. ``only``: the names of the faults to draw from; all where none is."""
    folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    loop = SimLoop(seed)
    history = History(seed)
    witness = Witness()
    try:
        network, dice = Network(loop), random.Random(f"world {seed}")
        certificates = kits(1 if dice.random() < ALONE else 2)
        with simulated(loop, network, certificates, seed) as disks, witness.watching():
            world = World(loop, network, certificates, dice, folder)
            world.stands_still = stands_still
            witness.look = lambda told: on_record(told, world.memory, disks, folder)
            try:
                loop.run(_live(world, history, witness, only))
            except Stuck as stuck:
                history.problems.append(str(stuck))
            finally:
                world.is_over = True
                history.problems += (world.failures + loop.errors + witness.lies + disks.intrusions)[:MOST_TOLD]
                loop.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    history.simulated_s, history.steps = round(loop.now_s, 3), loop.num_steps
    return history


async def _live(world: World, history: History, witness: Witness, only: Collection[str]) -> None:
    dice = world.dice
    rules = {"min_regions": dice.randint(1, len(world.regions)), "report_timeout_s": dice.choice((1.5, 3.0, 8.0))}
    world.jobs = [world.job(dice.choice((1, 1, 2, 2, 3)), **rules)]
    world.loop.slow_threads = dice.choice((0.0, 0.0, 0.02, 0.1))
    world.start()
    runs = [await world.submit(world.jobs[0], "first")]
    if dice.random() < TWICE:
        runs.append(await world.submit(world.jobs[0], "second"))
    storm = Storm(world, runs, only)
    history.log, history.faults, witness.twins = storm.log, storm.names, storm.twins
    await storm.blow(world.loop.now_s + dice.uniform(*STORM_S), lambda: not any(_waits(world, runs)))
    storm.pass_over()
    await _settle(world, runs)
    if not world.failures:
        history.problems += [*_check(world, runs, witness)]
    _count(world, history, witness)


async def _settle(world: World, runs: list[RunId]) -> None:
    """Until all runs have ended and every update has its last word."""
    until_s = world.loop.now_s + PATIENCE_S
    while (waits := [*_waits(world, runs)]) and world.loop.now_s < until_s and not world.failures:
        for run in runs:
            if world.run_state(run) is RunState.PAUSED:
                await world.resume(run)
        await asyncio.sleep(0.25)
    if waits and not world.failures:
        raise Stuck(f"{PATIENCE_S:g} s after the last fault: {'; '.join(waits)}")


def _waits(world: World, runs: list[RunId]) -> Iterator[str]:
    """What is still to come. STAGED is no acknowledgement: an update may stay it until its ``hold_s`` where its run got
    the sums of another one after a Region that knew of it had died, where its client has a twin, or where a Region
    that had been replaced closed the attempt at the intakes.
    """
    has_twins = len({client.name for client in world.clients}) < len(world.clients)
    has_zombies = any(".region." in node.name for node in world.zombies)
    is_plain = len(runs) == 1 and not has_twins and not has_zombies
    for run in runs:
        if not world.run_state(run).is_terminal:
            loop = world.app.leader.runs.get(run) if world.app is not None else None
            yield f"{run} is {world.run_state(run)}: {loop.waiting_for if loop else 'nobody leads it'}"
    for region in world.regions:
        if region.actor.host is None or not region.actor.node or not region.actor.node.runs:
            yield f"{region.name} is not there"
        elif pending := region.actor.host.store.pending():
            yield f"{region.name} waits for its verdict on {pending}"
    for client in world.clients:
        if client.session is None or client.node is None or not client.node.runs:
            yield f"{client.name} is not there"
        else:
            yield from (
                f"{client.name}: {held.key} is {held.state}"
                for held in client.session.updates
                if held.state is ReceiptState.SEALED or (held.state is ReceiptState.STAGED and is_plain)
            )


def _check(world: World, runs: list[RunId], witness: Witness) -> Iterator[str]:
    try:
        books = {region.name: read_book(region.actor.host.store, region.name, region.kit) for region in world.regions}
        assert world.app is not None
        leader = world.app.leader
        yield from check(MemoryStore(world.memory), leader.blobs, leader.commits, books, witness, POLICY.k)
    except HierFLError as error:
        yield f"the accounts cannot be read: {type(error).__name__}: {error}"


def _count(world: World, history: History, witness: Witness) -> None:
    history.updates = len(witness.made)
    history.sealed = len({told.digest for told in witness.told if told.state is ReceiptState.SEALED})
    history.committed = len({told.digest for told in witness.told if told.state is ReceiptState.COMMITTED})
    history.releases = len({(sent.region, sent.digest) for sent in witness.sent})
    history.states = tuple(str(run.state) for run in MemoryStore(world.memory).runs())
