"""The controller's rows, atomic and resumable: a protocol, and SQLite for it (Redis: ``store_redis.py``).

Every change of state is one ``write``: all its rows or none, and only under the leader epoch that the store
holds, compared inside the write: who has been replaced gets ``StaleEpoch`` and changes nothing.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from controller.blobs import durable_directory
from controller.rows import AnswerRow, AttemptRow, ModelRow, RegionRow, RoundRow, Row, RunRow
from controller.tables import TABLES, WRITTEN_ONCE, Tables, decoded, key_of
from hierfl import documents
from hierfl.errors import DiskFull, StaleEpoch, StorageError, StoreDamaged, StoreLocked, StoreTooNew
from hierfl.failpoints import reach
from hierfl.types import AttemptKey, RunId, TaskKind

__all__ = ["SCHEMA_VERSION", "SqliteStore", "Store"]

SCHEMA_VERSION = 1
"""Raised with each change that an earlier release would misread."""

R = TypeVar("R")


class Store(Protocol):
    """What the controller remembers. One controller leads; all of it is read back at a start."""

    @property
    def lease_s(self) -> float | None:
        """Seconds for which a lead holds unless it is renewed; None where it holds until ``close``."""

    @property
    def store_id(self) -> str:
        """Identity of this store, made with it: another one is another memory."""

    def lead(self, at_least: int = 0, *, name: str = "", under: int | None = None) -> int:
        """Become the leader: returns a leader epoch above every earlier one, and above ``at_least``.

        Args:
            at_least: An epoch that somebody has seen.
            name: What other controllers are told of this one.
            under: The epoch that the caller leads under already, where it only wants a higher one.

        Raises:
            NotTheLeader: Another controller leads.
            StaleEpoch: Another controller has led since ``under``.
        """

    def renew(self, epoch: int) -> None:
        """Go on leading for another ``lease_s``. Raises ``StaleEpoch`` where another controller leads."""

    def write(self, epoch: int, *rows: Row) -> None:
        """Store all rows or none.

        Raises:
            StaleEpoch: Another controller leads.
            StoreDamaged: A row that is written once is there already, with other contents.
            DiskFull: No space left; nothing was written.
            StoreUnreachable: No answer: whether it was written is known under the next epoch only.
        """

    def runs(self) -> list[RunRow]:
        """All runs, in the order of submission."""

    def attempts(self, run: RunId, task: TaskKind, round_number: int) -> list[AttemptRow]:
        """Attempts at one round, in order."""

    def answers(self, key: AttemptKey) -> list[AnswerRow]:
        """What regions said to one attempt, by region."""

    def rounds(self, run: RunId) -> list[RoundRow]:
        """Committed rounds: training in order, then the evaluation."""

    def models(self, run: RunId) -> list[ModelRow]:
        """Versions of a run's model, in order."""

    def model(self, run: RunId, version: int) -> ModelRow | None:
        """One version of a run's model."""

    def regions(self) -> list[RegionRow]:
        """Every region that ever attached."""

    def close(self) -> None:
        """Let go of the store, and of the lead."""


class SqliteStore(Tables):
    """One file, locked by its one user; WAL, and fsynced at each commit."""

    lease_s = None

    def __init__(self, path: Path, federation: str) -> None:
        """Open or create the store of ``federation``.

        Raises:
            StoreLocked: Another process has it.
            StoreTooNew: A later release wrote it.
            StoreDamaged: It is no store, or another federation's.
        """
        durable_directory(path.parent)
        self._path = path
        with self._errors():
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            self._open(federation)
        except BaseException:
            self._db.close()
            raise

    def _open(self, federation: str) -> None:
        with self._errors():
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
        with self._transaction():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise StoreTooNew(f"{self._path} has schema {version}, this release knows {SCHEMA_VERSION}: upgrade")
            if version == 0:
                self._create(federation)
            self.store_id, owner = self._meta("store_id"), self._meta("federation")
        if owner != federation:
            raise StoreDamaged(f"{self._path} belongs to federation {owner!r}, not {federation!r}: use another --dir")

    def _create(self, federation: str) -> None:
        self._db.execute("CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
        for table in TABLES.values():
            self._db.execute(f"CREATE TABLE {table} (key TEXT PRIMARY KEY, document BLOB NOT NULL) WITHOUT ROWID")
        meta = {"federation": federation, "store_id": uuid.uuid4().hex, "leader_epoch": "0"}
        self._db.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
        self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def lead(self, at_least: int = 0, *, name: str = "", under: int | None = None) -> int:
        del name  # there is no other controller
        with self._transaction():
            if under is not None:
                self._require(under)
            epoch = max(int(self._meta("leader_epoch")), at_least) + 1
            self._db.execute("UPDATE meta SET value = ? WHERE name = 'leader_epoch'", (str(epoch),))
        return epoch

    def renew(self, epoch: int) -> None:
        with self._errors():
            self._require(epoch)

    def write(self, epoch: int, *rows: Row) -> None:
        with self._transaction():
            self._require(epoch)
            for row in rows:
                self._put(row)

    def _require(self, epoch: int) -> None:
        leader = int(self._meta("leader_epoch"))
        if leader != epoch:
            raise StaleEpoch(f"this controller leads under epoch {epoch}, the store is under {leader}: stop it")

    def _put(self, row: Row) -> None:
        table, key, document = TABLES[type(row)], key_of(row), documents.encode(row)
        if isinstance(row, WRITTEN_ONCE):
            found = self._db.execute(f"SELECT document FROM {table} WHERE key = ?", (key,)).fetchone()  # noqa: S608  a constant
            if found is not None and found[0] != document:
                raise StoreDamaged(f"{self._path}: {table} {key} is there already, with other contents")
        self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (key, document))  # noqa: S608  a constant

    def close(self) -> None:
        self._db.close()

    def _meta(self, name: str) -> str:
        found = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        if found is None:
            raise StoreDamaged(f"{self._path} lacks its {name}: restore it from a backup")
        return str(found[0])

    def _rows(self, kind: type[R], prefix: str = "") -> list[R]:
        table = TABLES[kind]
        with self._errors():
            found = self._db.execute(
                f"SELECT document FROM {table} WHERE key >= ? AND key < ? ORDER BY key",  # noqa: S608  a constant
                (prefix, prefix + "\U0010ffff"),
            ).fetchall()
        return decoded((document for (document,) in found), kind, self._path)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                reach("controller.transaction")
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translated(error) from None

    def _translated(self, error: sqlite3.Error) -> StorageError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreLocked(f"{self._path} is used by another process: stop that controller, or use another --dir")
        if code == sqlite3.SQLITE_FULL:
            return DiskFull(f"no space left for {self._path}: make room, then start again")
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return StoreDamaged(f"{self._path} is damaged ({error}): restore it from a backup")
        return StorageError(f"{self._path}: {error}")
