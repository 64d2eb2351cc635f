"""Rounds over slow, long links: every client talks to one combiner far away, or to a combiner in its own region.

Each region is a network namespace of its own behind one link to the hub, where the controller is; the link has a
rate (``tc tbf``) and a delay (packets are held back, so that TCP meets it too). Flat: the one combiner is in the hub,
and updates cross the links. Hierarchical: each region has a combiner, and one sum crosses. Controller, combiners and
clients are the shipped programs over mutual TLS, a process each; clients add noise, they do not train.
Bytes are the kernel's counts of IP bytes on the links, all headers and TLS included.

Needs Linux, root, iproute2 and /dev/net/tun; otherwise it says so and is done. Each case lives in private namespaces,
which end with it: nothing is left on the machine, also after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import signal
import statistics
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

if __package__ in (None, ""):  # run as a file, as in the examples
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from benchmarks.wan import network
from hierfl import documents, provision
from hierfl.client.app import load_app
from hierfl.client.params import make_layout
from hierfl.errors import HierFLError
from hierfl.job import Arithmetic, Job, JobHead, RoundRules
from hierfl.operator import Operator, connect
from hierfl.pki import Kit
from hierfl.processes import Child, Program, kill_all

__all__ = ["Case", "Measured", "WanResult", "measured", "table"]

SCHEMA = "hierfl.bench_wan/1"
APP = Path(__file__).with_name("round_app.py")
FLAT, HIERARCHICAL = "flat", "hierarchical"
MODES = (FLAT, HIERARCHICAL)
ALL = "everywhere"
"""The one region of the flat federation."""
CONNECT_S = 120.0
MEASURED = "measured.json"

EXAMPLES = """\
examples:
  python benchmarks/bench_wan.py                                    2 and 3 regions x 3 clients, 4 MB, 50 Mbit/s, 80 ms
  python benchmarks/bench_wan.py --regions 10 --clients 2 --rate 20 --rtt 150
  python benchmarks/bench_wan.py --regions 1 --params 250000 --json wan.json
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One federation over one kind of link."""

    regions: int
    clients: int
    """Of each region."""
    params: int
    rounds: int
    """Those that count; one more comes first."""
    rate_mbit: float
    rtt_ms: float

    @property
    def link(self) -> network.Link:
        return network.Link(rate_mbit=self.rate_mbit, rtt_ms=self.rtt_ms)

    def __str__(self) -> str:
        size = f"{self.regions} regions x {self.clients} clients, {4 * self.params / 1e6:g} MB"
        return f"{size}, {self.rate_mbit:g} Mbit/s, {self.rtt_ms:g} ms"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One case, flat or hierarchical. Bytes are a round's, summed over all links."""

    mode: str
    case: Case
    round_s: float
    """Median."""
    rounds_s: tuple[float, ...]
    first_round_s: float
    bytes_up: int
    bytes_down: int
    link_s: float
    """What the busiest link needs for its bytes of a round at its rate, down and then up: no round can be faster
    unless it does both at once."""
    late_ms: float
    """How late packets left the delay line on average: what this machine added to the links."""


@dataclass(frozen=True, kw_only=True)
class WanResult:
    """``results/wan.json``."""

    schema: str
    machine: harness.Machine
    load: float
    versions: Mapping[str, str]
    seed: int
    measured: tuple[Measured, ...]


Moved = Mapping[str, tuple[int, int]]


def measured(case: Case, mode: str, seconds: Sequence[float], moved: tuple[Moved, Moved], late_ms: float) -> Measured:
    """A row of the result.

    Args:
        seconds: Of all rounds, the first one included.
        moved: Bytes up and down by link, as counted after the first round and after the last.
    """
    first, *counted = seconds
    before, after = moved
    each = [(after[name][0] - before[name][0], after[name][1] - before[name][1]) for name in after]
    busiest = max(up + down for up, down in each)
    return Measured(
        mode=mode,
        case=case,
        round_s=round(statistics.median(counted), 4),
        rounds_s=tuple(round(one, 4) for one in counted),
        first_round_s=round(first, 4),
        bytes_up=sum(up for up, _ in each) // len(counted),
        bytes_down=sum(down for _, down in each) // len(counted),
        link_s=round(busiest / len(counted) / case.link.bytes_per_s, 4),
        late_ms=round(late_ms, 3),
    )


# ---------------------------------------------------------------- one federation


class Federation:
    """The programs of one case. Where each runs is what flat and hierarchical differ in."""

    def __init__(self, case: Case, mode: str, folder: Path, places: Sequence[str]) -> None:
        """``places``: the namespaces of the regions."""
        self.case, self.folder, self.places = case, folder, places
        self.flat = mode == FLAT
        self.fleet = uuid.uuid4().hex
        self._children: list[Child] = []

    @property
    def regions(self) -> Mapping[str, Sequence[str]]:
        """By region: the namespaces in which it has sites."""
        return {ALL: self.places} if self.flat else {place: [place] for place in self.places}

    @property
    def sites_each(self) -> int:
        """Sites of each region: one client a site."""
        return self.case.clients * (len(self.places) if self.flat else 1)

    @property
    def k(self) -> int:
        return max(2, min(3, self.sites_each))

    def kit(self, *parts: str) -> Path:
        return self.folder.joinpath("kits", *parts)

    def sites(self, place: str) -> list[str]:
        return [f"{place}-{number:02d}" for number in range(self.case.clients)]

    async def start(self) -> str:
        """Start everything; returns the controller's address."""
        provision.init(self.folder, "wan")
        provision.add_operator(self.folder, "admin")
        for region, places in self.regions.items():
            provision.add_region(self.folder, region)
            for site in (site for place in places for site in self.sites(place)):
                provision.add_site(self.folder, region, site)
        (controller,) = await self._serve("", "controller", self.kit("controller"), "--listen", f"{network.HUB}:0")
        for region, places in self.regions.items():
            await self._start_region(region, places, controller)
        return controller

    async def _start_region(self, region: str, places: Sequence[str], controller: str) -> None:
        place, listen = ("", f"{network.HUB}:0") if self.flat else (region, "127.0.0.1:0")
        rules = ("--k", str(self.k), "--max-share", "1", "--controller", controller, "--listen", listen)
        addresses = await self._serve(place, "combiner", self.kit("regions", region, "combiner"), *rules)
        for home in places:
            kits = [self.kit("sites", region, site, "client-00") for site in self.sites(home)]
            for site, kit in zip(self.sites(home), kits, strict=True):
                provision.set_addresses(kit, addresses)
                where = ("--kit", str(kit), "--dir", str(self.folder / "clients" / site))
                # a process each: clients that share one also share the model that it fetched
                await self._child(home, f"clients-{site}", ["client", "run", str(APP), *where])

    async def _serve(self, place: str, program: str, kit: Path, *options: str) -> list[str]:
        name = f"{program}-{place or 'hub'}"
        where = ("--kit", str(kit), "--dir", str(self.folder / name))
        child = await self._child(place, name, [program, "serve", *where, *options], has_ready_line=True)
        return list((await child.ready)["addresses"])

    async def _child(self, place: str, name: str, command: list[str], *, has_ready_line: bool = False) -> Child:
        argv = network.in_namespace(place, [sys.executable, "-m", "hierfl", *command])
        log = self.folder / "logs" / f"{name}.log"
        child = await Child.start(Program(name=name, argv=argv, log=log, has_ready_line=has_ready_line), self.fleet)
        self._children.append(child)
        return child

    async def stop(self) -> None:
        """Clients first, the controller last."""
        for prefix in ("clients", "combiner", "controller"):
            await asyncio.gather(*(child.stop() for child in self._children if child.name.startswith(prefix)))
        await asyncio.to_thread(kill_all, self.fleet)


@contextlib.asynccontextmanager
async def serving(
    case: Case, mode: str, folder: Path, places: Sequence[str]
) -> AsyncIterator[tuple[Federation, Operator]]:
    """A federation, started; stopped at the end."""
    federation = Federation(case, mode, folder, places)
    try:
        controller = await federation.start()
        async with connect(Kit.load(federation.kit("operators", "admin")), controller) as operator:
            yield federation, operator
    finally:
        await federation.stop()


async def run_case(case: Case, mode: str, folder: Path) -> Measured:
    """Links, programs and rounds of one case, with everything in ``folder``."""
    say(f"{mode}: {case}: starting")
    with network.opened(case.link, case.regions) as net:
        async with serving(case, mode, folder, net.regions) as (federation, operator):
            seconds, moved = await _rounds(federation, operator, net)
        reports = net.close()
    packets = sum(report.get("packets", 0) for report in reports)
    late_ms = sum(report["packets"] * report["late_ms"] for report in reports if report) / max(1, packets)
    row = measured(case, mode, seconds, moved, late_ms)
    say(f"{mode}: {row.round_s} s a round, {row.bytes_up / 1e6:.1f} MB up and {row.bytes_down / 1e6:.1f} MB down")
    return row


async def _rounds(
    federation: Federation, operator: Operator, net: network.Network
) -> tuple[list[float], tuple[Moved, Moved]]:
    case = federation.case
    free = {"params": case.params, "seed": harness.SEED}
    layout, vectors = await asyncio.to_thread(make_layout, load_app(str(APP)).init(free))
    model = await operator.upload_model(layout, vectors)
    await _until_connected(operator, case.regions * case.clients)
    run = await operator.submit(_job(federation, free), model)
    counts: list[Moved] = []
    async for snapshot in operator.follow(run):
        if snapshot.HasField("committed"):
            counts.append(net.bytes_moved())
            say(f"round {snapshot.committed.round}: {snapshot.committed.seconds:.2f} s")
    outcome = await operator.run(run)
    if outcome.summary.state != "finished":
        raise RuntimeError(f"the run ended as {outcome.summary.state}: {outcome.summary.reason}")
    return [float(one.seconds) for one in outcome.rounds], (counts[0], counts[case.rounds])


