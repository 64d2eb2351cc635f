"""What a round costs at any size: constants from measured rounds, a simulation of this machine, SCALE.md from both.

Some measured rounds calibrate the cost constants; the simulation then predicts the others, which it has not seen, and
the document says how far off it is. Which rounds do what is written down beforehand (``CALIBRATE``, ``PREDICT``).
Rounds are read from ``results/`` (those of ``python -m benchmarks rounds`` among them) and from the folders that are
given: every result of ``bench_round`` there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):  # run as a file, as in the examples
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from benchmarks.scale.constants import Constants, Run, Size, fit, nonnegative_least_squares, read_run
from benchmarks.scale.result import SCHEMA, Prediction, ScaleResult
from benchmarks.scale.round import simulate
from benchmarks.scale.text import document
from hierfl import documents

__all__ = ["CALIBRATE", "PREDICT", "calibrate", "make", "predict", "read_runs"]

RESULT = harness.RESULTS / "simulation.json"
PAGE = Path(__file__).with_name("SCALE.md")
ROUND_BENCH = Path(__file__).with_name("bench_round.py")

SMALL = 1_000
"""Values of a model whose bytes cost nothing."""

CALIBRATE: tuple[Size, ...] = (
    Size(clients=4, params=SMALL),
    Size(clients=16, params=SMALL),
    Size(clients=32, params=SMALL, virtual=True),
    Size(clients=500, params=SMALL, virtual=True),
    Size(clients=6, params=SMALL, regions=3),
    Size(clients=4, params=2_500_000),
    Size(clients=6, params=2_500_000, regions=3),
    Size(clients=4, params=25_000_000),
)
PREDICT: tuple[Size, ...] = (
    Size(clients=16, params=SMALL, virtual=True),
    Size(clients=128, params=SMALL, virtual=True),
    Size(clients=300, params=SMALL, regions=3, virtual=True),
    Size(clients=1_000, params=SMALL, virtual=True),
    Size(clients=16, params=2_500_000),
    Size(clients=12, params=2_500_000, regions=3),
    Size(clients=16, params=25_000_000),
    Size(clients=15, params=25_000_000),
    Size(clients=15, params=25_000_000, regions=3),
)

EXAMPLES = """\
examples:
  python benchmarks/simulate_scale.py --measure           run the rounds that are missing, then make SCALE.md
  python benchmarks/simulate_scale.py --from DIR          from the results of bench_round in DIR
  python benchmarks/simulate_scale.py --page-only         SCALE.md from the result file as it is
  python benchmarks/simulate_scale.py --check             fail where a prediction is off by more than 25 %
"""


def calibrate(runs: Sequence[Run], cores: int) -> Constants:
    """Constants from these runs: CPU terms first, then the slowdown and the waits that bring the simulation to them.

    Raises:
        ValueError: Too few runs.
    """
    constants = fit(runs)
    simulated = np.array([simulate(run.size, constants, cores)[0] for run in runs])
    measured = np.array([run.round_s for run in runs])
    waits = np.array([[1.0, run.size.model_mb] for run in runs])
    whole = np.column_stack([simulated, waits]) / measured[:, None]
    slowdown, *wait_s = nonnegative_least_squares(whole, np.ones(len(runs)))
    if slowdown < 1:  # work cannot be faster than itself
        slowdown = 1.0
        wait_s = nonnegative_least_squares(waits / measured[:, None], 1 - simulated / measured)
    slowdown, fixed_s, mb_s = (round(float(value), 5) for value in (slowdown, *wait_s))
    return replace(constants, slowdown=slowdown, wait_s=fixed_s, wait_s_mb=mb_s)


def predict(run: Run, constants: Constants, cores: int) -> Prediction:
    """One run, simulated."""
    seconds, cpu_s = simulate(run.size, constants, cores)
    return Prediction(
        size=run.size,
        calibrates=run.size in CALIBRATE,
        measured_s=run.round_s,
        predicted_s=round(seconds, 4),
        measured_cpu_s=round(sum(run.cpu_s.values()), 3),
        predicted_cpu_s=round(cpu_s, 3),
        load=run.load,
    )


def make(runs: Mapping[Size, Run]) -> ScaleResult:
    """The result, from the measured rounds that are there.

    Raises:
        ValueError: Too few of those that calibrate.
    """
    cores = os.cpu_count() or 1
    known = [runs[size] for size in (*CALIBRATE, *PREDICT) if size in runs]
    for size in (*CALIBRATE, *PREDICT):
        if size not in runs:
            say(f"not measured: {size}")
    constants = calibrate([run for run in known if run.size in CALIBRATE], cores)
    largest = max(known, key=lambda run: run.size.params)
    return ScaleResult(
        schema=SCHEMA,
        machine=harness.here(),
        load=statistics.median(run.load for run in known),
        versions=harness.versions("grpcio", "ray", "simpy"),
        seed=harness.SEED,
        constants=constants,
        partial_ratio=round(largest.bytes["border_up"] / (largest.size.regions * 4 * largest.size.params), 4),
        kib_a_client=kib_a_client(known),
        predictions=tuple(predict(run, constants, cores) for run in known),
    )


def kib_a_client(runs: Sequence[Run]) -> float | None:
    """From the fewest and the most virtual clients of one region that moved the same small model."""
    alike = [run for run in runs if run.size.virtual and run.size.regions == 1 and run.intake_mib]
    alike = sorted((run for run in alike if run.size.params == SMALL), key=lambda run: run.size.clients)
    if len(alike) < 2 or alike[0].size.clients == alike[-1].size.clients:
        return None
    few, many = alike[0], alike[-1]
    return round(1024 * (many.intake_mib - few.intake_mib) / (many.size.clients - few.size.clients), 1)


# ---------------------------------------------------------------- measured rounds


def read_runs(folders: Iterable[Path]) -> dict[Size, Run]:
    """Every usable result of ``bench_round``; of several of one size the one that was measured under the least load."""
    found: dict[Size, Run] = {}
    for path in sorted(path for folder in folders for path in folder.rglob("*.json")):
        for one in _documents(path):
            run = read_run(one)
            if run is not None and (run.size not in found or run.load < found[run.size].load):
                found[run.size] = run
    return found


def _documents(path: Path) -> list[dict[str, Any]]:
    """A file holds one result, or a list of them as ``points`` (``bench_scale``)."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []
    if not isinstance(whole, dict):
        return []
    return [one for one in (whole, *whole.get("points", ())) if isinstance(one, dict)]


