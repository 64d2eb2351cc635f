"""Make a peer's environment, run one of its scripts there, and watch the process that receives updates.

A script writes lines of JSON into its log: ``{"pid": ...}`` once for the process to watch, ``{"at": ...}`` (monotonic
seconds) at the start of each round, or at the end of each and once before the first.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hierfl.processes import MARK, kill_all

__all__ = ["PeerFailed", "Rounds", "installed", "private_bytes", "read_log", "run_script"]

SCRIPTS = Path(__file__).parent
INSTALL_S = 1200.0
SAMPLE_S = 0.05
PAGE = os.sysconf("SC_PAGE_SIZE")
WORDS = 300
"""Most characters of what a failed program said last."""


class PeerFailed(Exception):
    """A peer that could not be installed or run; its text says why."""


@dataclass(frozen=True)
class Rounds:
    """Seconds of each round, in order, and the most private bytes at once of the process that receives updates."""

    seconds: tuple[float, ...]
    peak_bytes: int

    @property
    def median_s(self) -> float:
        """Without the first round."""
        return statistics.median(self.seconds[1:])


def installed(name: str, requirements: Sequence[str], environments: Path) -> tuple[Path, str]:
    """The Python and the version of the peer's environment, made where it is missing.

    Raises:
        PeerFailed: pip could not.
    """
    folder = environments / name
    python = folder / "bin" / "python"
    done = folder / "requirements-installed"
    wanted = "\n".join(requirements)
    if not done.exists() or done.read_text(encoding="utf-8") != wanted:
        _checked([sys.executable, "-m", "venv", str(folder)], INSTALL_S)
        _checked([str(python), "-m", "pip", "install", "--quiet", *requirements], INSTALL_S)
        done.write_text(wanted, encoding="utf-8")
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return python, _checked([str(python), "-c", code], 60.0).strip()


def _checked(command: Sequence[str], timeout_s: float) -> str:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout_s)
    except subprocess.CalledProcessError as error:
        raise PeerFailed(f"`{_shown(command)}` ended with {error.returncode}: {_last_words(error.stderr)}") from None
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"`{_shown(command)}` took longer than {timeout_s:g} s") from None
    return ended.stdout


def _shown(command: Sequence[str]) -> str:
    """Without the folder of its program: a result names no path."""
    return " ".join([Path(command[0]).name, *command[1:4]])


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-WORDS:] if lines else "it said nothing"


def run_script(  # one run of one peer
    python: Path, script: str, options: Mapping[str, int], *, env: Mapping[str, str], timeout_s: float
) -> Rounds:
    """Run ``script`` with ``--name value`` for each of ``options``; nothing that it started is left.

    Raises:
        PeerFailed: It failed, took too long, or its log has too few rounds.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="hierfl-peer-") as name:
        folder = Path(name)
        log, said = folder / "rounds.jsonl", folder / "said"
        command = [str(python), str(SCRIPTS / script), "--log", str(log)]
        command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
        own = {"HOME": name, "TMPDIR": _short(folder), "FLWR_HOME": str(folder / "flwr"), MARK: mark}
        with said.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=folder, stdout=out, stderr=out, env={**os.environ, **own, **env}, start_new_session=True
            )
            try:
                peak = _watch(process, log, timeout_s)
            finally:
                kill_all(mark, process.pid)
                process.wait()
        if process.returncode:
            words = _last_words(said.read_text(encoding="utf-8", errors="replace"))
            raise PeerFailed(f"{script} ended with {process.returncode}: {words.replace(name, '...')}")
        seconds = read_log(_lines(log))
    if len(seconds) < 3:
        raise PeerFailed(f"{script} noted {len(seconds)} whole rounds, which is too few")
    return Rounds(seconds, peak)


def _short(folder: Path) -> str:
    made = folder / "t"
    made.mkdir()
    return str(made)


def _watch(process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> int:
    """Until its end: the most private bytes of the process that its log names."""
    deadline = time.monotonic() + timeout_s
    peak, pid = 0, None
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise PeerFailed(f"it took longer than {timeout_s:g} s")
        if pid is None:
            pid = next((line["pid"] for line in _lines(log) if "pid" in line), None)
        else:
            peak = max(peak, private_bytes(pid))
        time.sleep(SAMPLE_S)
    return peak


def private_bytes(pid: int) -> int:
    """Resident pages that are not shared with files or other processes; 0 once it has gone."""
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * PAGE


def _lines(log: Path) -> list[dict[str, Any]]:
    """What its log says so far; a line that is being written is left out."""
    try:
        text = log.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read_log(lines: Iterable[Mapping[str, Any]]) -> tuple[float, ...]:
    """Seconds between the times that a log notes, in order."""
    times = [float(line["at"]) for line in lines if "at" in line]
    return tuple(round(after - before, 4) for before, after in pairwise(times))
