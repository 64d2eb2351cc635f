"""From ten clients to ten thousand: seconds a round, CPU a client, memory, claims a second.

    python benchmarks/bench_scale.py
    python benchmarks/bench_scale.py --clients 100 1000 --regions 1 --params 1000 --rounds 5
    python benchmarks/bench_scale.py --paced --clients 100 1000 10000 --json results/scale_paced.json
    python benchmarks/bench_scale.py --plot-only

Each point is a federation of its own, as ``bench_round --virtual`` starts it: clients with a certificate, a
connection, a folder and state each, many in a process. With ``--paced`` an intake takes a fifth of them at once, at
most 2,000; the others are told when to come back, and each connects anew in every round. The result is written after
each point, beside those that are in the file already: an interruption costs one point.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec

from benchmarks import bench_round, harness

__all__ = ["cpu_ms_a_client", "main", "merged", "table"]

SCHEMA = "hierfl.bench_scale/1"
CLIENTS, PACED_CLIENTS = (10, 30, 100, 300, 1_000, 2_000), (100, 1_000, 10_000)
PARAMS = 100_000
MOST_CONNECTED, PACED_SHARE = 2_000, 5
"""With ``--paced``: one of five is connected."""
MANY, FEW_ROUNDS = 3_000, 2
"""From so many clients on there are only so many rounds: a paced one takes minutes."""

Point = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench_scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", help=f"one point each (default {_words(CLIENTS)})")
    parser.add_argument("--regions", type=int, nargs="+", help="each point with each of these (default 1 3, paced 1)")
    parser.add_argument("--params", type=int, default=PARAMS, help=f"float32 values of the model (default {PARAMS})")
    parser.add_argument("--rounds", type=int, default=5, help="counted ones of each point (default 5)")
    parser.add_argument("--paced", action="store_true", help=f"a fifth connected (clients: {_words(PACED_CLIENTS)})")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default results/scale.json, results/scale_paced.json"
    )
    parser.add_argument("--plot-only", action="store_true", help="plot what is in the file")
    given = parser.parse_args(arguments)
    name = "scale_paced" if given.paced else "scale"
    path = given.json or harness.RESULTS / f"{name}.json"
    points = read(path)
    for asked in [] if given.plot_only else _asked(given):
        bench_round.say(f"--- {asked.clients} clients in {asked.regions} region(s)")
        points = merged(points, _point(asked))
        write(path, points)
        _plot(points, path.with_suffix(".png"))
    if given.plot_only:
        _plot(points, path.with_suffix(".png"))
    print(table(points))
    return 0


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _asked(given: argparse.Namespace) -> list[bench_round.Asked]:
    """What is to be measured, in order."""
    return [
        bench_round.Asked(
            clients=clients,
            params=given.params,
            regions=regions,
            rounds=min(given.rounds, FEW_ROUNDS) if clients >= MANY else given.rounds,
            virtual=True,
            connected=min(MOST_CONNECTED, max(2, clients // (regions * PACED_SHARE))) if given.paced else 0,
            with_limit=False,
        )
        for regions in given.regions or ([1] if given.paced else [1, 3])
        for clients in given.clients or (PACED_CLIENTS if given.paced else CLIENTS)
        if clients >= 3 * regions
    ]


def _point(asked: bench_round.Asked) -> Point:
    with tempfile.TemporaryDirectory(prefix="hierfl-bench-") as folder:
        result = asyncio.run(bench_round.measure(asked, Path(folder)))
    seconds = result["round_s"]["median"]
    return {
        **result,
        "claims_per_s": round(asked.clients / seconds, 1),
        "cpu_ms_a_client": cpu_ms_a_client(result),
    }


def cpu_ms_a_client(result: Point) -> float:
    """All processes' CPU time of a round, over its clients."""
    return round(1000 * float(result["cpu_s"]) / int(result["clients"]), 2)


def merged(points: Sequence[Point], new: Point) -> list[Point]:
    """``points`` with ``new`` in place of an older one of the same size, in order of regions and clients."""
    kept = [point for point in points if _size(point) != _size(new)]
    return sorted([*kept, new], key=_size)


def _size(point: Point) -> tuple[int, ...]:
    return point["params"], point["regions"], point["clients"], point["connected"]


def read(path: Path) -> list[Point]:
    """The points that are in a file; none where it is not there."""
    if not path.exists():
        return []
    document = msgspec.json.decode(path.read_bytes())
    if document["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {document['schema']}")
    return list(document["points"])


def write(path: Path, points: Sequence[Point]) -> None:
    harness.write_document(path, {"schema": SCHEMA, "points": list(points)})


def table(points: Sequence[Point]) -> str:
    """The points as Markdown."""
    rows = [
        "| clients | regions | connected at once | a round | clients a second | CPU a client | an intake's memory |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for point in points:
        connected = f"at most {point['connected']:,}" if point["connected"] else "all"
        figures = (
            f"{point['round_s']['median']:.2f} s",
            f"{point['claims_per_s']:,.0f}",
            f"{point['cpu_ms_a_client']:.1f} ms",
            f"{point['peak_rss_mib']['intake']:,.0f} MiB",
        )
        rows.append(f"| {point['clients']:,} | {point['regions']} | {connected} | {' | '.join(figures)} |")
    return "\n".join(rows)


def _plot(points: Sequence[Point], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = (
        ("seconds a round, median", lambda point: point["round_s"]["median"]),
        ("CPU of all processes, ms a client and round", lambda point: point["cpu_ms_a_client"]),
        ("private memory of an intake, MiB", lambda point: point["peak_rss_mib"]["intake"]),
    )
    figure, columns = plt.subplots(1, len(shown), figsize=(12, 4), layout="constrained")
    for axes, (title, value) in zip(columns, shown, strict=True):
        for regions in sorted({point["regions"] for point in points}):
            of = [point for point in points if point["regions"] == regions]
            name = f"{regions} region" + ("s" if regions > 1 else "")
            axes.loglog([point["clients"] for point in of], [value(point) for point in of], "o-", label=name)
        axes.set(xlabel="clients", title=title)
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    bench_round.say(f"plot: {path}")


if __name__ == "__main__":
    sys.exit(main())
