"""Files that are there whole or not at all, and a folder that one process has. Linux, macOS and Windows.

The lock is an SQLite file held in an exclusive transaction: the operating system lets go of it when
the process ends, however it ends, and it works alike on all three.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from hierfl.errors import DiskFull, StorageError, StoreLocked

__all__ = ["FolderLock", "make_folder", "replace_durably", "storage_error", "write_durably"]

Writable = bytes | memoryview


def make_folder(path: Path) -> Path:
    """Make a folder that only this user reads: what it keeps is of one site.

    Raises:
        StorageError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"the folder {path} cannot be made: {error.strerror}") from None
    return path


def write_durably(path: Path, parts: Iterable[Writable]) -> None:
    """Write ``parts`` to ``path``: after a crash the file is the old one or the new one, never half of it.

    Raises:
        DiskFull: No space; the old file stands, nothing half-written remains.
        StorageError: The disk refuses for another reason.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise storage_error(error, path) from None


def storage_error(error: OSError, path: Path, done: str = "written") -> StorageError:
    """What the system says of a file that could not be ``done``, in our words."""
    if error.errno == errno.ENOSPC:
        return DiskFull(f"no space left on the disk of {path.parent}; make room, the round goes on")
    return StorageError(f"{path} cannot be {done}: {error.strerror}")


def replace_durably(source: Path, target: Path) -> None:
    """Give a file that was written durably another name; whatever had that name before is gone.

    Raises:
        StorageError: The disk refuses.
    """
    try:
        source.replace(target)
        _sync_folder(target.parent)
        _sync_folder(source.parent)
    except OSError as error:
        raise StorageError(f"{source} cannot become {target}: {error.strerror}") from None


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows has no such call, and its file system keeps names in its journal."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderLock:
    """Holds a folder for this process until closed.

    Raises:
        StoreLocked: Another process, or another client in this one, has the folder.
        DiskFull: No space.
        StorageError: The folder cannot be written.
    """

    def __init__(self, folder: Path, whose: str) -> None:
        path = folder / "lock.sqlite"
        try:
            self._connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise StorageError(f"{path} cannot be used: {error}") from None
        try:
            self._connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            self._connection.close()
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise DiskFull(f"no space left on the disk of {folder}; make room and try again") from None
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise StorageError(f"{path} cannot be used: {error}") from None
            raise StoreLocked(
                f"{whose} already runs from {folder}: stop the other one, or give each its own --dir"
            ) from None

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
