"""What every bench shares: CPU time beside a yardstick, result files, and the table that they make.

A figure is CPU time, not wall time: other programs on the machine stretch it least. It never stands alone: the
yardstick beside it was measured in the same run, in turns with it, so that their ratio outlives the machine.
A result names the processor, never the host or a path.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec
import psutil

from hierfl import documents

__all__ = [
    "RESULTS",
    "SEED",
    "Figure",
    "Machine",
    "Result",
    "alternate",
    "cpu_seconds",
    "here",
    "read_results",
    "replace_table",
    "table",
    "versions",
    "write_document",
    "write_result",
]

RESULTS = Path(__file__).parent / "results"
SEED = 20_261_123
MARKERS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
"""Lines of a Markdown file between which the table stands."""

PACKAGES = ("numpy", "numba", "hierfl")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the figures depend on most."""

    cpu: str
    cores: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measurement: the median of several, in seconds of CPU."""

    name: str
    cpu_s: float
    beside: str
    """The yardstick's name, ..."""
    beside_cpu_s: float
    """... and its own median, from the same run."""
    limit_s: float | None = None
    goal_s: float | None = None

    @property
    def ratio(self) -> float:
        """How many times the yardstick."""
        return self.cpu_s / self.beside_cpu_s

    @property
    def is_within_limit(self) -> bool:
        return self.limit_s is None or self.cpu_s <= self.limit_s


@dataclass(frozen=True, kw_only=True)
class Result:
    """One bench's file in ``results/``."""

    schema: str
    machine: Machine
    load: float
    """Processes that wanted a core in the minute before the bench, the shell's included."""
    versions: Mapping[str, str]
    seed: int
    figures: tuple[Figure, ...]


def cpu_seconds(action: Callable[[], object]) -> float:
    """CPU seconds that ``action`` takes, on all threads; what it returns is freed after the clock stops."""
    start = time.process_time()
    made = action()
    stop = time.process_time()
    del made
    return stop - start


def alternate(repeats: int, timings: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Take each timing once to warm up, then all of them in turns; returns their medians by name, in seconds."""
    for timing in timings.values():
        timing()
    taken: dict[str, list[float]] = {name: [] for name in timings}
    for _ in range(repeats):
        for name, timing in timings.items():
            taken[name].append(timing())
    return {name: round(statistics.median(values), 6) for name, values in taken.items()}


def here() -> Machine:
    """This machine."""
    return Machine(cpu=_cpu_model(), cores=os.cpu_count() or 1, memory_bytes=psutil.virtual_memory().total)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def write_result(name: str, measure: Callable[[int], tuple[Figure, ...]]) -> Result:
    """Run one bench and write its file."""
    load = round(psutil.getloadavg()[0], 2)
    result = Result(
        schema=f"hierfl.bench_{name}/1",
        machine=here(),
        load=load,
        versions=versions(),
        seed=SEED,
        figures=measure(SEED),
    )
    write_document(RESULTS / f"{name}.json", result)
    return result


def versions(*others: str) -> dict[str, str]:
    """Of Python, of the packages that every figure depends on, and of ``others``."""
    return {"python": platform.python_version(), **{package: version(package) for package in (*PACKAGES, *others)}}


def write_document(path: Path, result: object) -> None:
    """Write a result file, for people to read too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(documents.encode(result), indent=2) + b"\n")


def read_results(directory: Path, names: Iterable[str]) -> dict[str, Result]:
    """The result files that are there, by bench, in the order of ``names``.

    Raises:
        WireError: A file is no result.
        ValueError: A file is another bench's.
    """
    found: dict[str, Result] = {}
    for name in names:
        path = directory / f"{name}.json"
        if path.exists():
            result = documents.decode(path.read_bytes(), Result, path.name)
            if result.schema != f"hierfl.bench_{name}/1":
                raise ValueError(f"{path.name} has schema {result.schema}")
            found[name] = result
    return found


def table(results: Mapping[str, Result]) -> str:
    """The results as Markdown: one row a figure, and below them where and with what each bench ran."""
    rows = [
        "| CPU time, median | measured | beside it, in the same run | ratio | limit |",
        "| --- | ---: | --- | ---: | --- |",
        *(_row(figure) for result in results.values() for figure in result.figures),
    ]
    captions = [f"- `{name}`: {_caption(result)}" for name, result in results.items()]
    return "\n".join([*rows, "", *captions])


def _row(figure: Figure) -> str:
    limit = "" if figure.limit_s is None else _duration(figure.limit_s)
    goal = "" if figure.goal_s is None else f" (goal {_duration(figure.goal_s)})"
    beside = f"{figure.beside}: {_duration(figure.beside_cpu_s)}"
    return f"| {figure.name} | {_duration(figure.cpu_s)} | {beside} | {figure.ratio:.2f} | {limit}{goal} |"


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"


def _caption(result: Result) -> str:
    machine = result.machine
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    return (
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, load {result.load:g} before it;"
        f" {versions}; seed {result.seed}"
    )


def replace_table(text: str, made: str) -> str:
    """``text`` with ``made`` between the markers, each on a line of its own.

    Raises:
        ValueError: The markers are not there once each, in their order.
    """
    start, stop = MARKERS
    before, found_start, rest = text.partition(f"{start}\n")
    _, found_stop, after = rest.partition(stop)
    if not (found_start and found_stop) or start in after or stop in after:
        raise ValueError(f"no place for the table: {start} and {stop} must each stand there once, on their own lines")
    return f"{before}{start}\n{made}\n{stop}{after}"
