"""The words of the ledger audit: what was found, and the summary on which its two halves meet. No I/O.

Receipts of clients never leave their region. So each region looks at its own (``combiners/audit.py``) and signs a
summary of its seals: counts, weights, digests, Merkle roots, no names. The controller's half (``controller/audit.py``)
holds models, records and partials against these summaries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from hierfl import documents
from hierfl.certificates import TrustStore, sign, verify, verify_ledger
from hierfl.errors import CertificateUntrusted
from hierfl.pki import LedgerKey
from hierfl.receipts import ReceiptState
from hierfl.types import AttemptKey, ModelHash, RegionId, RunId

__all__ = [
    "AUDIT_CONTEXT",
    "Book",
    "Finding",
    "Kind",
    "RegionSummary",
    "SealSummary",
    "SignedSummary",
    "read_summary",
    "sign_summary",
    "summaries_by_region",
]

AUDIT_CONTEXT = b"hierfl.audit-summary/1"
"""Domain of a summary's signature."""


class Kind(StrEnum):
    """What a finding means for the audit."""

    WRONG = "wrong"  # contradicts what was signed, stored or counted
    PRUNED = "pruned"  # retention removed it: it cannot be looked at any more
    OPEN = "open"  # not over yet: a last word has not arrived, a run goes on


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row, file or signature, and what is to be said of it."""

    kind: Kind
    where: str
    """``controller``, or the region's name."""
    table: str
    """Of the store, or ``blobs``, ``commits``, ``summary`` for files."""
    key: str
    what: str
    """The column, or what was looked at."""
    found: str
    expected: str

    def __str__(self) -> str:
        place = f"{self.where}: {self.table} {self.key}"
        if self.kind is not Kind.WRONG:
            return f"{place}: {self.what}: {self.found}"
        return f"{place}: {self.what} is {self.found}, expected {self.expected}"


class Book:
    """What one half of the audit has looked at and found."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.findings: list[Finding] = []
        self.num_checks = 0

    def wrong(self, table: str, key: object, what: str, found: object, expected: object) -> None:
        """Something is not what it must be."""
        self._add(Kind.WRONG, table, key, what, found, expected)

    def note(self, kind: Kind, table: str, key: object, what: str, found: object) -> None:
        """Something that is to be known, and is not wrong."""
        self._add(kind, table, key, what, found, "")

    def expect(self, table: str, key: object, what: str, found: object, expected: object) -> bool:
        """Note a difference; whether there is none."""
        self.num_checks += 1
        if found != expected:
            self.wrong(table, key, what, found, expected)
        return bool(found == expected)

    def expect_all(self, table: str, key: object, pairs: Mapping[str, tuple[object, object]]) -> None:
        """``expect`` for several columns: what was found, and what was expected."""
        for what, (found, expected) in pairs.items():
            self.expect(table, key, what, found, expected)

    def _add(self, kind: Kind, table: str, key: object, what: str, found: object, expected: object) -> None:
        self.findings.append(
            Finding(
                kind=kind,
                where=self.where,
                table=table,
                key=str(key),
                what=what,
                found=_short(found),
                expected=_short(expected),
            )
        )

    def of_kind(self, kind: Kind) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind is kind]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:297]}..."


# ---------------------------------------------------------------- the summary of a region


@dataclass(frozen=True, kw_only=True)
class SealSummary:
    """One sealed partial. It is over at least ``k`` sites, as everything that leaves a region."""

    seal_id: str
    digest: str
    base_model_hash: ModelHash
    task_hash: str
    collected_in: RunId
    """The run whose receipts these are."""
    addressed_to: tuple[AttemptKey, ...]
    weight: int
    """Sum of the weights in the receipts."""
    num_sites: int
    num_updates: int
    updates_root: str
    """Merkle root over the clients' signed statements, recomputed from the receipts."""
    state: ReceiptState
    """Of its receipts: all have the same."""
    version: int
    reason: str
    crossings: int
    """Rows of the border ledger that announce it."""
    is_kept: bool
    """Whether the region still has its bytes."""


@dataclass(frozen=True, kw_only=True)
class RegionSummary:
    """What a region says of its part in a run, after looking at every row of it."""

    federation: str
    region: RegionId
    run: RunId
    store_id: str
    region_epoch: int
    made_unix_ns: int
    seals: tuple[SealSummary, ...]
    ledger_rows: int
    ledger_head: str
    countersigned: int
    """Sequence of the newest row of the border ledger whose head the controller has signed."""
    num_wrong: int
    """Rows that are not what they must be; which, the region's own report says."""

    def seal(self, digest: str) -> SealSummary | None:
        """The seal with these bytes."""
        return next((seal for seal in self.seals if seal.digest == digest), None)


@dataclass(frozen=True, kw_only=True)
class SignedSummary:
    """A summary's exact bytes, signed with the region's ledger key, and that key's certificate, DER."""

    document: bytes
    signature: bytes
    certificate: bytes


def sign_summary(summary: RegionSummary, ledger: LedgerKey) -> SignedSummary:
    """Sign a summary over its canonical bytes."""
    from cryptography.hazmat.primitives.serialization import Encoding

    document = documents.encode(summary)
    return SignedSummary(
        document=document,
        signature=sign(ledger.key, document, AUDIT_CONTEXT),
        certificate=ledger.certificate.public_bytes(Encoding.DER),
    )


def read_summary(signed: SignedSummary, trust: TrustStore) -> RegionSummary:
    """A region's summary, if that region's ledger key has signed it.

    Raises:
        WireError: It is no summary.
        CertificateUntrusted, CertificateExpired: Not signed by a key that the region's CA certifies.
    """
    summary = documents.decode(signed.document, RegionSummary, "region's summary")
    at = datetime.fromtimestamp(summary.made_unix_ns / 1e9, UTC)
    if summary.federation != trust.federation:
        raise CertificateUntrusted(f"the summary is of federation {summary.federation[:80]!r}, not {trust.federation}")
    key = verify_ledger(signed.certificate, trust, summary.region, at)
    verify(key, signed.signature, signed.document, AUDIT_CONTEXT)
    return summary


def summaries_by_region(summaries: Iterable[RegionSummary]) -> dict[RegionId, RegionSummary]:
    """The newest summary of each region."""
    by_age = sorted(summaries, key=lambda summary: summary.made_unix_ns)
    return {summary.region: summary for summary in by_age}