async def _until_connected(operator: Operator, clients: int) -> None:
    async with asyncio.timeout(CONNECT_S):
        while True:
            regions = (await operator.status()).regions
            if sum(region.clients_connected for region in regions) == clients:
                return
            await asyncio.sleep(0.5)


def _job(federation: Federation, free: dict[str, int]) -> Job:
    case = federation.case
    rules = RoundRules(
        min_regions=len(federation.regions),
        min_clients=federation.sites_each,
        report_timeout_s=600,
        silence_s=20,  # an empty line is silent for longer than on one machine
        evaluate_every=0,
    )
    head = JobHead(name="wan", app="bench-round", rounds=case.rounds + 1, seed=harness.SEED)
    return Job(job=head, round=rules, arithmetic=Arithmetic(k=federation.k), app=free)


# ---------------------------------------------------------------- the command


def measure(cases: Sequence[Case], modes: Sequence[str]) -> WanResult | int:
    """All cases, each in namespaces of its own; or the exit status of one that failed or was stopped."""
    load = round(psutil.getloadavg()[0], 2)
    rows = []
    for case, mode in itertools.product(cases, modes):
        with tempfile.TemporaryDirectory(prefix="hierfl-wan-") as folder:
            asked = Path(folder) / "case.json"
            harness.write_document(asked, Inside(mode=mode, case=case))
            command = [sys.executable, str(Path(__file__).resolve()), "--inside", str(asked)]
            if status := network.private(command):
                return status
            rows.append(documents.decode((Path(folder) / MEASURED).read_bytes(), Measured, MEASURED))
    return WanResult(
        schema=SCHEMA,
        machine=harness.here(),
        load=load,
        versions=harness.versions("grpcio", "ray"),
        seed=harness.SEED,
        measured=tuple(rows),
    )


@dataclass(frozen=True, kw_only=True)
class Inside:
    """What the process inside the namespaces is to do; it writes a ``Measured`` beside it."""

    mode: str
    case: Case


def inside(file: Path) -> int:
    """The first process of the namespaces: one case, and its row."""
    asked = documents.decode(file.read_bytes(), Inside, file.name)
    try:
        row = asyncio.run(_until_stopped(run_case(asked.case, asked.mode, file.parent)))
    except asyncio.CancelledError:
        say("stopped; nothing is left")
        return 130
    except (HierFLError, RuntimeError, TimeoutError) as error:
        say(f"{asked.mode}: {asked.case}: {error or type(error).__name__}")
        return 1
    harness.write_document(file.parent / MEASURED, row)
    return 0


async def _until_stopped(work: Coroutine[None, None, Measured]) -> Measured:
    """SIGTERM cancels ``work``, which stops what it started."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def table(result: WanResult) -> str:
    """The result as Markdown: a row a case, hierarchical beside flat."""
    rows = ["| links | | seconds a round | MB across borders: up | down | link's own time |"]
    rows += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in result.measured:
        bytes_moved = f"{row.bytes_up / 1e6:.1f} | {row.bytes_down / 1e6:.1f}"
        rows.append(f"| {row.case} | {row.mode} | {row.round_s:.2f} | {bytes_moved} | {row.link_s:.2f} s |")
    return "\n".join(rows)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--regions", type=int, action="append", metavar="N", help="1 to 10; may be repeated (default 2, then 3)")
    option("--clients", type=int, default=3, help="of each region, 2 at least (default 3)")
    option("--params", type=int, default=1_000_000, help="float32 values of the model (default 1000000)")
    option("--rounds", type=int, default=4, help="that count; one more comes first (default 4)")
    option("--rate", type=float, default=50.0, metavar="MBIT", help="of each link, each way (default 50)")
    option("--rtt", type=float, default=80.0, metavar="MS", help="of each link, there and back (default 80)")
    option("--mode", choices=MODES, action="append", help="only this one; may be repeated (default: both)")
    option("--json", type=Path, default=harness.RESULTS / "wan.json", metavar="FILE", help="where the result goes")
    option("--inside", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = _parser()
    asked = parser.parse_args()
    if asked.inside:
        return inside(asked.inside)
    regions = asked.regions or [2, 3]
    if not all(1 <= number <= 10 for number in regions) or asked.clients < 2 or min(asked.rate, asked.rounds) <= 0:
        parser.error("1 to 10 regions, 2 clients each at least, a rate above 0 and a round")
    lacking = network.missing()
    if lacking:
        say(f"bench_wan is skipped: it needs {lacking}")
        return 0
    cases = [
        Case(
            regions=number,
            clients=asked.clients,
            params=asked.params,
            rounds=asked.rounds,
            rate_mbit=asked.rate,
            rtt_ms=asked.rtt,
        )
        for number in regions
    ]
    result = measure(cases, asked.mode or MODES)
    if isinstance(result, int):
        return result
    harness.write_document(asked.json, result)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
