"""A discrete-event simulation of one round on one machine: who works when, on how many cores.

Each process has one event loop, on which its work for single clients is done one after the other; the work for
bytes (TLS, digests, folds) runs on any core. All of it shares the machine's cores in slices. A round is that of
``combiners`` and ``controller``: a model goes down to each region, from its intake to each client; updates come up
through a bounded number of slots; each is claimed at the Region; the sum is sealed, sent, merged and committed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import simpy

from benchmarks.scale.constants import Constants, Size

__all__ = ["SLOTS", "simulate"]

SLICE_S = 0.002
"""What a core does for one before it looks at the next."""
SLOTS = 16
"""Uploads that an intake lets in at once (``max_uploads`` of ``combiners/desk.py``)."""
VIRTUAL_PER_PROCESS = 64
"""As ``bench_round`` packs them."""
DOWN = 0.5
"""Share of a client's bytes that go down: as many come up."""
FETCH = 1 / 3
"""Share of a region's bytes that is the model: a partial of 64-bit sums is twice its size."""

Step = Generator[simpy.Event, Any, None]


class _Process:
    """One operating-system process: an event loop, and threads beside it."""

    def __init__(self, machine: _Machine) -> None:
        self._machine = machine
        self._loop = simpy.Resource(machine.env, capacity=1)

    def on_loop(self, cpu_s: float) -> Step:
        """Work that the event loop does, one piece at a time."""
        with self._loop.request() as turn:
            yield turn
            yield from self._machine.work(cpu_s)

    def beside(self, cpu_s: float) -> Step:
        """Work of other threads."""
        yield from self._machine.work(cpu_s)


class _Machine:
    """Cores, shared in slices, first come first served."""

    def __init__(self, cores: int) -> None:
        self.env = simpy.Environment()
        self._cores = simpy.Resource(self.env, capacity=cores)
        self.busy_s = 0.0

    def work(self, cpu_s: float) -> Step:
        left = cpu_s
        while left > 1e-12:
            piece = min(left, SLICE_S)
            with self._cores.request() as core:
                yield core
                yield self.env.timeout(piece)
            self.busy_s += piece
            left -= piece

    def together(self, steps: Iterable[Step]) -> simpy.Event:
        """An event: all of these are done."""
        return self.env.all_of([self.env.process(step) for step in steps])


class _Round:
    def __init__(self, size: Size, constants: Constants, cores: int) -> None:
        self.size, self.cost = size, constants
        self.machine = _Machine(cores)
        self.controller = _Process(self.machine)

    def run(self) -> Step:
        size, cost, machine = self.size, self.cost, self.machine
        opening = cost.of("controller", "round") / 2
        yield from self.controller.on_loop(opening)
        yield machine.together(self._region(clients) for clients in shares(size.clients, size.regions))
        yield from self.controller.beside(cost.of("controller", "round_mb") * size.model_mb)
        yield from self.controller.on_loop(opening)

    def _region(self, clients: int) -> Step:
        size, cost, machine = self.size, self.cost, self.machine
        region = _Process(machine)
        machine.env.process(machine.work(cost.of("ray", "region") + cost.of("ray", "client") * clients))
        yield from self.controller.on_loop(cost.of("controller", "region") / 2)
        yield from region.on_loop(cost.of("region", "region") / 2)
        yield from self._border(region, FETCH)
        groups = shares(clients, size.intakes)
        yield machine.together(self._intake(region, group) for group in groups)
        yield from region.on_loop(cost.of("region", "region") / 2)
        yield from self._border(region, 1 - FETCH)
        yield from self.controller.on_loop(cost.of("controller", "region") / 2)

    def _border(self, region: _Process, share: float) -> Step:
        """Both ends work at once."""
        mb = self.size.model_mb * share
        yield self.machine.together(
            (
                self.controller.beside(self.cost.of("controller", "region_mb") * mb),
                region.beside(self.cost.of("region", "region_mb") * mb),
            )
        )

    def _intake(self, region: _Process, clients: int) -> Step:
        size, cost, machine = self.size, self.cost, self.machine
        intake, slots = _Process(machine), simpy.Resource(machine.env, capacity=SLOTS)
        packed = VIRTUAL_PER_PROCESS if size.virtual else 1
        homes = [_Process(machine) for _ in range(-(-clients // packed))]
        fixed_s = cost.of("intake", "region") / size.intakes
        yield from intake.on_loop(fixed_s / 2)
        yield machine.together(self._client(homes[n // packed], intake, region, slots) for n in range(clients))
        yield from intake.beside(cost.of("intake", "region_mb") * size.model_mb / size.intakes)
        yield from intake.on_loop(fixed_s / 2)

    def _client(self, home: _Process, intake: _Process, region: _Process, slots: simpy.Resource) -> Step:
        cost = self.cost
        own_s = cost.of("client", "virtual_client" if self.size.virtual else "client")
        yield from intake.on_loop(cost.of("intake", "client") / 2)
        yield from home.on_loop(own_s / 2)
        yield self._move(home, intake, DOWN)
        with slots.request() as slot:
            yield slot
            yield from home.on_loop(own_s / 2)
            yield self._move(home, intake, 1 - DOWN)
            yield from intake.on_loop(cost.of("intake", "client") / 2)
            yield from region.on_loop(cost.of("region", "client"))

    def _move(self, home: _Process, intake: _Process, share: float) -> simpy.Event:
        mb = self.size.model_mb * share
        steps = (
            home.beside(self.cost.of("client", "client_mb") * mb),
            intake.beside(self.cost.of("intake", "client_mb") * mb),
        )
        return self.machine.together(steps)


def shares(total: int, parts: int) -> list[int]:
    """``total`` spread evenly."""
    share, rest = divmod(total, parts)
    return [share + (number < rest) for number in range(parts)]


def simulate(size: Size, constants: Constants, cores: int) -> tuple[float, float]:
    """Seconds of one round, from offering it to its commit, and the CPU seconds that were worked in it."""
    made = _Round(size, constants, cores)
    over = made.machine.env.process(made.run())
    made.machine.env.run(over)
    wait_s = constants.wait_s + constants.wait_s_mb * size.model_mb
    return float(made.machine.env.now) * constants.slowdown + wait_s, made.machine.busy_s
