"""The zone store: what a crash of the region may not lose. One SQLite file and a folder of sealed partials.

A seal is one transaction with its receipts, made after the partial's file is fsynced and renamed. Single
updates are never written here.
"""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from combiners.ledger import LedgerBook
from combiners.messages import Claim
from combiners.residuals import LeftOver, ResidualBook
from combiners.sealed import Sealed, read_sealed, write_sealed
from combiners.zonefile import ZoneFile, storage_errors
from hierfl.errors import StaleEpoch
from hierfl.failpoints import reach
from hierfl.receipts import Receipt, ReceiptEvent, ReceiptState, next_receipt
from hierfl.types import AttemptKey, ClientId, ClientRef, RegionId, RunId, SiteId, TaskKind, UpdateKey

__all__ = ["PendingPartial", "ZoneStore"]

_RECEIPT_COLUMNS = "run, task, round, attempt, site, client, digest, state, version, reason"


@dataclass(frozen=True)
class PendingPartial:
    """A sealed partial under an attempt that the controller has not judged yet."""

    key: AttemptKey
    digest: str


class ZoneStore:
    """See the module. Not for two threads at once: the host calls it from one."""

    def __init__(self, directory: Path, federation: str, region: RegionId) -> None:
        """Open or create the store and take the next region epoch. Raises as ``ZoneFile``."""
        self._file = ZoneFile(directory, federation, region)
        self._blobs = directory / "blobs"
        self._region = region
        self._newest: Sealed | None = None
        """What was sealed last, until it is first sent."""
        self.ledger = LedgerBook(self._file)
        self.residuals = ResidualBook(self._file, self._blobs)
        for left in self._blobs.glob("*.tmp"):
            left.unlink(missing_ok=True)  # of a start that died
        self.region_epoch, self.store_id = self._file.region_epoch, self._file.store_id

    def close(self) -> None:
        """Let go of the store; a second time does nothing."""
        self._file.close()

    # ------------------------------------------------------------ epochs

    @property
    def leader_epoch(self) -> int:
        """Highest leader epoch seen: a lower one is a controller that has been replaced."""
        return int(self._file.meta("leader_epoch"))

    def raise_leader_epoch(self, epoch: int) -> None:
        """Remember a leader epoch that is not lower than the one known.

        Raises:
            StaleEpoch: It is lower.
        """
        known = self.leader_epoch
        if epoch < known:
            raise StaleEpoch(f"a controller of leader epoch {epoch} spoke after one of {known}; it must stop")
        if epoch > known:
            with self._file.transaction():
                self._file.set_meta("leader_epoch", str(epoch))

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
        left_over: LeftOver | None = None,
    ) -> None:
        """Make a seal durable: first the files, then one transaction with everything that goes with it.

        Raises:
            DiskFull: No space; nothing of the seal remains.
            StaleEpoch: A newer Region has the store.
        """
        path = self._blob(sealed.digest)
        try:
            if left_over is not None:
                self.residuals.write(left_over)
            with storage_errors(path):
                reach("region.seal.residual")
                write_sealed(path, sealed)
                reach("region.seal.file")
            self._write_seal_rows(sealed, key, claims, receipts, (sites_needed, max_share, updates_root))
        except BaseException:
            path.unlink(missing_ok=True)
            self.residuals.sweep()
            raise
        self._newest = sealed

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
        with self._file.transaction() as database:
            database.execute(
                "insert into partials (seal_id, base_model_hash, task_hash, run, digest, sites_needed, max_share,"
                " updates_root, region_epoch, sealed_unix_ns) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(head.seal_id, head.base_model_hash, head.task_hash, key.run, sealed.digest),
                    *(*rule, head.region_epoch, now),
                ),
            )
            database.execute("insert into addresses values (?, ?, ?, ?, ?, 0)", (*_attempt_row(key), head.seal_id))
            self.residuals.note(database, head)
            for receipt in receipts:
                self._put_receipt(database, receipt, now, head.seal_id, by_client[receipt.key])

    def readdress(self, digest: str, key: AttemptKey) -> None:
        """Note that the sealed bytes with ``digest`` go to another attempt, too."""
        with self._file.transaction() as database:
            database.execute(
                "insert or ignore into addresses select ?, ?, ?, ?, seal_id, 0 from partials where digest = ?",
                (*_attempt_row(key), digest),
            )

    def load_sealed(self, digest: str) -> Sealed:
        """The sealed bytes again, checked against their digest; the first time those that were just written."""
        newest, self._newest = self._newest, None
        if newest is not None and newest.digest == digest:
            return newest
        path = self._blob(digest)
        with storage_errors(path):
            return read_sealed(path, digest)

    def released(self) -> dict[tuple[str, str], str]:
        """Digest by (base model hash, task hash) of every release there ever was; empty where its bytes are gone."""
        rows = self._file.rows("select base_model_hash, task_hash, digest, is_kept from partials")
        return {(base, task): digest if is_kept else "" for base, task, digest, is_kept in rows}

    def pending(self) -> list[PendingPartial]:
        """Sealed partials without a verdict."""
        rows = self._file.rows(
            "select a.run, a.task, a.round, a.attempt, digest from addresses a join partials using (seal_id)"
            " where not is_judged order by sealed_unix_ns"
        )
        return [PendingPartial(_attempt_key(row[:4]), row[4]) for row in rows]

    def settle(self, key: AttemptKey, event: ReceiptEvent, *, version: int = 0, reason: str = "") -> list[Receipt]:
        """The verdict on the partial sent for ``key``'s round: last words on its updates, in one transaction.

        A verdict is on a round; which attempt it names, of those that the partial was addressed to, is all one: a
        later attempt may have been committed before this region heard of it. The receipts belong to the run that
        collected them; a verdict of another run that got the same bytes leaves them as they are. What rounding left
        over becomes the run's with the same transaction, if the partial was counted.
        """
        with self._file.transaction() as database:
            row = database.execute(
                "select seal_id, partials.run from addresses join partials using (seal_id)"
                " where addresses.run = ? and task = ? and round = ? and not is_judged",
                _attempt_row(key)[:3],
            ).fetchone()
            if row is None:
                return []
            database.execute("update addresses set is_judged = 1 where seal_id = ? and run = ?", (row[0], key.run))
            if event is ReceiptEvent.COMMIT:
                self.residuals.advance(database, key.run, row[0])
            return self._settle_seal(database, row[0], event, version, reason) if row[1] == key.run else []

    def _settle_seal(
        self, database: sqlite3.Connection, seal_id: str, event: ReceiptEvent, version: int, reason: str
    ) -> list[Receipt]:
        query = f"select {_RECEIPT_COLUMNS} from receipts where seal_id = ?"  # noqa: S608 - a constant
        rows = self._file.rows(query, (seal_id,))
        settled = []
        for row in rows:
            before = self._receipt(row)
            if not before.state.is_last_word:
                after = next_receipt(before, event, version=version, reason=reason)
                self._put_receipt(database, after, time.time_ns())
                settled.append(after)
        return settled

    def prune(self, keep_bytes: int) -> list[tuple[str, str]]:
        """Remove the bytes of judged partials, the newest ``keep_bytes`` of them stay; says of which (base, task).

        What rounding left over counts with them, and goes with them unless a run has it.
        """
        judged = self._file.rows(
            "select digest, base_model_hash, task_hash, coalesce(left_over, '') from partials"
            " left join residuals using (seal_id) where is_kept and not exists"
            " (select 1 from addresses a where a.seal_id = partials.seal_id and not a.is_judged)"
            " order by sealed_unix_ns desc"
        )
        sizes = itertools.accumulate(self._size(row[0]) + self.residuals.size(row[3]) for row in judged)
        rows = [row[:3] for row, total in zip(judged, sizes, strict=True) if total > keep_bytes]
        if not rows:
            return []
        with self._file.transaction() as database:
            database.executemany("update partials set is_kept = 0 where digest = ?", [(row[0],) for row in rows])
        for digest, _, _ in rows:
            self._blob(digest).unlink(missing_ok=True)
        self.residuals.sweep()
        return [(base, task) for _, base, task in rows]

    def _size(self, digest: str) -> int:
        try:
            return self._blob(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def _blob(self, digest: str) -> Path:
        return self._blobs / f"{digest.replace(':', '-')}.partial"

    # ------------------------------------------------------------ receipts

    def record(self, receipts: Iterable[Receipt]) -> None:
        """Last words on updates that were never sealed."""
        with self._file.transaction() as database:
            for receipt in receipts:
                known = self.receipt(receipt.key)
                if known is None or not (known.state.is_last_word or known.state is ReceiptState.SEALED):
                    self._put_receipt(database, receipt, time.time_ns())

    def receipt(self, key: UpdateKey) -> Receipt | None:
        """What is durably known of an update."""
        rows = self._file.rows(
            f"select {_RECEIPT_COLUMNS} from receipts where run = ? and task = ? and round = ? and attempt = ?"  # noqa: S608 - a constant
            " and site = ? and client = ?",
            (*_attempt_row(key.attempt), key.client.site, key.client.client),
        )
        return self._receipt(rows[0]) if rows else None

    def receipts_of(self, keys: Iterable[UpdateKey]) -> dict[UpdateKey, Receipt]:
        """What is durably known of any of these updates."""
        return {key: receipt for key in keys if (receipt := self.receipt(key)) is not None}

    def _receipt(self, row: Sequence[object]) -> Receipt:
        run, task, round_number, attempt, site, client, digest, state, version, reason = row
        ref = ClientRef(self._region, SiteId(str(site)), ClientId(str(client)))
        return Receipt(
            key=UpdateKey(_attempt_key((run, task, round_number, attempt)), ref),
            digest=str(digest),
            state=ReceiptState(str(state)),
            version=int(str(version)),
            reason=str(reason),
        )

    def _put_receipt(
        self,
        database: sqlite3.Connection,
        receipt: Receipt,
        now: int,
        seal_id: str | None = None,
        claim: Claim | None = None,
    ) -> None:
        client = receipt.key.client
        database.execute(
            "insert into receipts values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) on conflict do update"
            " set state = excluded.state, version = excluded.version, reason = excluded.reason,"
            " written_unix_ns = excluded.written_unix_ns",
            (
                *(*_attempt_row(receipt.key.attempt), client.site, client.client),
                *(receipt.digest, receipt.state.value, receipt.version, receipt.reason, seal_id),
                *(claim.weight if claim else 0, claim.signature if claim else None, now),
            ),
        )


def _attempt_row(key: AttemptKey) -> tuple[str, str, int, int]:
    return key.run, key.task.value, key.round, key.attempt


def _attempt_key(row: Sequence[object]) -> AttemptKey:
    run, task, round_number, attempt = row
    return AttemptKey(RunId(str(run)), TaskKind(str(task)), int(str(round_number)), int(str(attempt)))
