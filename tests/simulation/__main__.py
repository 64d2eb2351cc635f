"""Run many histories: ``python -m tests.simulation --seeds 1000 --start 0 --jobs 2``. Prints figures as JSON.

A seed that fails is printed with its faults and belongs into ``regressions.txt``; ``--seed N`` runs one and says more.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

from tests.simulation.history import History, run_history
from tests.simulation.many import run_many

__all__ = ["main"]


def _figures(histories: list[History], seconds: float) -> dict[str, object]:
    failed = [history for history in histories if history.problems]
    return {
        "histories": len(histories),
        "failed": [history.seed for history in failed],
        "seconds": round(seconds, 1),
        "simulated_s": round(sum(history.simulated_s for history in histories), 1),
        "steps": sum(history.steps for history in histories),
        "updates": sum(history.updates for history in histories),
        "sealed": sum(history.sealed for history in histories),
        "committed": sum(history.committed for history in histories),
        "releases": sum(history.releases for history in histories),
        "runs": Counter(state for history in histories for state in history.states),
        "faults": Counter(fault for history in histories for fault in history.faults),
    }


def main() -> int:
    """The exit status: 1 where a history failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, help="only this one, in full")
    chosen = parser.parse_args()
    if chosen.seed is not None:
        history = run_history(chosen.seed)
        print(json.dumps(asdict(history), indent=2))
        return bool(history.problems)
    began_s = time.perf_counter()
    seeds = range(chosen.start, chosen.start + chosen.seeds)
    parts = [seeds[n : n + 50] for n in range(0, len(seeds), 50)]
    if chosen.jobs > 1:
        with ProcessPoolExecutor(chosen.jobs, get_context("spawn")) as pool:
            histories = [history for part in pool.map(run_many, parts) for history in part]
    else:
        histories = [history for part in parts for history in run_many(part)]
    figures = _figures(histories, time.perf_counter() - began_s)
    print(json.dumps(figures, indent=2))
    return bool(figures["failed"])


if __name__ == "__main__":
    sys.exit(main())
