"""Child processes of one machine's federation: started, watched and ended, with all that they started.

Ray's processes sit in process groups of their own, outlive their driver, and some write a title over
their environment. What finds them all: each child leads a session, which its own children stay in, and
carries a mark in its environment, which they inherit. Nothing of either is left after ``stop``. Linux
only (``/proc``, parent-death signal).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import select
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import click
import psutil

from hierfl.errors import ConfigError, Refused, RunFailed

__all__ = ["Child", "Program", "ProgramFailed", "find", "kill_all"]

MARK = "HIERFL_FLEET"
_PR_SET_PDEATHSIG = 1
_LAST_WORDS = 20
_OUR_ERROR = re.compile(r"error (HFL-\d{3}): ")


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to start. ``has_ready_line``: it prints one JSON document on stdout once it serves."""

    name: str
    argv: Sequence[str]
    log: Path
    has_ready_line: bool = True
    env: Mapping[str, str] = field(default_factory=dict)


class ProgramFailed(RunFailed):
    """A program that should be running has ended. It carries that program's own error: code, exit status, words."""

    def __init__(self, name: str, status: int, said: str, log: str) -> None:
        """``said``: the line that it ended with, ``error HFL-...: ...`` where it is one of ours."""
        super().__init__(name, status, said, log)
        self.name, self.status, self.said, self.log = name, status, said, log
        known = _OUR_ERROR.match(said)
        if known is not None:
            self.code, self.exit_code = known[1], status

    def __str__(self) -> str:
        words = _OUR_ERROR.sub("", self.said) or "it said nothing"
        return f"{self.name} ended (exit {self.status}): {words}; its log: {self.log}"

    @property
    def is_final(self) -> bool:
        """Whether starting it again would change nothing: wrong usage, configuration, or a refusal."""
        return self.status in (click.UsageError.exit_code, ConfigError.exit_code, Refused.exit_code)


def find(mark: str, session: int = 0) -> list[psutil.Process]:
    """Every live process that carries ``mark`` (a fleet, or ``fleet/name`` for one child), or is in ``session``."""
    return [process for process in psutil.process_iter() if _belongs(process, mark, session)]


def _belongs(process: psutil.Process, mark: str, session: int) -> bool:
    if process.pid == os.getpid():
        return False
    with contextlib.suppress(psutil.Error, OSError):
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if session and os.getsid(process.pid) == session:
            return True
        value: str = process.environ().get(MARK, "")
        return value == mark or value.startswith(mark + "/")
    return False


def kill_all(mark: str, session: int = 0) -> None:
    """SIGKILL all that ``find`` finds, until it finds nothing."""
    while processes := find(mark, session):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in processes:
            _wait_for_end(process.pid, timeout_s=5)


def _wait_for_end(pid: int, timeout_s: float) -> None:
    """Wait without taking the exit status, which is for the process that started this one."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            waiting = select.poll()
            waiting.register(handle, select.POLLIN)
            waiting.poll(1000 * timeout_s)
        finally:
            os.close(handle)


def _end_with_parent() -> None:
    """In the child, before exec: SIGTERM when the parent dies, so that kill -9 of the parent leaves nothing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Child:
    """One running program. ``ready`` resolves to its ready document."""

    def __init__(self, program: Program, mark: str, process: asyncio.subprocess.Process) -> None:
        self.program = program
        self.mark = mark
        self.ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._exited: asyncio.Task[int] = asyncio.create_task(self._watch())
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

    async def exited(self) -> int:
        """Wait for its end; returns the exit status. Whoever stops waiting does not end the watch."""
        return await asyncio.shield(self._exited)

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

    async def failed(self) -> ProgramFailed:
        """Wait for its end, and say why it came."""
        return self._failure(await self.exited())

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

    def _failure(self, status: int) -> ProgramFailed:
        said = next(filter(_OUR_ERROR.match, self._last_words), "")
        said = said or (self._last_words[-1] if self._last_words else "")
        return ProgramFailed(self.name, status, said, str(self.program.log))

    async def stop(self, grace_s: float = 40.0) -> None:
        """SIGTERM, then SIGKILL after ``grace_s``; then whatever it left behind."""
        if not self._exited.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            await asyncio.wait({self._exited}, timeout=grace_s)
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL the whole tree at once and wait until it is gone."""
        await asyncio.to_thread(kill_all, self.mark, self.pid)
        await self.exited()
