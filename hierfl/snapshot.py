"""A copy of an SQLite database that another process may be writing, taken without asking that process anything.

Our stores are held by one process (``locking_mode = EXCLUSIVE``, or a lock beside them), so nobody else can open
them. The files can be read all the same. In WAL mode every page that changed since the log began anew is in the log:
the database first, then the log, is one state of it, unless the log began anew in between, which its header shows.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hierfl.errors import NotFound, StorageError

__all__ = ["copied"]

TRIES = 20
PAUSE_S = 0.05
WAL_HEADER_BYTES = 32
"""It holds two salts, which change whenever the log begins anew."""


@contextmanager
def copied(database: Path) -> Iterator[Path]:
    """A private copy of ``database``, its log included, as of one moment; removed at the end.

    Raises:
        NotFound: There is no such file.
        StorageError: It cannot be read, or never kept still for long enough.
    """
    if not database.is_file():
        raise NotFound("store", str(database), "name the folder of a controller or of a combiner (its --dir)")
    with tempfile.TemporaryDirectory(prefix="hierfl-audit-") as folder:
        copy = Path(folder) / database.name
        try:
            _copy(database, copy)
        except OSError as error:
            raise StorageError(f"{database} cannot be read: {error.strerror or error}") from None
        yield copy


def _copy(database: Path, copy: Path) -> None:
    log, copy_of_log = _log_of(database), _log_of(copy)
    for _ in range(TRIES):
        before = _header(log)
        shutil.copyfile(database, copy)
        copy_of_log.unlink(missing_ok=True)
        if before:
            try:
                shutil.copyfile(log, copy_of_log)
            except FileNotFoundError:  # its writer closed the store in this moment
                continue
        if _header(log) == before and _header(copy_of_log) == before:
            return
        time.sleep(PAUSE_S)  # its writer says to nobody when it pauses
    raise StorageError(f"{database} is written to without a pause; try again")


def _log_of(database: Path) -> Path:
    return database.with_name(database.name + "-wal")


def _header(log: Path) -> bytes:
    try:
        with log.open("rb") as file:
            return file.read(WAL_HEADER_BYTES)
    except FileNotFoundError:
        return b""
