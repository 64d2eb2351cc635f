"""Nothing of a combiner outlives it: its descendants, and what a predecessor that was killed left behind.

Ray's processes sit in groups of their own and outlive their driver. This process adopts them (child
subreaper), so that a walk of its tree finds them all; a note beside the zone store (``ray.json``) tells the
next start of the same combiner, and the `hierfl up` that ends it, what a killed one had. Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import psutil

from hierfl.folders import write_file

__all__ = ["adopt_orphans", "clean_up", "clean_up_predecessor", "make_temporary"]

logger = logging.getLogger(__name__)

PR_SET_CHILD_SUBREAPER = 36
PREFIX = "hfl-"
LONGEST_PARENT = 24
"""Of the temporary folder's parent, in bytes: a socket's path ends at 107, and Ray's own names take 79 of them."""
END_S = 5.0


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def make_temporary(note: Path) -> Path:
    """A short temporary folder for this user only, noted in ``note`` with the process that owns it.

    Raises:
        OSError: One of them cannot be written; neither is left.
    """
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent if len(parent) <= LONGEST_PARENT else "/tmp"))  # noqa: S108 - mkdtemp makes it private
    own = psutil.Process()
    words = json.dumps({"folder": str(folder), "pid": own.pid, "started": own.create_time()})
    try:
        write_file(note, words.encode())
    except BaseException:
        folder.rmdir()
        raise
    return folder


def clean_up(folder: Path, note: Path) -> None:
    """End all descendants of this process, and remove its temporary folder."""
    _end(psutil.Process().children(recursive=True))
    shutil.rmtree(folder, ignore_errors=True)
    note.unlink(missing_ok=True)


def clean_up_predecessor(note: Path) -> None:
    """Do the same for the one whose note is still there, if it is dead."""
    try:
        found = json.loads(note.read_text())
        folder, pid, started = Path(found["folder"]), int(found["pid"]), float(found["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if not folder.name.startswith(PREFIX) or _lives(pid, started):
        return
    logger.info("cleaning up after a combiner that was killed")
    _end([process for process in psutil.process_iter() if _names(process, folder)])
    shutil.rmtree(folder, ignore_errors=True)
    note.unlink(missing_ok=True)


def _lives(pid: int, started: float) -> bool:
    try:
        return bool(psutil.Process(pid).create_time() == started)
    except psutil.Error:
        return False


def _names(process: psutil.Process, folder: Path) -> bool:
    """Whether the process works in this folder: by its arguments, its environment, or its open files.

    Ray's agents write a title over the first two.
    """
    if process.pid == os.getpid():
        return False
    with contextlib.suppress(psutil.Error, OSError):
        if str(folder) in " ".join(process.cmdline()) or process.environ().get("RAY_TMPDIR") == str(folder):
            return True
        return any(file.path.startswith(f"{folder}/") for file in process.open_files())
    return False


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=END_S)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:  # adopted ones are ours to bury
            pass
