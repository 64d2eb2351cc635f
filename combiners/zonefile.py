"""The zone store's file: one SQLite database that one process has, at one schema, under one region epoch.

Every start takes the next epoch, and every transaction checks that it is still the newest.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hierfl.errors import DiskFull, StaleEpoch, StorageError, StoreDamaged, StoreLocked, StoreTooNew
from hierfl.failpoints import reach
from hierfl.types import RegionId

__all__ = ["SCHEMA_VERSION", "ZoneFile", "storage_errors"]

SCHEMA_VERSION = 2

_SCHEMA = """
create table meta (name text primary key, value text not null) strict, without rowid;
create table partials (
    seal_id text primary key,
    base_model_hash text not null,
    task_hash text not null,
    run text not null,
    digest text not null unique,
    sites_needed integer not null,
    max_share real not null,
    updates_root text not null,
    region_epoch integer not null,
    sealed_unix_ns integer not null,
    is_kept integer not null default 1,
    unique (base_model_hash, task_hash)
) strict;
create table addresses (
    run text not null, task text not null, round integer not null, attempt integer not null,
    seal_id text not null references partials,
    is_judged integer not null default 0,
    primary key (run, task, round, attempt)
) strict, without rowid;
create table receipts (
    run text not null, task text not null, round integer not null, attempt integer not null,
    site text not null, client text not null,
    digest text not null, state text not null, version integer not null, reason text not null,
    seal_id text references partials,
    weight integer not null default 0,
    signature blob,
    written_unix_ns integer not null,
    primary key (run, task, round, attempt, site, client)
) strict, without rowid;
create index receipts_of_seal on receipts (seal_id);
create table ledger (
    sequence integer primary key, data blob not null, signature blob not null
) strict;
"""

_RESIDUALS = """
create table residuals (
    seal_id text primary key references partials,
    carried text not null,
    left_over text not null
) strict;
create table carried (
    run text primary key,
    digest text not null,
    moved_unix_ns integer not null
) strict, without rowid;
"""

_ADDED = {2: _RESIDUALS}
"""By schema version, what it has beyond the one before."""


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Say in the error tree what the disk or SQLite says."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", "")
        if code == "SQLITE_FULL":
            raise DiskFull(
                f"no space left for {where}; free some and start again, nothing half-written remains"
            ) from None
        if code in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
            raise StoreDamaged(f"{where} is damaged ({error}); restore it from a backup") from None
        if code in ("SQLITE_BUSY", "SQLITE_LOCKED"):
            raise StoreLocked(f"{where} is in use by another process; stop that one first") from None
        raise StorageError(f"{where}: {error}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no space left for {where}; free some and start again, nothing half-written remains"
            ) from None
        raise StorageError(f"{where}: {error.strerror or error}") from None


class ZoneFile:
    """See the module. Not for two threads at once."""

    def __init__(self, directory: Path, federation: str, region: RegionId) -> None:
        """Open or create the store and take the next region epoch.

        Raises:
            StoreLocked: Another combiner has it.
            StoreTooNew: A later release wrote it.
            StoreDamaged: It is of another region, or no database.
            DiskFull: No space to open it.
        """
        self.directory, self.federation, self.region = directory, federation, region
        self._path = directory / "zone.sqlite"
        with storage_errors(self._path):
            (directory / "blobs").mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self.close()
                raise

    def _take_lock(self) -> int:
        descriptor = os.open(self.directory / "zone.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise StoreLocked(
                f"{self._path} is in use by another combiner; stop that one, or give --dir another"
            ) from None
        return descriptor

    def _open(self) -> None:
        self._db.executescript("pragma journal_mode=wal; pragma synchronous=full; pragma foreign_keys=on;")
        version = self._db.execute("pragma user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StoreTooNew(f"{self._path} was written by a later release (schema {version}); upgrade hierfl")
        with self.transaction():
            if version == 0:
                self._create()
            self._upgrade(version)
            owner = f"{self.federation}/{self.region}"
            if self.meta("owner") != owner:
                raise StoreDamaged(f"{self._path} belongs to {self.meta('owner')}, this combiner is {owner}")
            self.store_id = self.meta("store_id")
            self.region_epoch = int(self.meta("region_epoch")) + 1
            self.set_meta("region_epoch", str(self.region_epoch))

    def _create(self) -> None:
        for statement in _SCHEMA.split(";"):
            self._db.execute(statement)
        meta = {
            "owner": f"{self.federation}/{self.region}",
            "store_id": uuid.uuid4().hex,
            "region_epoch": "0",
            "leader_epoch": "0",
        }
        self._db.executemany("insert into meta values (?, ?)", meta.items())

    def _upgrade(self, version: int) -> None:
        for added in range(max(version, 1) + 1, SCHEMA_VERSION + 1):
            for statement in _ADDED[added].split(";"):
                self._db.execute(statement)
        self._db.execute(f"pragma user_version = {SCHEMA_VERSION}")

    def close(self) -> None:
        """Let go of the store; a second time does nothing."""
        self._db.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and only while this Region is the newest."""
        with storage_errors(self._path):
            self._db.execute("begin immediate")
            try:
                self._check_epoch()
                yield self._db
                reach("region.transaction")
                self._db.execute("commit")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("rollback")
                raise

    def rows(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        """All rows of a query."""
        with storage_errors(self._path):
            return self._db.execute(query, values).fetchall()

    def _check_epoch(self) -> None:
        ours = getattr(self, "region_epoch", None)
        if ours is not None and int(self.meta("region_epoch")) != ours:
            raise StaleEpoch(f"{self._path} was opened by a newer start of this region (this one is {ours}); stopping")

    def meta(self, name: str) -> str:
        """One of the store's own values."""
        return str(self.rows("select value from meta where name = ?", (name,))[0][0])

    def set_meta(self, name: str, value: str) -> None:
        """Change one of them, inside a transaction."""
        self._db.execute("update meta set value = ? where name = ?", (value, name))
