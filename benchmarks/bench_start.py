"""What it costs to start: ``hierfl --help`` and a client's imports, beside a Python that does nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.harness import Figure, alternate

__all__ = ["measure"]

NOTHING = "`python -c pass`"
HELP = "`hierfl --help`"
IMPORT = "`import hierfl.client`"
NAMES = "`from hierfl.client import *`"
"""The package imports a name's home when the name is first asked for: this asks for all of them."""

HELP_LIMIT_S, HELP_GOAL_S = 0.3, 0.15


def measure(seed: int, repeats: int = 10) -> tuple[Figure, ...]:
    """Medians over ``repeats`` processes each; ``seed`` is that of Python's hashes."""
    commands = {
        NOTHING: (sys.executable, "-c", "pass"),
        HELP: (str(Path(sys.executable).with_name("hierfl")), "--help"),
        IMPORT: (sys.executable, "-c", "import hierfl.client"),
        NAMES: (sys.executable, "-c", "from hierfl.client import *"),
    }
    taken = alternate(repeats, {name: partial(process_seconds, command, seed) for name, command in commands.items()})
    figure = partial(Figure, beside=NOTHING, beside_cpu_s=taken[NOTHING])
    return (
        figure(name=HELP, cpu_s=taken[HELP], limit_s=HELP_LIMIT_S, goal_s=HELP_GOAL_S),
        figure(name=IMPORT, cpu_s=taken[IMPORT]),
        figure(name=NAMES, cpu_s=taken[NAMES]),
    )


def process_seconds(command: tuple[str, ...], seed: int) -> float:
    """CPU seconds of one process, user and system, from its start to its end.

    Raises:
        RuntimeError: It failed: the time of a failure says nothing.
    """
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime
