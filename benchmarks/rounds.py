"""The rounds that hierfl is held to: what is run, and the most that it may take. ``python -m benchmarks rounds``.

A target is a ratio within one run (against the limit, or against another of these rounds), or seconds where nothing
is moved. A result above its target stays above it in the table.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import harness
from benchmarks.bench_round import Asked, measure, say

__all__ = ["FOLDER", "ROUNDS", "Target", "measure_all", "table"]

FOLDER = harness.RESULTS / "rounds"
LARGE = 25_000_000
"""float32 values of a model of 100 MB."""

Result = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One round, and what its median is held against."""

    asked: Asked
    words: str
    most: float
    """Largest ratio, or seconds where ``against`` is empty."""
    against: str = "limit"
    """``"limit"``, another round's name, or nothing."""

    def reached(self, results: Mapping[str, Result], name: str) -> float | None:
        """The figure that ``most`` bounds; None while what it is held against was not run."""
        seconds = float(results[name]["round_s"]["median"])
        if not self.against:
            return seconds
        if self.against == "limit":
            return seconds / float(results[name]["limit_s"])
        other = results.get(self.against)
        return None if other is None else seconds / float(other["round_s"]["median"])

    def figure(self, reached: float) -> str:
        """For the table: a ratio, or milliseconds."""
        return f"{reached:.2f}" if self.against else f"{1000 * reached:.0f} ms"


ROUNDS: Mapping[str, Target] = {
    "4x100MB": Target(asked=Asked(clients=4, params=LARGE), words="4 clients, 100 MB", most=1.8),
    "16x100MB": Target(asked=Asked(clients=16, params=LARGE, rounds=5), words="16 clients, 100 MB", most=1.5),
    "15x100MB": Target(
        asked=Asked(clients=15, params=LARGE, rounds=5), words="15 clients, 100 MB, one region", most=1.5
    ),
    "3x5x100MB": Target(
        asked=Asked(clients=15, params=LARGE, regions=3, rounds=5),
        words="15 clients, 100 MB, three regions",
        most=1.35,
        against="15x100MB",
    ),
    "16x100MB-int8": Target(
        asked=Asked(clients=16, params=LARGE, rounds=5, encoding="int8"),
        words="16 clients, 100 MB, int8 updates",
        most=0.8,
        against="16x100MB",
    ),
    "empty-16": Target(
        asked=Asked(clients=16, params=1000, virtual=True, rounds=30), words="16 virtual", most=0.05, against=""
    ),
    "empty-128": Target(
        asked=Asked(clients=128, params=1000, virtual=True, rounds=15), words="128 virtual", most=0.25, against=""
    ),
    "empty-1000": Target(
        asked=Asked(clients=1000, params=1000, virtual=True, rounds=7), words="1,000 virtual", most=1.5, against=""
    ),
    "empty-16-processes": Target(
        asked=Asked(clients=16, params=1000, rounds=30), words="16 processes", most=0.08, against=""
    ),
}


def measure_all(names: list[str]) -> None:
    """Run these rounds, or all, and write a result file each."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names or list(ROUNDS):
        say(f"--- {name}")
        with tempfile.TemporaryDirectory(prefix="hierfl-bench-") as folder:
            result = asyncio.run(measure(ROUNDS[name].asked, Path(folder)))
        (FOLDER / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")


def table() -> str:
    """The results as Markdown, in the order of ``ROUNDS``."""
    found = {name: FOLDER / f"{name}.json" for name in ROUNDS}
    results = {name: msgspec.json.decode(path.read_bytes()) for name, path in found.items() if path.exists()}
    head = "| a round of | median | the bytes alone | held against | ratio | target | CPU | private MiB |"
    rows = [head, "| --- | ---: | ---: | --- | ---: | ---: | ---: | --- |", *(_row(name, results) for name in results)]
    captions = sorted({_caption(result) for result in results.values()})
    return "\n".join([*rows, "", MEMORY_WORDS, *(f"- rounds: {caption}" for caption in captions)])


MEMORY_WORDS = (
    "A round goes from offering the plan to the durable commit. Private memory: the most of an intake, the Region, the"
    " controller, a client process."
)


def _caption(result: Result) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB; {versions};"
        f" seed {result['seed']}"
    )


def _row(name: str, results: Mapping[str, Result]) -> str:
    target, result = ROUNDS[name], results[name]
    reached = target.reached(results, name)
    memory = ", ".join(f"{result['peak_rss_mib'][part]:.0f}" for part in ("intake", "region", "controller", "client"))
    against = "the bytes alone" if target.against == "limit" else ""
    if target.against in ROUNDS:
        against = ROUNDS[target.against].words
    words = [
        target.words if target.against else f"nothing, {target.words} clients",
        f"{result['round_s']['median']:.3f} s",
        f"{result['limit_s']:.3f} s",
        against,
        "" if reached is None else target.figure(reached),
        target.figure(target.most),
        f"{result['cpu_s']:.2f} s",
        memory,
    ]
    return f"| {' | '.join(words)} |"
