"""The accounting of a finished history: what the stores say, held against what the witness saw.

Nothing of the product's bookkeeping is used to check it: sums are added anew from the updates that sites made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from combiners.zone import ZoneStore
from controller.blobs import Blobs
from controller.commits import Commits
from controller.rows import RegionShare, RoundRow, RunRow
from controller.store import Store
from hierfl.border import verify_rows
from hierfl.pki import Kit
from hierfl.receipts import Reason, Receipt, ReceiptState
from hierfl.types import AttemptKey, ClientId, ClientRef, RegionId, RunId, SiteId, TaskKind, UpdateKey
from tests.simulation.disks import Disks
from tests.simulation.stores import Memory, MemoryStore
from tests.simulation.witness import Witness

__all__ = ["Book", "Partial", "check", "on_record", "read_book"]


@dataclass(frozen=True)
class Partial:
    """A sealed partial, as its region's zone store has it."""

    region: RegionId
    seal_id: str
    base_model_hash: str
    task_hash: str
    run: RunId
    digest: str
    region_epoch: int
    sealed_unix_ns: int


@dataclass(frozen=True)
class Book:
    """One region's zone store: its partials, and its receipts with the seal that each belongs to (or none)."""

    region: RegionId
    partials: dict[str, Partial]
    """By digest."""
    receipts: dict[UpdateKey, tuple[Receipt, str]]
    crossings: frozenset[tuple[AttemptKey, str]]
    """Of the border ledger: (attempt, digest)."""


def read_book(store: ZoneStore, region: RegionId, kit: Kit) -> Book:
    """Read a zone store, and check its ledger's chain."""
    rows = store._file.rows(
        "select seal_id, base_model_hash, task_hash, run, digest, region_epoch, sealed_unix_ns from partials"
    )
    partials = {row[4]: Partial(region, row[0], row[1], row[2], RunId(row[3]), *row[4:]) for row in rows}
    receipts = {}
    for row in store._file.rows(
        "select run, task, round, attempt, site, client, digest, state, version, reason, seal_id from receipts"
    ):
        run, task, round_number, attempt, site, client, digest, state, version, reason, seal_id = row
        attempt_key = AttemptKey(RunId(run), TaskKind(task), round_number, attempt)
        key = UpdateKey(attempt_key, ClientRef(region, SiteId(site), ClientId(client)))
        receipt = Receipt(key=key, digest=digest, state=ReceiptState(state), version=version, reason=reason)
        receipts[key] = (receipt, seal_id or "")
    signed = store.ledger.signed_rows()
    assert kit.ledger is not None
    verify_rows(signed, kit.ledger.certificate)
    crossed = [row.crossing for row in (one.row() for one in signed) if row.crossing is not None]
    return Book(region, partials, receipts, frozenset((one.key, one.digest) for one in crossed))


def check(
    store: Store, blobs: Blobs, commits: Commits, books: dict[RegionId, Book], witness: Witness, k: int
) -> Iterator[str]:
    """What is wrong, sentence by sentence; nothing where the accounting is right."""
    runs = {run.run: run for run in store.runs()}
    rounds = [told for run in runs for told in store.rounds(run)]
    counted: Counter[tuple[RunId, RegionId, str]] = Counter()
    versions: dict[tuple[RunId, RegionId, str], int] = {}
    for told in rounds:
        for share in told.regions:
            counted[told.run, share.region, share.digest] += 1
            versions[told.run, share.region, share.digest] = told.version
            yield from _check_share(told, share, runs[told.run], books[share.region], blobs, witness, k)
        yield from _check_model(told, runs[told.run], blobs, commits, store)
    yield from (f"{one} is counted {times} times" for one, times in counted.items() if times > 1)
    for book in books.values():
        yield from _check_receipts(book, versions, runs)
        yield from _check_releases(book, witness)
    yield from (
        sentence
        for told in witness.told
        for sentence in _check_word(told, books[told.key.client.region], witness.twins)
    )


def _check_share(
    told: RoundRow, share: RegionShare, run: RunRow, book: Book, blobs: Blobs, witness: Witness, k: int
) -> Iterator[str]:
    where = f"{told.run} round {told.round}, {share.region}"
    partial = book.partials.get(share.digest)
    if partial is None:
        yield f"{where}: counts {share.digest}, which its region did not seal"
        return
    receipts = [receipt for receipt, seal_id in book.receipts.values() if seal_id == partial.seal_id]
    if (share.num_updates, share.weight) != (
        len(receipts),
        sum(witness.made[receipt.digest].weight for receipt in receipts),
    ):
        yield f"{where}: the record has {share.num_updates} updates, the receipts {len(receipts)}, or another weight"
    if len({receipt.key.client.site for receipt in receipts}) < k:
        yield f"{where}: fewer than {k} sites"
    if len({receipt.key.client for receipt in receipts}) != len(receipts):
        yield f"{where}: a client is in it twice"
    if share.collected_in == told.run:
        for receipt in receipts:
            if (receipt.state, receipt.version) != (ReceiptState.COMMITTED, told.version):
                yield f"{where}: counted in {told.version}, its receipt says {receipt}"
    (group,) = run.groups
    expected = sum(
        (
            witness.made[receipt.digest].weight
            * np.rint(witness.made[receipt.digest].values.astype(np.float64) * 2.0**group.s).astype(np.int64)
            for receipt in receipts
        ),
        np.zeros(group.num_values, np.int64),
    )
    sums = {group.name: np.zeros(group.shape, np.int64)}
    blobs.partial(share.digest, run.groups).add_into(sums)
    if not np.array_equal(group.values(sums[group.name]) if hasattr(group, "values") else sums[group.name], expected):
        yield f"{where}: the sum is {sums[group.name]}, of its updates {expected}"


