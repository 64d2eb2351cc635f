"""A state folder belongs to one running federation at a time, and nothing of one that has ended is left.

Who runs it holds a lock, which the operating system takes back however that process ends; a note beside it
(``up.json``) says which processes belong to it. Linux.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hierfl.errors import StoreLocked
from hierfl.leftovers import clean_up_predecessor
from hierfl.processes import find, kill_all

__all__ = ["claim", "end_leftovers", "stop_running"]

NOTE, LOCK = "up.json", "lock"
NOW_S = 0.05
"""Long enough to see whether somebody holds a lock."""


@contextlib.contextmanager
def claim(state: Path, fleet: str) -> Iterator[None]:
    """Hold the state folder for ``fleet``; what a killed predecessor left is ended first, what this one left last.

    Raises:
        StoreLocked: Another federation runs from it.
    """
    import fcntl

    with (state / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreLocked(f"the federation in {state} is running already; stop it with `hierfl down`") from None
        end_leftovers(state)
        note = {"schema": "hierfl.up/1", "pid": os.getpid(), "fleet": fleet}
        (state / NOTE).write_text(json.dumps(note))
        try:
            yield
        finally:
            end_leftovers(state)


def _released(state: Path, timeout_s: float) -> bool:
    """Wait until nobody holds the state folder, for at most ``timeout_s``; whether it is free."""
    import fcntl

    def wait() -> None:
        with (state / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)

    waiting = threading.Thread(target=wait, daemon=True)  # a call that has no timeout of its own
    waiting.start()
    waiting.join(timeout_s)
    return not waiting.is_alive()


def stop_running(state: Path, say: Callable[[str], None], timeout_s: float) -> bool:
    """Ask whoever runs the federation of this state folder to stop, and wait until it has; whether anybody did.

    One that takes longer than ``timeout_s`` is killed.
    """
    if not (state / LOCK).exists() or _released(state, NOW_S):
        return False
    runner = _last(state)
    if runner is None:
        return False  # it is just starting, or ending
    say("stopping clients, combiners and controller")
    with contextlib.suppress(ProcessLookupError):
        os.kill(runner["pid"], signal.SIGTERM)
        if not _released(state, timeout_s):
            os.kill(runner["pid"], signal.SIGKILL)
    return True


def end_leftovers(state: Path) -> int:
    """End what is left of the last federation of this state folder: processes, temporary folders, its note.

    Returns how many processes were left.
    """
    last = _last(state)
    left = find(last["fleet"]) if last else []
    if last:
        kill_all(last["fleet"])
    for note in (state / "regions").glob("*/ray.json"):
        clean_up_predecessor(note)
    (state / NOTE).unlink(missing_ok=True)
    return len(left)


def _last(state: Path) -> dict[str, Any] | None:
    """The note of who runs the federation of this state folder, or did when it was killed."""
    try:
        document: dict[str, Any] = json.loads((state / NOTE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return document if {"pid", "fleet"} <= document.keys() else None
