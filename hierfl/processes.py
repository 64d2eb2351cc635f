"""Child processes of one machine's federation: started, watched and ended, with all that they started.

Every child carries a mark in its environment that its own children inherit. Ray's processes sit in
process groups of their own and outlive their driver, so the mark is what finds them: nothing that
carries it is left after ``stop``. Linux only (``/proc``, parent-death signal).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from hierfl.errors import HierFLError, RunFailed

__all__ = ["Child", "Program", "kill_marked", "marked"]

MARK = "HIERFL_FLEET"
_PR_SET_PDEATHSIG = 1
_LAST_WORDS = 20


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to start. ``has_ready_line``: it prints one JSON document on stdout once it serves."""

    name: str
    argv: Sequence[str]
    log: Path
    has_ready_line: bool = True
    env: Mapping[str, str] = field(default_factory=dict)


def marked(mark: str) -> list[psutil.Process]:
    """Every live process whose environment carries ``mark`` (a fleet, or ``fleet/name`` for one child's tree)."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            value = process.environ().get(MARK, "")
            if (value == mark or value.startswith(mark + "/")) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_marked(mark: str) -> int:
    """SIGKILL all that carries ``mark`` until nothing does; returns how many there were."""
    total = 0
    while processes := [process for process in marked(mark) if process.pid != os.getpid()]:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=5)
        total += len(processes)
    return total


def _end_with_parent() -> None:
    """In the child, before exec: SIGTERM when the parent dies, so that kill -9 of the parent leaves nothing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Child:
    """One running program. ``ready`` resolves to its ready document; ``exited`` to its exit status."""

    def __init__(self, program: Program, mark: str, process: asyncio.subprocess.Process) -> None:
        self.program = program
        self.mark = mark
        self.ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.exited: asyncio.Task[int] = asyncio.create_task(self._watch())
        self._process = process
        self._last_words: deque[str] = deque(maxlen=_LAST_WORDS)

    @classmethod
    async def start(cls, program: Program, fleet: str) -> Child:
        """Start ``program`` as part of ``fleet``; its talk goes to its log."""
        mark = f"{fleet}/{program.name}"
        program.log.parent.mkdir(parents=True, exist_ok=True)
        process = await asyncio.create_subprocess_exec(
            *program.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **program.env, MARK: mark},
            start_new_session=True,  # Ctrl-C reaches the parent only, which ends its children in order
            preexec_fn=_end_with_parent,
            limit=2**20,
        )
        return cls(program, mark, process)

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def pid(self) -> int:
        return self._process.pid

    async def _watch(self) -> int:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        with self.program.log.open("a", encoding="utf-8") as log:
            await asyncio.gather(
                self._read_stdout(self._process.stdout, log), self._read_stderr(self._process.stderr, log)
            )
        status = await self._process.wait()
        if not self.ready.done():
            self.ready.set_exception(self._failure(status))
            self.ready.exception()  # asked for or not, it is no warning
        return status

    async def _read_stdout(self, stream: asyncio.StreamReader, log: IO[str]) -> None:
        async for raw in stream:
            line = raw.decode("utf-8", "replace")
            log.write(line)
            log.flush()
            if self.program.has_ready_line and not self.ready.done() and line.startswith("{"):
                self.ready.set_result(json.loads(line))

    async def _read_stderr(self, stream: asyncio.StreamReader, log: IO[str]) -> None:
        async for raw in stream:
            line = raw.decode("utf-8", "replace")
            log.write(line)
            log.flush()
            self._last_words.append(line.rstrip())

    def _failure(self, status: int) -> HierFLError:
        said = next((line for line in reversed(self._last_words) if line.startswith("error ")), "")
        said = said or (self._last_words[-1] if self._last_words else "it said nothing")
        return RunFailed(f"{self.name} did not start (exit {status}): {said}; its log: {self.program.log}")

    async def stop(self, grace_s: float = 15.0) -> None:
        """SIGTERM, then SIGKILL after ``grace_s``; then whatever it left behind."""
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            await asyncio.wait({self.exited}, timeout=grace_s)
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL the whole tree at once and wait until it is gone."""
        await asyncio.to_thread(kill_marked, self.mark)
        await self.exited
