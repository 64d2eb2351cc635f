"""One round of moving a model to its clients and back, through the real programs, beside the limit of the machine.

    python benchmarks/bench_round.py --clients 4 --params 25000000 --regions 1
    python benchmarks/bench_round.py --clients 16 --params 25000000 --regions 1 --json round.json
    python benchmarks/bench_round.py --clients 128 --params 1000 --regions 1 --virtual
    python benchmarks/bench_round.py --clients 3000 --params 100000 --connected 600 --rounds 2

A controller, a combiner with its Ray for each region, and the clients run as processes over mutual TLS; clients do
not train, they add noise that was drawn before. ``round_s`` goes from offering the plan to the durable commit. The
limit (``benchmarks/wire_limit.py``) is measured before and after the rounds, in the same run, for up to 1,000 clients:
it has a thread and a socket for each. Certificates are made before, in memory. The controller and the regions write to
disk; clients hold their updates in memory unless ``--client-disk``: in life each site has a disk of its own, here they
would share the one that the servers wait for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec
import psutil

from benchmarks import harness, wire_limit
from benchmarks.watching import PARTS, Watch
from hierfl import encodings
from hierfl.aggregation import ColumnGroup, GroupKind, Weighting
from hierfl.client.app import load_app
from hierfl.client.params import make_layout
from hierfl.config import FederationConfig, RegionConfig, SiteConfig
from hierfl.job import Arithmetic, Job, JobHead, RoundRules, UpdateChoice
from hierfl.local import Federation, serving
from hierfl.operator import connect
from hierfl.pki import Kit
from hierfl.types import RegionId, SiteId

__all__ = ["Asked", "main", "measure"]

ROOT = Path(__file__).resolve().parent.parent
APP = Path(__file__).with_name("round_app.py")
MOST_PROCESSES = 64
SITES_PER_PROCESS = 16
VIRTUAL_PER_PROCESS, MOST_VIRTUAL_PROCESSES = 64, 16
"""Of virtual clients; a few large processes leave the cores to the servers."""
LIMIT_CLIENTS = 1_000
"""Above this there is no limit beside the rounds."""
LIMIT_ROUNDS = 5
HEAVY_BYTES = 2e9
"""More than this of updates is not held in memory by virtual clients."""
REPORT_S = 1.0
"""At least the time between two reports of a region, with the ``silence_s`` of the job below."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured."""

    clients: int
    params: int
    regions: int = 1
    rounds: int = 7
    intakes: int = 1
    encoding: str = "float32"
    virtual: bool = False
    client_disk: bool = False
    connected: int = 0
    """At most so many are connected to an intake at once, the others come back in turn; 0: as the product has it."""
    with_limit: bool = True
    light: bool = False
    """Virtual clients of ``benchmarks/crowd.py``, which hold neither model nor update."""
    seed: int = harness.SEED

    @property
    def per_region(self) -> tuple[int, ...]:
        share, rest = divmod(self.clients, self.regions)
        return tuple(share + (number < rest) for number in range(self.regions))

    def processes(self, clients: int) -> int:
        """Client processes of a region with so many clients."""
        if not self.virtual:
            return clients
        return min(-(-clients // VIRTUAL_PER_PROCESS), -(-MOST_VIRTUAL_PROCESSES // self.regions))

    @property
    def region_names(self) -> tuple[RegionId, ...]:
        return tuple(RegionId(f"region-{number:02d}") for number in range(self.regions))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench_round", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, required=True, help="in all, spread evenly over the regions")
    parser.add_argument("--params", type=int, required=True, help="float32 values of the model")
    parser.add_argument("--regions", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="counted ones; one more comes first (default 7)")
    parser.add_argument("--intakes", type=int, default=1, help="servers of each combiner (default 1)")
    parser.add_argument("--encoding", default="float32", help="of updates (default float32)")
    parser.add_argument("--virtual", action="store_true", help="many clients in a process; always beyond 64")
    parser.add_argument(
        "--client-disk",
        action="store_true",
        help="clients hold their updates on this machine's disk, which they would not share in life; else in memory",
    )
    parser.add_argument(
        "--connected", type=int, default=0, metavar="N", help="at most so many at an intake at once, the others in turn"
    )
    parser.add_argument(
        "--light",
        action="store_true",
        help="virtual clients that hold neither model nor update; always where all of them would need more than 2 GB",
    )
    parser.add_argument("--no-limit", action="store_true", help="only the rounds: the limit moves their bytes 12 times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and traces in DIR")
    given = parser.parse_args(arguments)
    if given.clients < 2 * given.regions or given.params < 1 or given.rounds < 1 or given.regions < 1:
        parser.error("two clients a region are the least (a sum of one is its update), one value, one round")
    virtual = given.virtual or given.clients > MOST_PROCESSES
    asked = Asked(
        clients=given.clients,
        params=given.params,
        regions=given.regions,
        rounds=given.rounds,
        intakes=given.intakes,
        encoding=given.encoding,
        virtual=virtual,
        light=given.light or (virtual and given.clients * 4 * given.params > HEAVY_BYTES),
        client_disk=given.client_disk,
        connected=given.connected,
        with_limit=not given.no_limit and given.clients <= LIMIT_CLIENTS,
    )
    with tempfile.TemporaryDirectory(prefix="hierfl-bench-") as folder:
        result = asyncio.run(measure(asked, given.keep or Path(folder)))
    text = msgspec.json.format(msgspec.json.encode(result), indent=2)
    if given.json:
        given.json.write_bytes(text + b"\n")
    print(text.decode())
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def measure(asked: Asked, folder: Path) -> dict[str, Any]:
    """Start everything in ``folder``, run the rounds, the limit before and after them, and stop everything."""
    load = round(psutil.getloadavg()[0], 2)
    config = _federation(asked)
    in_memory = ["kits/sites"] if asked.client_disk else ["kits/sites", "clients"]
    with tempfile.TemporaryDirectory(prefix="hierfl-bench-", dir="/dev/shm") as memory, _environment(asked):
        for name in in_memory:
            (Path(memory) / name).mkdir(parents=True)
            (folder / "state" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "state" / name).symlink_to(Path(memory) / name)
        return await _measure(asked, config, folder, load)


@contextlib.contextmanager
def _environment(asked: Asked) -> Iterator[None]:
    """What the programs are told beside their command lines."""
    told = {"HIERFL_MAX_FOLLOWING": str(asked.connected)} if asked.connected else {}
    before = dict(os.environ)
    os.environ.update(told, PYTHONPATH=os.pathsep.join([str(ROOT), *before.get("PYTHONPATH", "").split(os.pathsep)]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Crowded(Federation):
    """With light clients."""

    client_program = ("benchmarks.crowd",)


async def _measure(asked: Asked, config: FederationConfig, folder: Path, load: float) -> dict[str, Any]:
    kind = _Crowded if asked.light else Federation
    async with serving(config, folder / "state", say, restart=False, kind=kind) as federation:
        limits = await _beside_limit(asked, federation) if asked.with_limit else ()
        measured = await _rounds(asked, federation)
        if asked.with_limit:
            limits += await _beside_limit(asked, federation, measured["bytes"]["border_up"] // asked.regions)
            measured |= _limit_figures(limits, measured["round_s"]["median"])
        say("stopping")
    machine = harness.here()
    return {
        "schema": "hierfl.bench_round/1",
        "clients": asked.clients,
        "params": asked.params,
        "regions": asked.regions,
        "intakes": asked.intakes,
        "encoding": asked.encoding,
        "virtual": asked.virtual,
        "client_disk": asked.client_disk,
        "connected": asked.connected,
        "light": asked.light,
        **measured,
        "seed": asked.seed,
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "memory_bytes": machine.memory_bytes},
        "load": load,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("hierfl", "grpcio", "numba", "numpy", "pyarrow", "ray")},
        },
    }


async def _beside_limit(asked: Asked, federation: Federation, partial_bytes: int | None = None) -> tuple[float, ...]:
    """Seconds that the bytes alone take; ``partial_bytes`` as a region's sum has been seen to have."""
    shape = _shape(asked, federation)
    with wire_limit.running(replace(shape, partial_bytes=partial_bytes or shape.partial_bytes)) as limit:
        await asyncio.to_thread(limit.round_s)  # the first touches pages
        seconds = [await asyncio.to_thread(limit.round_s) for _ in range(LIMIT_ROUNDS)]
    say(f"limit: {statistics.median(seconds):.3f} s")
    return tuple(seconds)


def _limit_figures(limits: Sequence[float], round_s: float) -> dict[str, Any]:
    limit_s = round(statistics.median(limits), 4)
    return {
        "limit_s": limit_s,
        "limit_all": [round(seconds, 4) for seconds in limits],
        "ratio": round(round_s / limit_s, 3),
    }


def _federation(asked: Asked) -> FederationConfig:
    """A process a client; or, virtual, a few processes with many. Clients with the same options share one."""
    regions = []
    for region, clients in zip(asked.region_names, asked.per_region, strict=True):
        processes = asked.processes(clients)
        sites = [
            SiteConfig(
                name=SiteId(f"{region}-{process:02d}-{number:02d}"),
                app=str(APP),
                clients=count,
                options={"process": str(process)},
            )
            for process in range(processes)
            for number, count in enumerate(_sites(len(range(process, clients, processes))))
        ]
        k = max(2, min(3, clients))
        regions.append(
            RegionConfig(name=region, sites=tuple(sites), intakes=asked.intakes, k=min(k, len(sites)), max_share=1.0)
        )
    return FederationConfig(name="bench", regions=tuple(regions))


def _sites(clients: int) -> list[int]:
    """Clients of each site of one process."""
    sites = min(clients, SITES_PER_PROCESS)
    return [len(range(number, clients, sites)) for number in range(sites)]


def _shape(asked: Asked, federation: Federation) -> wire_limit.Shape:
    model_bytes = 4 * asked.params
    kits = federation.state / "kits"
    return wire_limit.Shape(
        clients=asked.per_region,
        client_processes=max(map(asked.processes, asked.per_region)),
        model_bytes=model_bytes,
        update_bytes=_update_bytes(asked),
        partial_bytes=model_bytes,
        kits=kits,
        regions=tuple(asked.region_names),
        client_kits=tuple(kits / "sites" / region / f"{region}-00-00" / "client-00" for region in asked.region_names),
    )


def _update_bytes(asked: Asked) -> int:
    """Of one update as it is encoded: the model is one vector of values that are trained."""
    train = ColumnGroup(
        name="train", kind=GroupKind.FIXED, s=32, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=asked.params
    )
    return encodings.length_bytes(encodings.get(asked.encoding), (train,))


async def _rounds(asked: Asked, federation: Federation) -> dict[str, Any]:
    """Train, and what it took: the first round apart."""
    app = load_app(str(APP))
    free = {"params": asked.params, "seed": asked.seed}
    layout, vectors = await asyncio.to_thread(make_layout, app.init(free))
    async with connect(Kit.load(federation.operator_kit), federation.controller_address) as operator:
        await _until_connected(operator, asked.clients)
        model = await operator.upload_model(layout, vectors)
        with Watch(federation.fleet) as watch:
            run = await operator.submit(_job(asked, free), model)
            cpu_before = cpu_after = watch.cpu_s()
            async for snapshot in operator.follow(run):
                if not snapshot.HasField("committed"):
                    continue
                number = snapshot.committed.round
                say(f"round {number}: {snapshot.committed.seconds:.3f} s")
                if number == 1:
                    cpu_before = watch.cpu_s()
                if number == asked.rounds + 1:
                    cpu_after = watch.cpu_s()
        outcome, status = await operator.run(run), await _settled(operator)
    if outcome.summary.state != "finished":
        raise RuntimeError(f"the run ended as {outcome.summary.state}: {outcome.summary.reason}")
    cpu_s = {part: round((cpu_after[part] - cpu_before[part]) / asked.rounds, 3) for part in PARTS}
    return _figures(asked, outcome, status) | {
        "cpu_s": round(sum(cpu_s.values()), 3),
        "cpu_s_by_part": cpu_s,
        "peak_rss_mib": watch.peak_mib(),
        "model_hash": outcome.summary.model_hash,
    }


async def _until_connected(operator: Any, clients: int) -> None:
    """Wait until every client is connected: the first round starts with all of them."""
    while True:
        status = await operator.status()
        connected = sum(region.clients_connected for region in status.regions)
        if connected == clients:
            return
        say(f"{connected} of {clients} clients are connected")
        await asyncio.sleep(0.5)


async def _settled(operator: Any) -> Any:
    """The status once it says all that was moved: regions report it with their heartbeat."""
    status = await operator.status()
    while True:
        await asyncio.sleep(3 * REPORT_S)
        newer = await operator.status()
        if _moved(newer) == _moved(status):
            return newer
        status = newer


def _moved(status: Any) -> list[tuple[int, int]]:
    return [(region.bytes_from_sites, region.bytes_to_sites) for region in status.regions]


def _job(asked: Asked, free: dict[str, int]) -> Job:
    return Job(
        job=JobHead(name="bench", app="bench-round", rounds=asked.rounds + 1, seed=asked.seed),
        round=RoundRules(
            min_regions=asked.regions,
            min_clients=min(asked.per_region),
            report_timeout_s=3600,
            silence_s=3.0,
            evaluate_every=0,
        ),
        arithmetic=Arithmetic(k=max(2, min(3, *asked.per_region))),
        updates=UpdateChoice(encoding=asked.encoding),
        app=free,
    )


def _figures(asked: Asked, outcome: Any, status: Any) -> dict[str, Any]:
    """Bytes are means over all rounds, the first included."""
    seconds = [float(one.seconds) for one in outcome.rounds]
    partials = sum(share.bytes_out for one in outcome.rounds for share in one.regions)
    up, down = (sum(moved) for moved in zip(*_moved(status), strict=True))
    rounds = len(seconds)
    return {
        "round_s": {"median": round(statistics.median(seconds[1:]), 4), "all": [round(one, 4) for one in seconds[1:]]},
        "first_round_s": round(seconds[0], 4),
        "bytes": {
            "client_up": up // rounds,
            "client_down": down // rounds,
            "border_up": partials // rounds,
            "border_down": down * asked.regions // (asked.clients * rounds),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
