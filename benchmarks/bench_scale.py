"""From ten clients to thousands with a small model: seconds a round, memory, claims a second.

    python benchmarks/bench_scale.py
    python benchmarks/bench_scale.py --clients 10 100 1000 --regions 1 --params 1000 --rounds 5

Each point is a federation of its own, as ``bench_round --virtual`` starts it. Writes ``results/scale.json`` and a
log-log plot beside it.
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

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench_scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 30, 100, 300, 1000], help="one point each")
    parser.add_argument("--regions", type=int, nargs="+", default=[1, 3], help="each point with each of these")
    parser.add_argument("--params", type=int, default=1_000, help="float32 values of the model (default 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="counted ones of each point (default 5)")
    parser.add_argument("--json", type=Path, default=harness.RESULTS / "scale.json", metavar="FILE")
    given = parser.parse_args(arguments)
    points = []
    for regions in given.regions:
        for clients in given.clients:
            if clients < 3 * regions:
                continue
            bench_round.say(f"--- {clients} clients in {regions} region(s)")
            asked = bench_round.Asked(
                clients=clients, params=given.params, regions=regions, rounds=given.rounds, virtual=True
            )
            points.append(_point(asked))
            _write(given.json, points)
    _plot(points, given.json.with_suffix(".png"))
    return 0


def _point(asked: bench_round.Asked) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hierfl-bench-") as folder:
        result = asyncio.run(bench_round.measure(asked, Path(folder)))
    seconds = result["round_s"]["median"]
    return {**result, "claims_per_s": round(asked.clients / seconds, 1)}


def _write(path: Path, points: list[dict[str, Any]]) -> None:
    document = {"schema": "hierfl.bench_scale/1", "points": points}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")


def _plot(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for regions in sorted({point["regions"] for point in points}):
        of = [point for point in points if point["regions"] == regions]
        clients, name = [point["clients"] for point in of], f"{regions} region" + ("s" if regions > 1 else "")
        time_axes.loglog(clients, [point["round_s"]["median"] for point in of], "o-", label=name)
        memory_axes.loglog(clients, [point["peak_rss_mib"]["intake"] for point in of], "o-", label=name)
    for axes, title in ((time_axes, "seconds a round, median"), (memory_axes, "private memory of an intake, MiB")):
        axes.set(xlabel="clients", title=title)
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
    bench_round.say(f"plot: {path}")


if __name__ == "__main__":
    sys.exit(main())
