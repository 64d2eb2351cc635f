"""The disks of simulated processes: the product's own stores on files and databases in memory.

A process may die at every step that touches a disk, before it or after it; what it does while it unwinds then changes
nothing. Its databases are closed as the operating system would: what was not committed is gone.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from combiners.zonefile import ZoneFile
from hierfl.errors import StoreLocked
from tests.simulation.loop import NODE, Node

__all__ = ["Disks", "on_simulated_disks"]

_connect, _fsync = sqlite3.connect, os.fsync
_replace, _unlink, _link = Path.replace, Path.unlink, Path.hardlink_to


class _Database(sqlite3.Connection):
    """A connection of one process, whose commits it may die at."""

    node: Node | None = None
    disks: Disks
    path: Path

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if self.node is None or sql[:6] not in ("commit", "COMMIT"):
            return super().execute(sql, *arguments)
        self.node.touch_disk()
        holder = self.disks.locks.get(self.path.parent, self.node)
        if holder is not self.node:
            self.disks.intrusions.append(f"{self.node.name} wrote to {self.path} after {holder.name} had it")
        cursor = super().execute(sql, *arguments)
        self.node.touch_disk()
        return cursor


class Disks:
    """Of one history."""

    def __init__(self) -> None:
        self.kept: dict[str, sqlite3.Connection] = {}
        """One connection for each database: it exists while one does."""
        self.locks: dict[Path, Node] = {}
        """Who opened a zone store last."""
        self.intrusions: list[str] = []
        """What others committed to it since."""

    def connect(self, path: Any, **options: Any) -> sqlite3.Connection:
        node = NODE.get(None)
        if node is None:
            return _connect(path, **options)
        uri = _uri(path)
        if uri not in self.kept:
            self.kept[uri] = _connect(uri, uri=True, check_same_thread=False)
        made = _connect(uri, uri=True, factory=_Database, **options)
        made.node, made.disks, made.path = node, self, Path(path)
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

    def row(self, path: Path, query: str, values: Sequence[Any]) -> Any:
        """The first row of what is committed in a database now."""
        kept = self.kept.get(_uri(path))
        return None if kept is None else kept.execute(query, values).fetchone()

    def close(self) -> None:
        for connection in self.kept.values():
            connection.close()


def _uri(path: Any) -> str:
    return f"file:{str(path).replace('/', '_')}?mode=memory&cache=shared"


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
def on_simulated_disks() -> Iterator[Disks]:
    """While this lasts, what a node does with files and databases goes through here."""
    disks = Disks()
    before = ZoneFile._take_lock

    def lock(file: ZoneFile) -> int:
        return disks.lock(file)

    sqlite3.connect, os.fsync = disks.connect, _synced  # type: ignore[assignment]
    Path.replace, Path.unlink, Path.hardlink_to = _replaced, _unlinked, _linked  # type: ignore[assignment,method-assign]
    ZoneFile._take_lock = lock  # type: ignore[method-assign]
    try:
        yield disks
    finally:
        sqlite3.connect, os.fsync = _connect, _fsync
        Path.replace, Path.unlink, Path.hardlink_to = _replace, _unlink, _link  # type: ignore[method-assign]
        ZoneFile._take_lock = before  # type: ignore[method-assign]
        disks.close()