def measure(runs: Mapping[Size, Run], folder: Path, most_mb: float) -> None:
    """Run ``bench_round`` for what is missing, one after the other, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for size in (*CALIBRATE, *PREDICT):
        if size in runs or size.clients * size.model_mb > most_mb:
            continue
        say(f"measuring {size}")
        kind = "-virtual" if size.virtual else ""
        file = folder / f"{size.clients}x{size.params}-{size.regions}{kind}.json"
        options = ["--clients", size.clients, "--params", size.params, "--regions", size.regions, "--json", file]
        options += ["--no-limit", *(["--virtual"] if size.virtual else [])]
        process = subprocess.Popen([sys.executable, str(ROUND_BENCH), *map(str, options)], stdout=subprocess.DEVNULL)
        try:
            if process.wait():
                say(f"bench_round failed on {size}")
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # it stops what it started
            process.wait()
            raise


# ---------------------------------------------------------------- the command


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--from", dest="folders", type=Path, action="append", metavar="DIR", help="look here too for results")
    option("--measure", type=Path, metavar="DIR", nargs="?", const=harness.RESULTS.parent / ".rounds",
           help="run the missing rounds, results into DIR (default benchmarks/.rounds)")  # fmt: skip
    option("--most-mb", type=float, default=2000.0, metavar="MB", help="largest round to run, clients x model")
    option("--json", type=Path, default=RESULT, metavar="FILE", help="where the result goes")
    option("--page", type=Path, default=PAGE, metavar="FILE.md", help="where the document goes")
    option("--page-only", action="store_true", help="only make the document, from the result file as it is")
    option("--check", action="store_true", help="exit 1 where a prediction is off by more than 25 %%")
    return parser


def main() -> int:
    asked = _parser().parse_args()
    if asked.page_only:
        result = read_result(asked.json)
    else:
        folders = [harness.RESULTS, *(asked.folders or ())]
        folders += [asked.measure] if asked.measure else []
        if asked.measure:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            measure(read_runs(folders), asked.measure, asked.most_mb)
        try:
            result = make(read_runs(folders))
        except ValueError as error:
            say(f"{error}; `--measure` runs them")
            return 1
        harness.write_document(asked.json, result)
    asked.page.write_text(document(result), encoding="utf-8")
    off = [one for one in result.predictions if not (one.calibrates or one.is_within_goal)]
    for one in result.predictions:
        kind = "calibrates" if one.calibrates else "predicted"
        times = f"measured {one.measured_s:.3f} s, simulated {one.predicted_s:.3f} s"
        say(f"{kind:>10}  {one.size}: {times}, {one.error:+.0%}")
    return 1 if asked.check and off else 0


def read_result(path: Path) -> ScaleResult:
    """A result file.

    Raises:
        WireError: It is none.
    """
    return documents.decode(path.read_bytes(), ScaleResult, path.name)


if __name__ == "__main__":
    sys.exit(main())
