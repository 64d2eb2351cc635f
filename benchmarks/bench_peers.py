"""The same round for other frameworks, each in an environment of its own that this script makes.

Every client gets a float32 model, adds seeded noise that was drawn before, and sends it back; the server averages.
Each peer runs as its users run it on one machine, with its default settings, and the result names that way. Before
and after each of them hierfl's own round runs (``bench_round``, one region, mutual TLS). What counts is the ratio; the
first round of each, where buffers and connections are made, is left out. Never part of CI: it installs from the
package index. A peer that cannot be installed or run is a sentence in the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

if __package__ in (None, ""):  # run as a file, as in the examples
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from benchmarks.peers.running import PeerFailed, Rounds, installed, run_script
from hierfl import documents

__all__ = ["PEERS", "Measured", "Ours", "Peer", "PeersResult", "Round", "measured", "table"]

SCHEMA = "hierfl.bench_peers/1"
ROUND_BENCH = Path(__file__).parent / "bench_round.py"
MIB = 2**20

EXAMPLES = """\
examples:
  python benchmarks/bench_peers.py                                        every peer, 4 clients x 10 MB
  python benchmarks/bench_peers.py --round 4x25000000 --round 16x25000000 100 MB each
  python benchmarks/bench_peers.py --peer nvflare --environments peers    keep what is installed there
"""


@dataclass(frozen=True)
class Round:
    """What moves: ``params`` float32 values to each client and back."""

    clients: int
    params: int

    @classmethod
    def parse(cls, text: str) -> Round:
        """Read ``CLIENTSxPARAMS``, such as ``4x2500000``. ``ValueError`` says what it must be."""
        clients, _, params = text.replace("_", "").partition("x")
        if not (clients.isdecimal() and params.isdecimal() and int(clients) and int(params)):
            raise ValueError(f"{text!r} must be CLIENTSxPARAMS, such as 4x2500000")
        return cls(int(clients), int(params))

    def __str__(self) -> str:
        return f"{self.clients} clients x {4 * self.params / 1e6:g} MB"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way of running another framework."""

    package: str
    mode: str
    """Simulator or deployed, what its processes are, how bytes travel."""
    requirements: tuple[str, ...] = ()
    """For its environment, by name."""
    script: str = ""
    """In ``benchmarks/peers/``; empty where it is not run, for the reason ..."""
    why_not: str = ""
    tls: bool = False
    env: Mapping[str, str] | None = None


FLWR = partial(
    Peer,
    package="flwr",
    requirements=("flwr[simulation]", "numpy"),
    env={"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"},
)
PEERS: Mapping[str, Peer] = {
    "nvflare": Peer(
        package="nvflare",
        requirements=("nvflare", "numpy"),
        script="nvflare_round.py",
        mode="simulator: a server process and a process a client, messages over local TCP",
    ),
    "flwr": FLWR(
        script="flwr_deployed.py",
        mode="deployed: a SuperLink and a SuperNode a client as processes, HTTP on loopback, apps in subprocesses",
    ),
    "flwr-simulation": FLWR(
        script="flwr_round.py",
        mode="simulator: no network; clients are tasks of a local Ray, arrays pass through its shared memory",
    ),
    "fedn": Peer(
        package="fedn",
        mode="deployed",
        why_not="it has no simulator, and a deployed round needs an S3 store, which pip does not install",
    ),
}
"""By name, in the order of the result."""


@dataclass(frozen=True, kw_only=True)
class Ours:
    """hierfl's round beside a peer's, from ``bench_round``: of the runs before and after it."""

    round_s: float
    runs_s: tuple[float, ...]
    peak_mib: float
    """Private pages of the intake."""
    mode: str = "deployed: controller, combiner, intake and clients as processes, mutual TLS 1.3"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One peer in one round, or why there is no figure."""

    peer: str
    clients: int
    params: int
    mode: str
    tls: bool
    version: str = ""
    failed: str = ""
    """Why it was not installed or run; then there are no figures."""
    round_s: float | None = None
    """Median, without the first round."""
    rounds_s: tuple[float, ...] = ()
    """All of them, the first round first."""
    peak_mib: float | None = None
    """Private pages, most at once, of the process that receives updates."""
    ours: Ours | None = None
    """None where hierfl's round did not run; then there are no ratios."""
    time_ratio: float | None = None
    """Their seconds a round / ours."""
    memory_ratio: float | None = None
    """Their peak / our intake's."""


@dataclass(frozen=True, kw_only=True)
class PeersResult:
    """``results/peers.json``."""

    schema: str
    machine: harness.Machine
    load: float
    versions: Mapping[str, str]
    seed: int
    measured: tuple[Measured, ...]


def measured(name: str, moved: Round, version: str, theirs: Rounds | str, ours: Sequence[Ours]) -> Measured:
    """A row of the result. ``theirs``: its rounds, or why there are none; ``ours``: the runs around it."""
    peer = PEERS[name]
    row = partial(
        Measured,
        peer=name,
        clients=moved.clients,
        params=moved.params,
        mode=peer.mode,
        tls=peer.tls,
        version=version,
    )
    if isinstance(theirs, str):
        return row(failed=theirs)
    peak_mib = theirs.peak_bytes / MIB
    both = _both(ours)
    return row(
        round_s=round(theirs.median_s, 4),
        rounds_s=theirs.seconds,
        peak_mib=round(peak_mib, 1),
        ours=both,
        time_ratio=None if both is None else round(theirs.median_s / both.round_s, 2),
        memory_ratio=None if both is None else round(peak_mib / both.peak_mib, 2),
    )


