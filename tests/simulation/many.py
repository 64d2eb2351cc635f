"""Many histories, one after the other: a module of its own, which other processes can import."""

from __future__ import annotations

import gc
import sys

from tests.simulation.history import History, run_history

__all__ = ["run_many"]

COLLECT_EVERY = 25
"""Histories between two collections of garbage: each leaves some cycles."""


def run_many(seeds: range) -> list[History]:
    """These histories, one after the other."""
    gc.collect()
    gc.freeze()
    gc.disable()
    histories = []
    for number, seed in enumerate(seeds, 1):
        history = run_history(seed)
        histories.append(history)
        for problem in history.problems:
            print(f"seed {seed}: {problem}", file=sys.stderr, flush=True)
        if number % COLLECT_EVERY == 0:
            gc.collect()
    gc.enable()
    return histories