def _check_model(told: RoundRow, run: RunRow, blobs: Blobs, commits: Commits, store: Store) -> Iterator[str]:
    """The model is the base and the mean; the strategy is plain averaging."""
    if told.task is not TaskKind.TRAIN:
        return
    before, after = store.model(told.run, told.version - 1), store.model(told.run, told.version)
    if before is None or after is None:
        yield f"{told.run}: version {told.version} or the one before is not in the store"
        return
    record = commits.find(told.run, told.version)
    if record is None or record.record != after.record:
        yield f"{told.run}: the commit record of version {told.version} is not the one in the store"
    (group,) = run.groups
    total = {group.name: np.zeros(group.shape, np.int64)}
    for share in told.regions:
        blobs.partial(share.digest, run.groups).add_into(total)
    mean = total[group.name].astype(np.float64) / 2.0**group.s / told.weight
    base, made = blobs.model(before.model_hash)[1], blobs.model(after.model_hash)[1]
    if not np.allclose(made[group.name], base[group.name] + mean.reshape(-1), rtol=1e-6, atol=1e-7):
        yield f"{told.run}: version {told.version} is not the mean of what it counts"


def _check_receipts(
    book: Book, versions: dict[tuple[RunId, RegionId, str], int], runs: dict[RunId, RunRow]
) -> Iterator[str]:
    digest_of = {partial.seal_id: partial.digest for partial in book.partials.values()}
    works: Counter[tuple[RunId, int, ClientRef]] = Counter()
    for receipt, seal_id in book.receipts.values():
        key = receipt.key.attempt
        version = versions.get((key.run, book.region, digest_of.get(seal_id, "")))
        match receipt.state:
            case ReceiptState.COMMITTED:
                works[key.run, key.round, receipt.key.client] += 1
                if version != receipt.version:
                    yield f"{receipt} is in no such version (its sum is in {version})"
            case ReceiptState.NOT_COUNTED:
                if version is not None:
                    yield f"{receipt} is counted in version {version}"
            case ReceiptState.SEALED:
                if runs[key.run].state.is_terminal:
                    yield f"{receipt}: acknowledged, and never a last word"
            case _:
                yield f"{receipt}: a receipt of no durable state"
    yield from (f"{work} is counted {times} times" for work, times in works.items() if times > 1)


def _check_releases(book: Book, witness: Witness) -> Iterator[str]:
    """At most one release for one base and task, each in the ledger before its bytes left."""
    of: dict[tuple[str, str], set[str]] = {}
    for sent in (sent for sent in witness.sent if sent.region == book.region):
        of.setdefault((sent.base_model_hash, sent.task_hash), set()).add(sent.digest)
        if (sent.key, sent.digest) not in book.crossings:
            yield f"{sent}: left without a row in the ledger"
    yield from (f"{book.region}: releases over one base and task: {found}" for found in of.values() if len(found) > 1)


def _check_word(told: Receipt, book: Book, twins: set[ClientRef]) -> Iterator[str]:
    """A client was told the truth: what was acknowledged is on record, and last words never change.

    That other bytes were handed in under its key says what is so at that moment, of two processes with one
    certificate: the others may be lost with their intake, and a late copy of these be counted after all.
    """
    known = book.receipts.get(told.key, (None, ""))[0]
    same = known is not None and known.digest == told.digest
    match told.state:
        case ReceiptState.SEALED if not same:
            yield f"told {told}, on record is {known}"
        case ReceiptState.COMMITTED if not same or known != told:
            yield f"told {told}, on record is {known}"
        case ReceiptState.NOT_COUNTED if told.reason == Reason.DIGEST_CONFLICT:
            if told.key.client not in twins:
                yield f"told {told}, though nobody else has its certificate"
        case ReceiptState.NOT_COUNTED if not same or known != told:
            yield f"told {told}, on record is {known}"


def on_record(told: Receipt, memory: Memory, disks: Disks, folder: Path) -> str:
    """What is wrong with a word at the moment at which its client hears it: it has to be durable by then."""
    key = told.key.attempt
    if told.state not in (ReceiptState.SEALED, ReceiptState.COMMITTED, ReceiptState.NOT_COUNTED):
        return ""
    if told.reason == Reason.DIGEST_CONFLICT:
        return ""
    row = disks.row(
        folder / told.key.client.region / "zone.sqlite",
        "select state from receipts where run = ? and task = ? and round = ? and attempt = ? and site = ?"
        " and client = ? and digest = ?",
        (key.run, key.task.value, key.round, key.attempt, told.key.client.site, told.key.client.client, told.digest),
    )
    if row is None or (told.state.is_last_word and row[0] != told.state):
        return f"heard {told} before it was on record ({row})"
    if told.state is ReceiptState.COMMITTED and MemoryStore(memory).model(key.run, told.version) is None:
        return f"heard {told} before that version was"
    return ""