def _both(ours: Sequence[Ours]) -> Ours | None:
    if not ours:
        return None
    seconds = tuple(run.round_s for run in ours)
    return Ours(
        round_s=round(statistics.median(seconds), 4), runs_s=seconds, peak_mib=max(run.peak_mib for run in ours)
    )


def measure(
    names: Sequence[str],
    rounds: Sequence[Round],
    times: int,
    environments: Path,
    timeout_s: float,
    earlier: Sequence[Measured] = (),
) -> Iterator[PeersResult]:
    """Every peer in every round; those that fail say so and stop nobody. The result so far after each of them.

    Args:
        earlier: Rows to begin with; one of the same peer and size is replaced.
    """
    load, rows = round(psutil.getloadavg()[0], 2), list(earlier)
    for moved in rounds:
        for row in _one_size(names, moved, times, environments, timeout_s):
            rows = [one for one in rows if _which(one) != _which(row)] + [row]
            yield PeersResult(
                schema=SCHEMA,
                machine=harness.here(),
                load=load,
                versions=harness.versions(),
                seed=harness.SEED,
                measured=tuple(rows),
            )


def _which(row: Measured) -> tuple[str, int, int]:
    return row.peer, row.clients, row.params


def _one_size(
    names: Sequence[str], moved: Round, times: int, environments: Path, timeout_s: float
) -> Iterator[Measured]:
    before = our_round(moved, timeout_s)
    for name in names:
        peer = PEERS[name]
        version, theirs = "", peer.why_not or "it failed"
        try:
            if not peer.why_not:
                say(f"{name}: environment")
                python, version = installed(peer.package, peer.requirements, environments)
                say(f"{name} {version}: {times + 1} rounds, {moved}; {peer.mode}")
                options = {"clients": moved.clients, "params": moved.params, "rounds": times + 1, "seed": harness.SEED}
                theirs = run_script(python, peer.script, options, env=peer.env or {}, timeout_s=timeout_s)
        except PeerFailed as error:
            theirs = str(error)
        if isinstance(theirs, str):
            say(f"{name}: no figure: {theirs}")
            yield measured(name, moved, version, theirs, ())
        else:
            after = our_round(moved, timeout_s)
            row = measured(name, moved, version, theirs, [*before, *after])
            say(f"{name}: {row.round_s} s a round" + (f", {row.time_ratio} x ours" if row.ours else ""))
            yield row
            before = after


def our_round(moved: Round, timeout_s: float) -> tuple[Ours, ...]:
    """hierfl's own round; nothing where it is not there or fails, said on stderr."""
    with tempfile.TemporaryDirectory(prefix="hierfl-peers-") as folder:
        file = Path(folder) / "round.json"
        options = ("--clients", moved.clients, "--params", moved.params, "--regions", 1, "--json", file)
        say(f"hierfl: {moved}")
        try:
            command = [sys.executable, str(ROUND_BENCH), *map(str, options)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=timeout_s)
            document = json.loads(file.read_text(encoding="utf-8"))
            ours = Ours(
                round_s=document["round_s"]["median"],
                runs_s=(document["round_s"]["median"],),
                peak_mib=document["peak_rss_mib"]["intake"],
            )
        except (subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
            said = getattr(error, "stderr", None) or b""
            say(f"hierfl: bench_round gave no figure: {error} {said.decode(errors='replace')[-300:]}")
            return ()
    say(f"hierfl: {ours.round_s} s a round")
    return (ours,)


def table(result: PeersResult) -> str:
    """The result as Markdown: one row for each peer and size, ratios only."""
    rows = ["| peer | how it ran | TLS | round | seconds, theirs / ours | memory, theirs / ours |"]
    rows += ["| --- | --- | --- | --- | ---: | ---: |"]
    for row in result.measured:
        size = str(Round(row.clients, row.params))
        ratios = (_ratio(row.time_ratio), _ratio(row.memory_ratio))
        figures = f"{ratios[0]} | {ratios[1]}" if not row.failed else f"not run: {row.failed} | "
        name = f"{row.peer} {row.version}".strip()
        rows.append(f"| {name} | {row.mode} | {'yes' if row.tls else 'no'} | {size} | {figures} |")
    return "\n".join(rows)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--peer", action="append", choices=PEERS, help="only this one; may be repeated")
    option("--round", action="append", type=Round.parse, metavar="NxP", dest="rounds",
           help="clients x values; may be repeated (default 4x2500000)")  # fmt: skip
    option("--times", type=int, default=5, help="rounds that count, 3 at least (default 5)")
    option("--environments", type=Path, metavar="DIR", help="install there and keep it (default: a temporary folder)")
    option("--timeout", type=float, default=900.0, metavar="S", help="longest run of one peer (default 900)")
    option("--json", type=Path, default=harness.RESULTS / "peers.json", metavar="FILE", help="where the result goes")
    option("--add", action="store_true", help="keep the rows of other peers and sizes that are in that file")
    asked = parser.parse_args()
    if asked.times < 3:
        parser.error("--times must be 3 at least")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped either way, it stops what it started
    sizes = asked.rounds or [Round(4, 2_500_000)]
    earlier = read_result(asked.json).measured if asked.add and asked.json.exists() else ()
    try:
        with _folder(asked.environments) as environments:
            names = asked.peer or list(PEERS)
            for result in measure(names, sizes, asked.times, environments, asked.timeout, earlier):
                harness.write_document(asked.json, result)  # an interruption costs one row
    except KeyboardInterrupt:
        say("stopped; nothing is left but the rows in the file; --peer and --add go on from there")
        return 130
    print(table(read_result(asked.json)))
    return 0


def read_result(path: Path) -> PeersResult:
    """A result file. Raises ``WireError`` where it is none."""
    return documents.decode(path.read_bytes(), PeersResult, path.name)


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="hierfl-peers-") as folder:
            yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
