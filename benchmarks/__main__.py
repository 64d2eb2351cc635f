"""``python -m benchmarks`` runs the small benches and prints the tables; ``table`` only prints what the last runs gave.

``rounds`` runs whole rounds through real processes (``benchmarks/rounds.py``), all or those named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import bench_fold, bench_peers, bench_start, bench_wan, harness, rounds
from hierfl import documents

BENCHES: Mapping[str, Callable[[int], tuple[harness.Figure, ...]]] = {
    "start": bench_start.measure,
    "fold": bench_fold.measure,
}
"""In the order of the table."""
ALONE = ("rounds", "scale", "peers", "wan", "simulation")
"""Results of benches that are run by themselves: no CPU times, and tables of their own."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    table = commands.add_parser("table", help="print the table that the result files make")
    table.add_argument("--write", metavar="FILE.md", type=Path, help="put it between the file's markers instead")
    whole = commands.add_parser("rounds", help="run whole rounds, which takes a quarter of an hour")
    whole.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(rounds.ROUNDS)}; default: all")
    asked = parser.parse_args()
    if asked.command == "rounds":
        unknown = sorted(set(asked.names) - rounds.ROUNDS.keys())
        if unknown:
            parser.error(f"there is no round {unknown[0]}; there are {', '.join(rounds.ROUNDS)}")
        rounds.measure_all(asked.names)
        print(rounds.table())
        return 0
    return show(asked.write) if asked.command == "table" else run_all()


def run_all() -> int:
    """Run every bench, write the result files; 1 if a figure is above its limit."""
    for name, measure in BENCHES.items():
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        harness.write_result(name, measure)
    results = harness.read_results(harness.RESULTS, BENCHES)
    print(harness.table(results))
    above = [figure for result in results.values() for figure in result.figures if not figure.is_within_limit]
    for figure in above:
        print(f"{figure.name} took {figure.cpu_s:g} s, its limit is {figure.limit_s:g} s", file=sys.stderr)
    return 1 if above else 0


def tables() -> str:
    """What all result files make: whole rounds, links, peers, then what is done to every value."""
    peers = documents.decode((harness.RESULTS / "peers.json").read_bytes(), bench_peers.PeersResult, "peers.json")
    wan = documents.decode((harness.RESULTS / "wan.json").read_bytes(), bench_wan.WanResult, "wan.json")
    parts = (
        rounds.table(),
        "A round over links between regions (`benchmarks/bench_wan.py`):",
        bench_wan.table(wan),
        "Peers, each as its users run it on one machine, ours with mutual TLS (`benchmarks/bench_peers.py`):",
        bench_peers.table(peers),
        harness.table(harness.read_results(harness.RESULTS, BENCHES)),
    )
    return "\n\n".join(parts)


def show(target: Path | None) -> int:
    """Print the table, or put it into ``target``."""
    made = tables()
    if target is None:
        print(made)
        return 0
    try:
        target.write_text(harness.replace_table(target.read_text(encoding="utf-8"), made), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"{target}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
