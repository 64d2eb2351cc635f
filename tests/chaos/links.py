"""The rows of the matrix whose faults are in the network: each region in a namespace of its own, behind its own link.

They run inside private namespaces (``benchmarks/wan/network.py``), which the kernel takes away with all that is in
them: this module starts itself there.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import bench_wan
from benchmarks.wan import network
from benchmarks.wan.network import Link, Network
from hierfl.client.app import load_app
from hierfl.client.params import make_layout
from hierfl.job import Arithmetic, Job, JobHead, RoundRules
from hierfl.operator import Operator
from hierfl.types import RunId
from hierfl.wire import hierfl_pb2 as pb
from tests.chaos import books
from tests.chaos.figures import Figures

__all__ = ["ROWS", "missing"]

FAST = Link(rate_mbit=1000.0, rtt_ms=2.0)
REGIONS, CLIENTS, VALUES = 3, 4, 100_000
SILENCE_S = 6.0
WAYS: Mapping[str, Sequence[str]] = {"both ways": ("INPUT", "OUTPUT"), "inwards": ("INPUT",), "outwards": ("OUTPUT",)}
FIGURES = "figures.json"


def missing() -> str:
    """What this machine lacks; empty where it lacks nothing."""
    return network.missing() or ("" if shutil.which("iptables") else "iptables")


def load(values: int) -> str:
    return f"{REGIONS} regions x {CLIENTS} clients x {values:,} values, links of {FAST.rate_mbit:g} Mbit/s"


# ---------------------------------------------------------------- outside


def in_namespaces(row: int) -> Callable[[Path, int], Awaitable[Figures]]:
    """The case of a row: it runs in namespaces, and this waits for its figures."""

    async def case(folder: Path, repeats: int) -> Figures:
        lacking = missing()
        if lacking:
            raise RuntimeError(f"row {row} needs {lacking}")
        inside = [sys.executable, "-m", "tests.chaos.links", str(row), str(folder), str(repeats)]
        if network.private(inside):
            raise RuntimeError(f"row {row} failed in its namespaces; what it said is above")
        return Figures(**json.loads((folder / FIGURES).read_text()))

    return case


# ---------------------------------------------------------------- inside


@contextmanager
def filtered(namespace: str, *rules: Sequence[str]) -> Iterator[None]:
    """These rules of iptables, for as long as the block lasts."""

    def all_of_them(verb: str) -> None:
        for chain, *rest in rules:
            command = network.in_namespace(namespace, ["iptables", verb, chain, *rest])
            subprocess.run(command, check=True, timeout=30)

    all_of_them("-A")
    try:
        yield
    finally:
        all_of_them("-D")


@dataclass
class Spread:
    """A federation over links, with one run."""

    net: Network
    federation: bench_wan.Federation
    operator: Operator
    run: RunId

    async def rounds(self) -> list[pb.RoundSummary]:
        return list((await self.operator.run(self.run)).rounds)

    async def rounds_until(self, enough: Callable[[list[pb.RoundSummary]], bool], patience_s: float) -> None:
        """Wait until the committed rounds are enough."""
        began_s = time.monotonic()
        while not enough(await self.rounds()):
            assert time.monotonic() - began_s < patience_s, "the rounds that were waited for did not come"
            await asyncio.sleep(0.1)

    async def whole(self, more: int = 1, patience_s: float = 120.0) -> None:
        """Wait for so many more rounds that count every region."""
        before = len(await self.rounds())
        await self.rounds_until(
            lambda rounds: sum(len(one.regions) == REGIONS for one in rounds[before:]) >= more, patience_s
        )


@asynccontextmanager
async def spread(
    folder: Path, third: Link = FAST, *, timeout_s: float = 30.0, values: int = VALUES
) -> AsyncIterator[Spread]:
    """Three regions, the third behind a link of its own kind; at the end the run is cancelled and all is stopped."""
    case = bench_wan.Case(
        regions=REGIONS, clients=CLIENTS, params=values, rounds=1, rate_mbit=FAST.rate_mbit, rtt_ms=FAST.rtt_ms
    )
    with network.opened(FAST, REGIONS - 1) as net:
        net.link = third
        net.add_region()
        async with bench_wan.serving(case, "hierarchical", folder / "federation", net.regions) as (
            federation,
            operator,
        ):
            free = {"params": values, "seed": 1}
            layout, vectors = make_layout(load_app(str(bench_wan.APP)).init(free))
            run = await operator.submit(job(free, timeout_s), await operator.upload_model(layout, vectors))
            spread_out = Spread(net, federation, operator, run)
            await spread_out.rounds_until(bool, 120.0)
            yield spread_out
            await operator.cancel(run)
            for zone in zones(folder, net.regions).values():
                while books.open_receipts(zone, run):
                    await asyncio.sleep(0.1)


def job(free: dict[str, int], timeout_s: float) -> Job:
    rules = RoundRules(
        min_regions=1,
        min_clients=3,
        report_timeout_s=timeout_s,
        silence_s=SILENCE_S,
        evaluate_every=0,
        max_abandoned=1000,
    )
    head = JobHead(name="links", app="bench-round", rounds=100_000)
    return Job(job=head, round=rules, arithmetic=Arithmetic(k=3), app=free)


def zones(folder: Path, regions: Sequence[str]) -> dict[str, Path]:
    return {region: folder / "federation" / f"combiner-{region}" for region in regions}


def figures_of(
    row: int, folder: Path, regions: Sequence[str], repeats: int, figures: dict[str, float], values: int = VALUES
) -> Figures:
    found = books.read_books(folder / "federation" / "controller-hub", zones(folder, regions))
    figures = {**figures, "rounds": found.rounds, "updates_counted": found.counted}
    return Figures(
        row=row, load=load(values), repeats=repeats, clean=not found.wrong, wrong=found.wrong, figures=figures
    )


async def row_7(folder: Path, repeats: int) -> Figures:
    """One region is cut off, both ways and either way: for 60 s, or for 15 s each where it is asked for once."""
    cut_s = 15.0 if repeats == 1 else 60.0
    figures: dict[str, float] = {}
    async with spread(folder) as at_work:
        victim = at_work.net.regions[-1]
        for _ in range(repeats):
            for way, chains in WAYS.items():
                await at_work.whole(10)
                before = [one.seconds for one in (await at_work.rounds())[-10:]]
                with filtered(victim, *((chain, "-j", "DROP") for chain in chains)):
                    noticed_ns = time.time_ns() + int((SILENCE_S + 1) * 1e9)
                    await asyncio.sleep(cut_s)  # the fault itself, not a wait for it
                    cut_off = [one for one in await at_work.rounds() if _began_ns(one) > noticed_ns]
                healed_s, known = time.monotonic(), len(await at_work.rounds())
                await at_work.whole()
                back = next(n for n, one in enumerate((await at_work.rounds())[known:]) if len(one.regions) == REGIONS)
                name = way.replace(" ", "_")
                figures[f"{name}_without_s"] = round(statistics.median(before), 3)
                figures[f"{name}_cut_off_s"] = round(statistics.median(one.seconds for one in cut_off), 3)
                figures[f"{name}_rounds"] = len(cut_off)
                figures[f"{name}_back_after_rounds"] = back
                figures[f"{name}_back_s"] = round(time.monotonic() - healed_s, 1)
        regions = at_work.net.regions
    return figures_of(7, folder, regions, repeats * len(WAYS), figures)


def _began_ns(one: pb.RoundSummary) -> int:
    return one.committed_unix_ns - int(one.seconds * 1e9)


async def row_8(folder: Path, repeats: int) -> Figures:
    """One region behind 200 ms and 5 % loss: every round counts it."""
    loss = ("-m", "statistic", "--mode", "random", "--probability", "0.05", "-j", "DROP")
    async with spread(folder, Link(rate_mbit=FAST.rate_mbit, rtt_ms=200.0)) as at_work:
        victim = at_work.net.regions[-1]
        with filtered(victim, ("INPUT", "-i", "wan0", *loss), ("OUTPUT", "-o", "wan0", *loss)):
            before = len(await at_work.rounds())
            await at_work.rounds_until(lambda rounds: len(rounds) >= before + 5 * repeats, 60.0 * repeats)
            rounds = (await at_work.rounds())[before:]
            abandoned = (await at_work.operator.run(at_work.run)).summary.rounds_abandoned
        regions = at_work.net.regions
    lacking = sum(len(one.regions) < REGIONS for one in rounds)
    figures = {"failed_rounds": float(abandoned), "rounds_without_it": float(lacking)}
    figures["round_median_s"] = round(statistics.median(one.seconds for one in rounds), 2)
    return figures_of(8, folder, regions, len(rounds), figures)


async def row_9(folder: Path, repeats: int) -> Figures:
    """One region at 8 Mbit/s, too slow for a model of 4 MB: rounds wait for it no longer than their deadline."""
    values, timeout_s = 1_000_000, 5.0
    slow = Link(rate_mbit=8.0, rtt_ms=FAST.rtt_ms)
    async with spread(folder, slow, timeout_s=timeout_s, values=values) as at_work:
        before = len(await at_work.rounds())
        await at_work.rounds_until(lambda rounds: len(rounds) >= before + 5 * repeats, 90.0 * repeats)
        rounds = (await at_work.rounds())[before:]
        regions = at_work.net.regions
    figures = {"round_median_s": round(statistics.median(one.seconds for one in rounds), 2)}
    figures["rounds_with_it"] = float(sum(len(one.regions) == REGIONS for one in rounds))
    figures["deadline_s"] = timeout_s + SILENCE_S  # the controller's: a region closes before it, and then sends
    return figures_of(9, folder, regions, len(rounds), figures, values)


INSIDE = {7: row_7, 8: row_8, 9: row_9}
ROWS = {row: in_namespaces(row) for row in INSIDE}


def main() -> None:
    row, folder, repeats = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    figures = asyncio.run(INSIDE[row](folder, repeats))
    (folder / FIGURES).write_text(json.dumps(asdict(figures)))


if __name__ == "__main__":
    main()
