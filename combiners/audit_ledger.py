"""The audit of a border ledger, row by row: numbering, signatures, chain, countersignatures. No I/O.

``hierfl.border.verify_rows`` says whether a ledger holds; this says of each row that does not, and goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519

from combiners.audit_rows import ZoneRows
from hierfl.audit import Book
from hierfl.border import GENESIS, LEDGER_CONTEXT, Crossing, LedgerRow, Outcome, SignedRow, head_statement
from hierfl.certificates import TrustStore, verify, verify_leaf
from hierfl.errors import IdentityError, WireError
from hierfl.identity import RoleName
from hierfl.records import LEDGER_HEAD_CONTEXT
from hierfl.types import ClientRef, RegionId

__all__ = ["Keys", "Ledger", "check_ledger"]

TABLE = "ledger"


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Whom the region's rows are believed from."""

    federation: str
    region: RegionId
    trust: TrustStore
    ledger: ed25519.Ed25519PublicKey
    """The region's ledger key, certified by its CA."""
    clients: Mapping[ClientRef, x509.Certificate] = field(default_factory=dict)
    """Certificates of the region's clients, where they are at hand: then each receipt's signature is checked."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What the rows say that hold."""

    crossings: tuple[Crossing, ...]
    num_rows: int
    head: str
    countersigned: int


def check_ledger(book: Book, zone: ZoneRows, keys: Keys) -> Ledger:
    """Look at every row; what does not hold is in ``book`` and is believed no more."""
    crossings: list[Crossing] = []
    heads: dict[int, str] = {}
    previous, last, is_sound, countersigned = GENESIS, 0, True, 0
    for sequence, signed in zone.ledger:
        for missing in range(last + 1, sequence):
            book.wrong(TABLE, missing, "row", "not there", "one row for each number from 1")
        row = _readable(book, sequence, signed, keys)
        if row is not None:
            _check_place(book, row, sequence, keys, zone)
            if is_sound and sequence == last + 1:  # after a bad row, or a gap, the next one fits nothing
                book.expect(TABLE, sequence, "hash of the row before", row.previous, previous)
            if row.crossing is not None:
                crossings.append(row.crossing)
            if row.outcome is not None and _is_countersigned(book, row, row.outcome, heads, keys):
                countersigned = max(countersigned, row.outcome.of)
        previous, last, is_sound = signed.hash, sequence, row is not None
        if is_sound:
            heads[sequence] = previous
    return Ledger(crossings=tuple(crossings), num_rows=len(zone.ledger), head=previous, countersigned=countersigned)


def _readable(book: Book, sequence: int, signed: SignedRow, keys: Keys) -> LedgerRow | None:
    book.num_checks += 1
    try:
        verify(keys.ledger, signed.signature, signed.data, LEDGER_CONTEXT)
        return signed.row()
    except (IdentityError, WireError) as error:
        book.wrong(TABLE, sequence, "signature", error, "the region's ledger key over the row's bytes")
        return None


def _check_place(book: Book, row: LedgerRow, sequence: int, keys: Keys, zone: ZoneRows) -> None:
    book.expect_all(
        TABLE,
        sequence,
        {
            "number": (row.sequence, sequence),
            "region": (f"{row.federation}/{row.region}", f"{keys.federation}/{keys.region}"),
            "store": (row.store_id, zone.store_id),
        },
    )


def _is_countersigned(book: Book, row: LedgerRow, outcome: Outcome, heads: Mapping[int, str], keys: Keys) -> bool:
    """Whether the controller has signed the ledger up to the crossing that this is the outcome of."""
    if not outcome.countersignature:
        return False
    try:
        signer = verify_leaf(outcome.certificate, keys.trust, datetime.fromtimestamp(row.written_unix_ns / 1e9, UTC))
        if signer.role is not RoleName.CONTROLLER:
            book.wrong(TABLE, row.sequence, "countersignature", f"by {signer}", "by the controller")
            return False
        leaf = x509.load_der_x509_certificate(outcome.certificate)
        verify(leaf, outcome.countersignature, head_statement(outcome.head), LEDGER_HEAD_CONTEXT)
    except (IdentityError, ValueError) as error:
        book.wrong(TABLE, row.sequence, "countersignature", error, "the controller's over the head it was shown")
        return False
    if outcome.of not in heads:
        return False  # that row is not what it was: said already
    what = f"head countersigned for row {outcome.of}"
    return book.expect(TABLE, row.sequence, what, outcome.head, heads[outcome.of])
