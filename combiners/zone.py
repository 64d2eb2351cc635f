"""The zone store: what a crash of the region may not lose. One SQLite file and a folder of sealed partials.

One process has it (exclusive lock); each start takes the next ``region_epoch``, and every write checks it.
A seal is one transaction with its receipts, made after the partial's file is fsynced and renamed. Single
updates are never written here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519

from combiners.messages import Claim
from combiners.sealed import Sealed, read_sealed, write_sealed
from hierfl.border import GENESIS, Control, Crossing, LedgerRow, Outcome, SignedRow, sign_row
from hierfl.errors import DiskFull, StaleEpoch, StorageError, StoreDamaged, StoreLocked, StoreTooNew
from hierfl.receipts import Receipt, ReceiptEvent, ReceiptState, next_receipt
from hierfl.types import AttemptKey, ClientId, ClientRef, RegionId, RunId, SiteId, TaskKind, UpdateKey

__all__ = ["SCHEMA_VERSION", "PendingPartial", "ZoneStore"]

SCHEMA_VERSION = 1

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

_RECEIPT_COLUMNS = "run, task, round, attempt, site, client, digest, state, version, reason"


@dataclass(frozen=True)
class PendingPartial:
    """A sealed partial under an attempt that the controller has not judged yet."""

    key: AttemptKey
    digest: str


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


class ZoneStore:
    """See the module. Not for two threads at once: the host calls it from one."""

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
        with self._transaction():
            if version == 0:
                self._create()
            owner = f"{self.federation}/{self.region}"
            if self._meta("owner") != owner:
                raise StoreDamaged(f"{self._path} belongs to {self._meta('owner')}, this combiner is {owner}")
            self.store_id = self._meta("store_id")
            self.region_epoch = int(self._meta("region_epoch")) + 1
            self._set_meta("region_epoch", str(self.region_epoch))

    def _create(self) -> None:
        for statement in _SCHEMA.split(";"):
            self._db.execute(statement)
        self._db.execute(f"pragma user_version = {SCHEMA_VERSION}")
        meta = {
            "owner": f"{self.federation}/{self.region}",
            "store_id": uuid.uuid4().hex,
            "region_epoch": "0",
            "leader_epoch": "0",
        }
        self._db.executemany("insert into meta values (?, ?)", meta.items())

    def close(self) -> None:
        self._db.close()
        os.close(self._lock)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, and only while this Region is the newest."""
        with storage_errors(self._path):
            self._db.execute("begin immediate")
            try:
                self._check_epoch()
                yield
                self._db.execute("commit")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("rollback")
                raise

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        with storage_errors(self._path):
            return self._db.execute(query, values).fetchall()

    def _check_epoch(self) -> None:
        ours = getattr(self, "region_epoch", None)
        if ours is not None and int(self._meta("region_epoch")) != ours:
            raise StaleEpoch(f"{self._path} was opened by a newer start of this region (this one is {ours}); stopping")

    def _meta(self, name: str) -> str:
        return str(self._rows("select value from meta where name = ?", (name,))[0][0])

    def _set_meta(self, name: str, value: str) -> None:
        self._db.execute("update meta set value = ? where name = ?", (value, name))

    # ------------------------------------------------------------ epochs

    @property
    def leader_epoch(self) -> int:
        """Highest leader epoch seen: a lower one is a controller that has been replaced."""
        return int(self._meta("leader_epoch"))

    def raise_leader_epoch(self, epoch: int) -> None:
        """Remember a leader epoch that is not lower than the one known.

        Raises:
            StaleEpoch: It is lower.
        """
        known = self.leader_epoch
        if epoch < known:
            raise StaleEpoch(f"a controller of leader epoch {epoch} spoke after one of {known}; it must stop")
        if epoch > known:
            with self._transaction():
                self._set_meta("leader_epoch", str(epoch))

    # ------------------------------------------------------------ seals

    def write_seal(
        self,
        sealed: Sealed,
        *,
        key: AttemptKey,
        claims: Sequence[Claim],
        receipts: Sequence[Receipt],
        sites_needed: int,
        max_share: float,
        updates_root: str,
    ) -> None:
        """Make a seal durable: first the file, then one transaction with everything that goes with it.

        Raises:
            DiskFull: No space; nothing of the seal remains.
            StaleEpoch: A newer Region has the store.
        """
        path = self._blob(sealed.digest)
        with storage_errors(path):
            write_sealed(path, sealed)
        try:
            self._write_seal_rows(sealed, key, claims, receipts, (sites_needed, max_share, updates_root))
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _write_seal_rows(
        self,
        sealed: Sealed,
        key: AttemptKey,
        claims: Sequence[Claim],
        receipts: Sequence[Receipt],
        rule: tuple[int, float, str],
    ) -> None:
        head, now = sealed.head, time.time_ns()
        by_client = {claim.key: claim for claim in claims}
        with self._transaction():
            self._db.execute(
                "insert into partials (seal_id, base_model_hash, task_hash, run, digest, sites_needed, max_share,"
                " updates_root, region_epoch, sealed_unix_ns) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(head.seal_id, head.base_model_hash, head.task_hash, key.run, sealed.digest),
                    *(*rule, head.region_epoch, now),
                ),
            )
            self._db.execute("insert into addresses values (?, ?, ?, ?, ?, 0)", (*_attempt_row(key), head.seal_id))
            for receipt in receipts:
                self._put_receipt(receipt, now, head.seal_id, by_client[receipt.key])

    def readdress(self, digest: str, key: AttemptKey) -> None:
        """Note that the sealed bytes with ``digest`` go to another attempt, too."""
        with self._transaction():
            self._db.execute(
                "insert or ignore into addresses select ?, ?, ?, ?, seal_id, 0 from partials where digest = ?",
                (*_attempt_row(key), digest),
            )

    def load_sealed(self, digest: str) -> Sealed:
        """The sealed bytes again, checked against their digest."""
        path = self._blob(digest)
        with storage_errors(path):
            return read_sealed(path, digest)

    def released(self) -> dict[tuple[str, str], str]:
        """Digest by (base model hash, task hash) of every release there ever was; empty where its bytes are gone."""
        rows = self._rows("select base_model_hash, task_hash, digest, is_kept from partials")
        return {(base, task): digest if is_kept else "" for base, task, digest, is_kept in rows}

    def pending(self) -> list[PendingPartial]:
        """Sealed partials without a verdict."""
        rows = self._rows(
            "select a.run, a.task, a.round, a.attempt, digest from addresses a join partials using (seal_id)"
            " where not is_judged order by sealed_unix_ns"
        )
        return [PendingPartial(_attempt_key(row[:4]), row[4]) for row in rows]

    def settle(self, key: AttemptKey, event: ReceiptEvent, *, version: int = 0, reason: str = "") -> list[Receipt]:
        """The verdict on the partial sent under ``key``: last words on its updates, in one transaction.

        The receipts belong to the run that collected them; a verdict of another run that got the same
        bytes leaves them as they are.
        """
        with self._transaction():
            row = self._db.execute(
                "select seal_id, partials.run from addresses join partials using (seal_id)"
                " where addresses.run = ? and task = ? and round = ? and attempt = ? and not is_judged",
                _attempt_row(key),
            ).fetchone()
            if row is None:
                return []
            self._db.execute("update addresses set is_judged = 1 where seal_id = ? and run = ?", (row[0], key.run))
            return self._settle_seal(row[0], event, version, reason) if row[1] == key.run else []

    def _settle_seal(self, seal_id: str, event: ReceiptEvent, version: int, reason: str) -> list[Receipt]:
        rows = self._db.execute(f"select {_RECEIPT_COLUMNS} from receipts where seal_id = ?", (seal_id,)).fetchall()  # noqa: S608 - a constant
        settled = []
        for row in rows:
            before = self._receipt(row)
            if not before.state.is_last_word:
                after = next_receipt(before, event, version=version, reason=reason)
                self._put_receipt(after, time.time_ns())
                settled.append(after)
        return settled

    def prune(self, keep: int) -> list[tuple[str, str]]:
        """Remove the bytes of judged partials but for the newest ``keep``; says of which (base, task) they were."""
        rows = self._rows(
            "select digest, base_model_hash, task_hash from partials where is_kept and not exists"
            " (select 1 from addresses a where a.seal_id = partials.seal_id and not a.is_judged)"
            " order by sealed_unix_ns desc limit -1 offset ?",
            (keep,),
        )
        if not rows:
            return []
        with self._transaction():
            self._db.executemany("update partials set is_kept = 0 where digest = ?", [(row[0],) for row in rows])
        for digest, _, _ in rows:
            self._blob(digest).unlink(missing_ok=True)
        return [(base, task) for _, base, task in rows]

    def _blob(self, digest: str) -> Path:
        return self.directory / "blobs" / f"{digest.replace(':', '-')}.partial"

    # ------------------------------------------------------------ receipts

    def record(self, receipts: Iterable[Receipt]) -> None:
        """Last words on updates that were never sealed."""
        with self._transaction():
            for receipt in receipts:
                known = self.receipt(receipt.key)
                if known is None or not (known.state.is_last_word or known.state is ReceiptState.SEALED):
                    self._put_receipt(receipt, time.time_ns())

    def receipt(self, key: UpdateKey) -> Receipt | None:
        """What is durably known of an update."""
        rows = self._rows(
            f"select {_RECEIPT_COLUMNS} from receipts where run = ? and task = ? and round = ? and attempt = ?"  # noqa: S608 - a constant
            " and site = ? and client = ?",
            (*_attempt_row(key.attempt), key.client.site, key.client.client),
        )
        return self._receipt(rows[0]) if rows else None

    def _receipt(self, row: Sequence[object]) -> Receipt:
        run, task, round_number, attempt, site, client, digest, state, version, reason = row
        ref = ClientRef(self.region, SiteId(str(site)), ClientId(str(client)))
        return Receipt(
            key=UpdateKey(_attempt_key((run, task, round_number, attempt)), ref),
            digest=str(digest),
            state=ReceiptState(str(state)),
            version=int(str(version)),
            reason=str(reason),
        )

    def _put_receipt(self, receipt: Receipt, now: int, seal_id: str | None = None, claim: Claim | None = None) -> None:
        client = receipt.key.client
        self._db.execute(
            "insert into receipts values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) on conflict do update"
            " set state = excluded.state, version = excluded.version, reason = excluded.reason,"
            " written_unix_ns = excluded.written_unix_ns",
            (
                *(*_attempt_row(receipt.key.attempt), client.site, client.client),
                *(receipt.digest, receipt.state.value, receipt.version, receipt.reason, seal_id),
                *(claim.weight if claim else 0, claim.signature if claim else None, now),
            ),
        )

    # ------------------------------------------------------------ border ledger

    def crossing(self, sealed: Sealed, key: AttemptKey, destination: str) -> Crossing:
        """The ledger entry for sending ``sealed`` to ``destination`` under ``key``."""
        needed, share, root = self._rows(
            "select sites_needed, max_share, updates_root from partials where digest = ?", (sealed.digest,)
        )[0]
        head = sealed.head
        return Crossing(
            key=key,
            destination=destination,
            digest=sealed.digest,
            length_bytes=sealed.outgoing.length_bytes,
            base_model_hash=head.base_model_hash,
            task_hash=head.task_hash,
            seal_id=head.seal_id,
            num_sites=head.num_sites,
            num_updates=head.num_updates,
            weight=head.weight,
            sites_needed=needed,
            max_share=share,
            metrics=tuple(sorted(head.metrics)),
            updates_root=root,
        )

    def append_ledger(self, entry: Crossing | Outcome | Control, key: ed25519.Ed25519PrivateKey) -> tuple[int, str]:
        """Append a signed row; durable when this returns. Returns its sequence and the new head."""
        with self._transaction():
            last = self._db.execute(
                "select sequence, data, signature from ledger order by sequence desc limit 1"
            ).fetchone()
            sequence = last[0] + 1 if last else 1
            row = LedgerRow(
                federation=self.federation,
                region=self.region,
                store_id=self.store_id,
                region_epoch=self.region_epoch,
                sequence=sequence,
                previous=SignedRow(last[1], last[2]).hash if last else GENESIS,
                written_unix_ns=time.time_ns(),
                crossing=entry if isinstance(entry, Crossing) else None,
                outcome=entry if isinstance(entry, Outcome) else None,
                control=entry if isinstance(entry, Control) else None,
            )
            signed = sign_row(row, key)
            self._db.execute("insert into ledger values (?, ?, ?)", (sequence, signed.data, signed.signature))
        return sequence, signed.hash

    def ledger_rows(self) -> list[SignedRow]:
        """The whole border ledger, in order."""
        rows = self._rows("select data, signature from ledger order by sequence")
        return [SignedRow(data, signature) for data, signature in rows]


def _attempt_row(key: AttemptKey) -> tuple[str, str, int, int]:
    return key.run, key.task.value, key.round, key.attempt


def _attempt_key(row: Sequence[object]) -> AttemptKey:
    run, task, round_number, attempt = row
    return AttemptKey(RunId(str(run)), TaskKind(str(task)), int(str(round_number)), int(str(attempt)))
