"""A zone store as the audit sees it: all its rows, read from a copy, so that the combiner may go on meanwhile."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from combiners.sealed import read_sealed
from combiners.zonefile import SCHEMA_VERSION, storage_errors
from hierfl.border import SignedRow
from hierfl.errors import StorageError, StoreDamaged, StoreTooNew
from hierfl.records import PartialHead
from hierfl.snapshot import copied
from hierfl.types import AttemptKey, ClientId, ClientRef, RegionId, RunId, SiteId, TaskKind, UpdateKey

__all__ = ["AddressRow", "Blob", "PartialRow", "ReceiptRow", "ZoneRows", "read_blobs", "read_zone"]


@dataclass(frozen=True, kw_only=True)
class PartialRow:
    """A row of ``partials``."""

    seal_id: str
    base_model_hash: str
    task_hash: str
    run: str
    digest: str
    sites_needed: int
    max_share: float
    updates_root: str
    region_epoch: int
    is_kept: bool


@dataclass(frozen=True, kw_only=True)
class AddressRow:
    """A row of ``addresses``."""

    key: AttemptKey
    seal_id: str
    is_judged: bool


@dataclass(frozen=True, kw_only=True)
class ReceiptRow:
    """A row of ``receipts``, as it stands: its state may be one that does not exist."""

    key: UpdateKey
    digest: str
    state: str
    version: int
    reason: str
    seal_id: str | None
    weight: int
    signature: bytes | None

    @property
    def word(self) -> tuple[str, int, str]:
        """What its client is told."""
        return self.state, self.version, self.reason


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A sealed partial's file: its head, or why there is none (empty: the file is not there)."""

    head: PartialHead | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class ZoneRows:
    """A whole zone store."""

    owner: str
    store_id: str
    region_epoch: int
    partials: tuple[PartialRow, ...]
    addresses: tuple[AddressRow, ...]
    receipts: tuple[ReceiptRow, ...]
    ledger: tuple[tuple[int, SignedRow], ...]
    """Sequence and row, in order."""

    def runs(self) -> list[str]:
        """Every run that this region has rows of."""
        of_seals = {partial.run for partial in self.partials}
        return sorted(of_seals | {a.key.run for a in self.addresses} | {r.key.attempt.run for r in self.receipts})


def read_zone(directory: Path, region: RegionId) -> ZoneRows:
    """All rows of the zone store in ``directory``.

    Raises:
        NotFound: There is none.
        StoreDamaged: It is no zone store, or a row is not even of its kind.
        StoreTooNew: A later release wrote it.
    """
    path = directory / "zone.sqlite"
    with copied(path) as copy, storage_errors(path):
        database = sqlite3.connect(copy)
        try:
            return _read(database, path, region)
        except (ValueError, TypeError) as error:
            raise StoreDamaged(f"{path} holds a row that is none of a zone store: {error}") from None
        finally:
            database.close()


def _read(database: sqlite3.Connection, path: Path, region: RegionId) -> ZoneRows:
    version = database.execute("pragma user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise StoreTooNew(f"{path} was written by a later release (schema {version}); upgrade hierfl")
    meta = dict(database.execute("select name, value from meta").fetchall())
    partials = database.execute(
        "select seal_id, base_model_hash, task_hash, run, digest, sites_needed, max_share, updates_root, region_epoch,"
        " is_kept from partials order by sealed_unix_ns, seal_id"
    )
    addresses = database.execute("select run, task, round, attempt, seal_id, is_judged from addresses")
    receipts = database.execute(
        "select run, task, round, attempt, site, client, digest, state, version, reason, seal_id, weight, signature"
        " from receipts"
    )
    ledger = database.execute("select sequence, data, signature from ledger order by sequence")
    return ZoneRows(
        owner=meta.get("owner", ""),
        store_id=meta.get("store_id", ""),
        region_epoch=int(meta.get("region_epoch", 0)),
        partials=tuple(_partial(row) for row in partials),
        addresses=tuple(AddressRow(key=_key(row[:4]), seal_id=row[4], is_judged=bool(row[5])) for row in addresses),
        receipts=tuple(_receipt(row, region) for row in receipts),
        ledger=tuple((sequence, SignedRow(data, signature)) for sequence, data, signature in ledger),
    )


def _key(row: Sequence[object]) -> AttemptKey:
    run, task, round_number, attempt = row
    return AttemptKey(RunId(str(run)), TaskKind(str(task)), int(str(round_number)), int(str(attempt)))


def _partial(row: Sequence[object]) -> PartialRow:
    names = ("seal_id", "base_model_hash", "task_hash", "run", "digest", "sites_needed", "max_share", "updates_root")
    seal = dict(zip((*names, "region_epoch"), row, strict=False))
    return PartialRow(**seal, is_kept=bool(row[9]))  # type: ignore[arg-type]  # the table is strict


def _receipt(row: Sequence[object], region: RegionId) -> ReceiptRow:
    site, client, *rest = row[4:]
    names = ("digest", "state", "version", "reason", "seal_id", "weight", "signature")
    ref = ClientRef(region, SiteId(str(site)), ClientId(str(client)))
    return ReceiptRow(
        key=UpdateKey(_key(row[:4]), ref),
        **dict(zip(names, rest, strict=True)),  # type: ignore[arg-type]  # the table is strict
    )


def read_blobs(directory: Path, digests: Sequence[str]) -> dict[str, Blob]:
    """The sealed partials with these digests, each read whole and held against its digest."""
    return {
        digest: _read_blob(directory / "blobs" / f"{digest.replace(':', '-')}.partial", digest) for digest in digests
    }


def _read_blob(path: Path, digest: str) -> Blob:
    try:
        return Blob(head=read_sealed(path, digest).head)
    except FileNotFoundError:
        return Blob()
    except (StorageError, OSError) as error:
        return Blob(error=str(error))
