"""The audit's half inside a region: receipts, seals, addresses, border ledger, sealed bytes; and the summary of them.

Pure: rows in, findings and a summary out. What holds it together is signed twice: the ledger's row of a crossing has
the Merkle root over the statements that the clients signed, and the row is signed by the region's ledger key. Of an
update that was never sealed nothing is signed: its receipt is the region's word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from combiners.audit_ledger import Keys, Ledger, check_ledger
from combiners.audit_rows import Blob, PartialRow, ReceiptRow, ZoneRows
from hierfl.audit import Book, Kind, RegionSummary, SealSummary
from hierfl.border import Crossing, merkle_root
from hierfl.certificates import verify
from hierfl.errors import CertificateUntrusted
from hierfl.receipts import ReceiptState
from hierfl.records import UPDATE_CONTEXT, PartialHead, update_leaf, update_statement
from hierfl.residency import is_dominated
from hierfl.types import ModelHash, RunId, SiteId

__all__ = ["audit_zone", "seals_of"]

SEALED, COMMITTED, NOT_COUNTED = (
    str(s) for s in (ReceiptState.SEALED, ReceiptState.COMMITTED, ReceiptState.NOT_COUNTED)
)


def seals_of(zone: ZoneRows, run: str) -> list[PartialRow]:
    """The seals that a run has to do with: collected in it, or addressed to it."""
    addressed = {address.seal_id for address in zone.addresses if address.key.run == run}
    return [partial for partial in zone.partials if partial.run == run or partial.seal_id in addressed]


def audit_zone(
    zone: ZoneRows, run: RunId, blobs: Mapping[str, Blob], keys: Keys, now_unix_ns: int
) -> tuple[Book, RegionSummary]:
    """Look at everything that a region has on a run.

    Args:
        zone: All rows.
        run: Whose.
        blobs: By digest, of the seals of ``seals_of`` that are marked as kept.
        keys: Whom rows are believed from.
        now_unix_ns: When; stands in the summary.
    """
    book = Book(keys.region)
    book.expect("meta", "owner", "value", zone.owner, f"{keys.federation}/{keys.region}")
    ledger = check_ledger(book, zone, keys)
    _check_links(book, zone, run, ledger)
    seals = [_Seal(book, zone, partial, ledger, keys).check(blobs) for partial in seals_of(zone, run)]
    _check_once(book, zone, run)
    summary = RegionSummary(
        federation=keys.federation,
        region=keys.region,
        run=run,
        store_id=zone.store_id,
        region_epoch=zone.region_epoch,
        made_unix_ns=now_unix_ns,
        seals=tuple(seals),
        ledger_rows=ledger.num_rows,
        ledger_head=ledger.head,
        countersigned=ledger.countersigned,
        num_wrong=len(book.of_kind(Kind.WRONG)),
    )
    return book, summary


def _check_links(book: Book, zone: ZoneRows, run: str, ledger: Ledger) -> None:
    """What a row names is there; what was never sealed is not counted, for a reason."""
    seals = {partial.seal_id for partial in zone.partials}
    digests = {partial.digest for partial in zone.partials}
    addresses = {address.key for address in zone.addresses}
    releases = Counter((partial.base_model_hash, partial.task_hash) for partial in zone.partials)
    for partial in seals_of(zone, run):
        times = releases[partial.base_model_hash, partial.task_hash]
        book.expect("partials", partial.seal_id, "releases of its base model and task", times, 1)
    for address in (one for one in zone.addresses if one.key.run == run):
        book.expect("addresses", address.key, "its seal", address.seal_id in seals, expected=True)
    for crossing in (one for one in ledger.crossings if one.key.run == run):
        book.expect(
            "partials", crossing.seal_id, f"row of {crossing.digest}", crossing.digest in digests, expected=True
        )
        book.expect("addresses", crossing.key, "row of a crossing", crossing.key in addresses, expected=True)
    for receipt in (one for one in zone.receipts if one.key.attempt.run == run):
        if receipt.seal_id is None:
            book.expect("receipts", receipt.key, "state of an update that no seal has", receipt.state, NOT_COUNTED)
        else:
            book.expect("receipts", receipt.key, "its seal", receipt.seal_id in seals, expected=True)
        _check_word(book, receipt)


def _check_word(book: Book, receipt: ReceiptRow) -> None:
    states = {
        SEALED: (receipt.version, receipt.reason) == (0, ""),
        COMMITTED: receipt.version > 0 and not receipt.reason,
        NOT_COUNTED: receipt.version == 0 and bool(receipt.reason),
    }
    if not states.get(receipt.state, False):
        rule = "sealed, committed with a version, or not_counted with a reason"
        book.wrong("receipts", receipt.key, "state, version, reason", receipt.word, rule)
    book.num_checks += 1


def _check_once(book: Book, zone: ZoneRows, run: str) -> None:
    """No client is counted twice in one round, whatever the attempts."""
    counted = [r for r in zone.receipts if r.key.attempt.run == run and r.state == COMMITTED]
    rounds = Counter((r.key.attempt.task, r.key.attempt.round, r.key.client) for r in counted)
    for receipt in counted:
        times = rounds[receipt.key.attempt.task, receipt.key.attempt.round, receipt.key.client]
        book.expect("receipts", receipt.key, "times that this client is counted in the round", times, 1)


class _Seal:
    """One seal with all that belongs to it."""

    def __init__(self, book: Book, zone: ZoneRows, partial: PartialRow, ledger: Ledger, keys: Keys) -> None:
        self.book, self.partial, self.keys = book, partial, keys
        self.receipts = [receipt for receipt in zone.receipts if receipt.seal_id == partial.seal_id]
        self.addresses = [address for address in zone.addresses if address.seal_id == partial.seal_id]
        self.crossings = [crossing for crossing in ledger.crossings if crossing.digest == partial.digest]
        self.own = [address for address in self.addresses if address.key.run == partial.run]
        self.max_epoch = zone.region_epoch

    @property
    def weight(self) -> int:
        return sum(receipt.weight for receipt in self.receipts)

    @property
    def num_sites(self) -> int:
        return len({receipt.key.client.site for receipt in self.receipts})

    def check(self, blobs: Mapping[str, Blob]) -> SealSummary:
        word = self._word()
        root = merkle_root(_leaf(receipt) for receipt in self.receipts)
        self._check_signatures()
        self._check_row(root)
        for crossing in self.crossings:
            self._check_crossing(crossing, root)
        self._check_blob(blobs)
        self._check_verdict(word[0])
        partial = self.partial
        return SealSummary(
            seal_id=partial.seal_id,
            digest=partial.digest,
            base_model_hash=ModelHash(partial.base_model_hash),
            task_hash=partial.task_hash,
            collected_in=RunId(partial.run),
            addressed_to=tuple(sorted(address.key for address in self.addresses)),
            weight=self.weight,
            num_sites=self.num_sites,
            num_updates=len(self.receipts),
            updates_root=root,
            state=ReceiptState(word[0]) if word[0] in set(ReceiptState) else ReceiptState.SEALED,
            version=word[1],
            reason=word[2],
            crossings=len(self.crossings),
            is_kept=partial.is_kept,
        )

    def _word(self) -> tuple[str, int, str]:
        """State, version, reason of its receipts: one for all. A row that says another is named."""
        words = Counter(receipt.word for receipt in self.receipts)
        common = words.most_common(1)[0][0] if words else (SEALED, 0, "")
        for receipt in self.receipts:
            if receipt.word != common:
                what = f"state, version, reason (as all of seal {self.partial.seal_id})"
                self.book.wrong("receipts", receipt.key, what, receipt.word, common)
            self.book.expect("receipts", receipt.key, "run", receipt.key.attempt.run, self.partial.run)
        return common

    def _check_signatures(self) -> None:
        for receipt in self.receipts:
            certificate = self.keys.clients.get(receipt.key.client)
            if certificate is None:
                continue
            self.book.num_checks += 1
            try:
                statement = update_statement(receipt.key, receipt.digest, receipt.weight)
                verify(certificate, receipt.signature or b"", statement, UPDATE_CONTEXT)
            except CertificateUntrusted:
                found = f"digest {receipt.digest}, weight {receipt.weight}"
                self.book.wrong("receipts", receipt.key, "what its client signed", found, "another digest or weight")

    def _check_row(self, root: str) -> None:
        seal, weights = self.partial, _weights(self.receipts)
        self.book.expect("partials", seal.seal_id, "updates_root, over the receipts there are", root, seal.updates_root)
        if self.num_sites < seal.sites_needed:
            self.book.wrong("partials", seal.seal_id, "sites", self.num_sites, f"at least {seal.sites_needed}")
        if weights and is_dominated(weights, seal.max_share):
            share = max(weights.values()) / (weights.total() or 1)
            self.book.wrong("partials", seal.seal_id, "largest share", share, f"at most {seal.max_share}")
        if seal.region_epoch > self.max_epoch:
            self.book.wrong("partials", seal.seal_id, "region_epoch", seal.region_epoch, f"at most {self.max_epoch}")

    def _check_crossing(self, crossing: Crossing, root: str) -> None:
        seal = self.partial
        self.book.expect_all(
            "partials",
            seal.seal_id,
            {
                "seal_id, as its crossing has it": (seal.seal_id, crossing.seal_id),
                "base_model_hash, as its crossing has it": (seal.base_model_hash, crossing.base_model_hash),
                "task_hash, as its crossing has it": (seal.task_hash, crossing.task_hash),
                "sites_needed, as its crossing has it": (seal.sites_needed, crossing.sites_needed),
                "max_share, as its crossing has it": (seal.max_share, crossing.max_share),
                "weight in its receipts": (self.weight, crossing.weight),
                "sites in its receipts": (self.num_sites, crossing.num_sites),
                "number of its receipts": (len(self.receipts), crossing.num_updates),
                "Merkle root of its receipts": (root, crossing.updates_root),
            },
        )

    def _check_blob(self, blobs: Mapping[str, Blob]) -> None:
        seal = self.partial
        if not seal.is_kept:
            self.book.note(Kind.PRUNED, "blobs", seal.digest, "sealed partial", "pruned")
            return
        blob = blobs.get(seal.digest, Blob())
        if blob.head is None:
            found = blob.error or "not there"
            self.book.wrong("blobs", seal.digest, "sealed partial", found, "a file with this digest")
            return
        self._check_head(blob.head)

    def _check_head(self, head: PartialHead) -> None:
        seal = self.partial
        self.book.expect_all(
            "partials",
            seal.seal_id,
            {
                "region, as its bytes have it": (self.keys.region, head.region),
                "run, as its bytes have it": (seal.run, head.run),
                "base_model_hash, as its bytes have it": (seal.base_model_hash, head.base_model_hash),
                "task_hash, as its bytes have it": (seal.task_hash, head.task_hash),
                "region_epoch, as its bytes have it": (seal.region_epoch, head.region_epoch),
                "seal_id, as its bytes have it": (seal.seal_id, head.seal_id),
                "weight in its receipts, as its bytes have it": (self.weight, head.weight),
                "sites in its receipts, as its bytes have it": (self.num_sites, head.num_sites),
                "number of its receipts, as its bytes have it": (len(self.receipts), head.num_updates),
            },
        )

    def _check_verdict(self, state: str) -> None:
        """The last word and the mark that there was one go together; what was counted had crossed the border."""
        judged = {address.is_judged for address in self.own}
        for address in self.own:
            self.book.expect("addresses", address.key, "is_judged", address.is_judged, state != SEALED)
        if not self.own:
            self.book.wrong("addresses", self.partial.seal_id, "rows of its own run", "none", "at least one")
        if state == COMMITTED and not self.crossings:
            self.book.wrong("ledger", self.partial.digest, "row of its crossing", "none", "at least one")
        if state == SEALED and judged == {False}:
            self.book.note(Kind.OPEN, "partials", self.partial.seal_id, "last word", "the controller has said none yet")


def _leaf(receipt: ReceiptRow) -> bytes:
    return update_leaf(receipt.key, receipt.digest, receipt.weight, receipt.signature or b"")


def _weights(receipts: Sequence[ReceiptRow]) -> Counter[SiteId]:
    weights: Counter[SiteId] = Counter()
    for receipt in receipts:
        weights[receipt.key.client.site] += receipt.weight
    return weights
