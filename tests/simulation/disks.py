"""The disks of simulated processes: the product's own stores on files and databases in memory.

A process may die at every step that touches a disk, before it or after it; what it does while it unwinds then changes
nothing. Its databases are closed as the operating system would: what was not committed is gone.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from combiners.zonefile import ZoneFile
from hierfl.errors import StoreLocked
from tests.simulation.loop import NODE, Node

__all__ = ["on_simulated_disks"]

_connect, _fsync = sqlite3.connect, os.fsync
_replace, _unlink, _link = Path.replace, Path.unlink, Path.hardlink_to


class _Database(sqlite3.Connection):
    """A connection of one process, whose commits it may die at."""

    node: Node | None = None

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if self.node is None or sql[:6] not in ("commit", "COMMIT"):
            return super().execute(sql, *arguments)
        self.node.touch_disk()
        cursor = super().execute(sql, *arguments)
        self.node.touch_disk()
        return cursor


class _Disks:
    """Of one history."""

    def __init__(self) -> None:
        self.kept: dict[str, sqlite3.Connection] = {}
        """One connection for each database: it exists while one does."""
        self.locks: dict[Path, Node] = {}

    def connect(self, path: Any, **options: Any) -> sqlite3.Connection:
        node = NODE.get(None)
        if node is None:
            return _connect(path, **options)
        uri = f"file:{str(path).replace('/', '_')}?mode=memory&cache=shared"
        if uri not in self.kept:
            self.kept[uri] = _connect(uri, uri=True, check_same_thread=False)
        made = _connect(uri, uri=True, factory=_Database, **options)
        made.node = node
        node.files.append(made)
        return made

    def lock(self, file: ZoneFile) -> int:
        """A lock that lasts while its holder runs: a volume takes it from one that is silent for long."""
        holder = self.locks.get(file.directory)
        node = NODE.get()
        if holder is not None and holder is not node and holder.runs:
            raise StoreLocked(f"{file.directory} is in use by {holder.name}")
        self.locks[file.directory] = node
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        for connection in self.kept.values():
            connection.close()


def _step() -> None:
    node = NODE.get(None)
    if node is not None:
        node.touch_disk()


def _synced(descriptor: int) -> None:
    if NODE.get(None) is None:
        _fsync(descriptor)
    else:
        _step()


def _replaced(path: Path, target: Any) -> Path:
    _step()
    return _replace(path, target)


def _linked(path: Path, target: Any) -> None:
    _step()
    _link(path, target)


def _unlinked(path: Path, missing_ok: bool = False) -> None:
    """What a process removes while it dies stays."""
    node = NODE.get(None)
    if node is None or node.is_alive:
        _unlink(path, missing_ok=missing_ok)


@contextmanager
def on_simulated_disks() -> Iterator[None]:
    """While this lasts, what a node does with files and databases goes through here."""
    disks = _Disks()
    before = ZoneFile._take_lock
    sqlite3.connect, os.fsync = disks.connect, _synced  # type: ignore[assignment]
    Path.replace, Path.unlink, Path.hardlink_to = _replaced, _unlinked, _linked  # type: ignore[assignment,method-assign]
    ZoneFile._take_lock = lambda file: disks.lock(file)  # type: ignore[method-assign]
    try:
        yield
    finally:
        sqlite3.connect, os.fsync = _connect, _fsync
        Path.replace, Path.unlink, Path.hardlink_to = _replace, _unlink, _link  # type: ignore[method-assign]
        ZoneFile._take_lock = before  # type: ignore[method-assign]
        disks.close()
