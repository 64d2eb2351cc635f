"""What processes used: CPU time, and the most private memory of each, by the part of a federation that they are.

Private memory is what a process has resident beyond pages shared with files or other processes (``statm``), looked
at every 50 ms: Ray's object store and libraries are not counted to whoever reads them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from types import TracebackType

import psutil

from hierfl.processes import find

__all__ = ["PARTS", "Watch"]

EVERY_S = 0.05
LOOK_ANEW = 40
"""Samples between two looks for new processes: finding them reads all of /proc."""
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")

PARTS = ("intake", "region", "controller", "client", "ray")


class Watch:
    """Watches all processes of a fleet (``hierfl.processes``) from a thread of its own, while its block lasts."""

    def __init__(self, fleet: str) -> None:
        self._fleet = fleet
        self._parts: dict[int, str] = {}
        self._peaks: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._find()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def peak_mib(self) -> Mapping[str, float]:
        """The most private memory, in MiB, of the largest process of each part; of Ray's processes their sum."""
        peaks = {part: [self._peaks.get(pid, 0) for pid, of in self._parts.items() if of == part] for part in PARTS}
        of = {part: (sum(found) if part == "ray" else max(found, default=0)) for part, found in peaks.items()}
        return {part: round(found / 2**20, 1) for part, found in of.items()}

    def cpu_s(self) -> dict[str, float]:
        """User and system seconds so far, by part."""
        return {part: sum(_cpu_s(pid) for pid, of in self._parts.items() if of == part) for part in PARTS}

    def _run(self) -> None:
        samples = 0
        while not self._over.wait(EVERY_S):
            samples += 1
            if samples % LOOK_ANEW == 0:
                self._find()
            for pid in self._parts:
                self._peaks[pid] = max(self._peaks.get(pid, 0), _private_bytes(pid))

    def _find(self) -> None:
        found = dict(self._parts)
        for process in find(self._fleet):
            with contextlib.suppress(psutil.Error):
                found.setdefault(process.pid, _part(process))
        self._parts = found


def _part(process: psutil.Process) -> str:
    """Which part a process is; Ray's actors carry their class in their title."""
    title = " ".join(process.cmdline())
    for words, part in (
        ("ray::IntakeActor", "intake"),
        ("ray::RegionActor", "region"),
        ("hierfl controller serve", "controller"),
        ("hierfl client run", "client"),
        ("benchmarks.crowd", "client"),
    ):
        if words in title:
            return part
    return "ray"


def _private_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:  # noqa: PTH123 - 20 times a second
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * PAGE


def _cpu_s(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS
