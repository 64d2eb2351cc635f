"""The border ledger: one row for each crossing, durable before its bytes leave, and one for its outcome.

A row is a document; the ledger signs its exact bytes with the region's long-lived ledger key and chains
rows by hash. Each uplink carries the ledger's head, and the controller signs it: up to the newest head
that someone else signed the chain is proved, what follows is the region's word. No I/O here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from hierfl import documents
from hierfl.certificates import sign, verify
from hierfl.errors import CertificateUntrusted, StoreDamaged, WireError
from hierfl.records import LEDGER_HEAD_CONTEXT
from hierfl.types import AttemptKey, RegionId

__all__ = [
    "LEDGER_CONTEXT",
    "LEDGER_HEAD_METADATA",
    "Control",
    "Crossing",
    "LedgerRow",
    "LedgerSummary",
    "Outcome",
    "SignedRow",
    "head_statement",
    "merkle_root",
    "sign_row",
    "verify_rows",
]

LEDGER_CONTEXT = b"hierfl.ledger-row/1"
"""Domain of a row's signature."""

LEDGER_HEAD_METADATA = "hierfl-ledger-head"
"""gRPC metadata key under which an uplink carries the head, ``sha256:hex``."""

GENESIS = ""
"""``previous`` of the first row."""

PublicKey: TypeAlias = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | x509.Certificate


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """A sealed partial is about to leave."""

    key: AttemptKey
    """The attempt it is addressed to."""
    destination: str
    """SAN URI of the receiver."""
    digest: str
    length_bytes: int
    base_model_hash: str
    task_hash: str
    seal_id: str
    num_sites: int
    num_updates: int
    weight: int
    sites_needed: int
    """``k`` as the stricter of zone and plan had it."""
    max_share: float
    metrics: tuple[str, ...]
    updates_root: str
    """Merkle root over the clients' signed statements, for an auditor inside the zone."""
    exact_in_two_tiers: bool = True
    """Whether the sums are exact; else they are rounded, and what is made of them is approximate across regions."""
    drop_bits: int = 0
    """How far they are rounded (``hierfl/rounding.py``)."""
    carried: str = ""
    """Digest of what rounding left over of earlier sums of the run, and is in these."""
    left_over: str = ""
    """Digest of what rounding left over of these: exact sum + carried = sum * 2**drop_bits + left over."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the crossing in row ``of``."""

    of: int
    digest: str
    result: str
    """``"acknowledged"``, or a reason code."""
    head: str = ""
    """The head that the controller signed."""
    countersignature: bytes = b""
    certificate: bytes = b""
    """Leaf of the controller that signed, DER."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """Control traffic of one session with the controller: how many messages of each kind went out."""

    counts: Mapping[str, int]
    bytes_out: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One row; exactly one of the last three is set."""

    federation: str
    region: RegionId
    store_id: str
    region_epoch: int
    sequence: int
    """From 1, without gaps."""
    previous: str
    """Hash of the row before, ``sha256:hex``."""
    written_unix_ns: int
    crossing: Crossing | None = None
    outcome: Outcome | None = None
    control: Control | None = None


@dataclass(frozen=True)
class SignedRow:
    """A row's exact bytes and the ledger key's signature over them."""

    data: bytes
    signature: bytes

    @property
    def hash(self) -> str:
        """What the next row names as ``previous``: the head, while this row is the newest."""
        return documents.digest(self.data)

    def row(self) -> LedgerRow:
        return documents.decode(self.data, LedgerRow, "border ledger row")


def sign_row(row: LedgerRow, key: ed25519.Ed25519PrivateKey) -> SignedRow:
    """Sign a row over its canonical bytes."""
    data = documents.encode(row)
    return SignedRow(data, sign(key, data, LEDGER_CONTEXT))


def head_statement(head: str) -> bytes:
    """What the controller signs (context ``LEDGER_HEAD_CONTEXT``): the head as it came, ASCII."""
    return head.encode("ascii")


def merkle_root(leaves: Iterable[bytes]) -> str:
    """Root over ``leaves`` in the order of their hashes, ``sha256:hex``: the order of arrival says nothing.

    Source: RFC 6962, section 2.1, with SHA-256.
    """
    hashes = sorted(hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves)
    return "sha256:" + _tree_hash(hashes).hex()


def _tree_hash(hashes: Sequence[bytes]) -> bytes:
    if not hashes:
        return hashlib.sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    split = 1 << (len(hashes) - 1).bit_length() - 1  # the largest power of two below the length
    return hashlib.sha256(b"\1" + _tree_hash(hashes[:split]) + _tree_hash(hashes[split:])).digest()


@dataclass(frozen=True, kw_only=True)
class LedgerSummary:
    """What a chain of rows proves."""

    num_rows: int
    num_crossings: int
    head: str
    countersigned: int
    """Sequence of the newest row whose head the controller signed; 0 where none is."""


def verify_rows(
    rows: Sequence[SignedRow], ledger_key: PublicKey, controller_keys: Mapping[bytes, PublicKey] | None = None
) -> LedgerSummary:
    """Check signatures, numbering, chain and countersignatures of a whole ledger.

    Args:
        rows: In order, from the first.
        ledger_key: The region's, certified by its CA (``certificates.verify_ledger``).
        controller_keys: By the DER of the leaf that outcome rows carry, for each leaf the caller has verified.
            A countersignature by any other leaf proves nothing and is passed over.
    Raises:
        StoreDamaged: Names the first row that does not fit.
    """
    previous, heads, num_crossings, countersigned = GENESIS, {GENESIS: 0}, 0, 0
    for sequence, signed in enumerate(rows, start=1):
        row = _checked_row(signed, ledger_key, sequence, previous)
        previous = signed.hash
        heads[previous] = sequence
        num_crossings += row.crossing is not None
        if row.outcome is not None:
            countersigned = max(countersigned, _countersigned(row.outcome, sequence, heads, controller_keys or {}))
    return LedgerSummary(num_rows=len(rows), num_crossings=num_crossings, head=previous, countersigned=countersigned)


def _checked_row(signed: SignedRow, ledger_key: PublicKey, sequence: int, previous: str) -> LedgerRow:
    try:
        verify(ledger_key, signed.signature, signed.data, LEDGER_CONTEXT)
        row = signed.row()
    except (CertificateUntrusted, WireError) as error:
        raise StoreDamaged(f"border ledger, row {sequence}: {error}") from None
    if row.sequence != sequence or row.previous != previous:
        raise StoreDamaged(f"border ledger, row {sequence}: it does not follow the row before it")
    return row


def _countersigned(
    outcome: Outcome, sequence: int, heads: Mapping[str, int], controller_keys: Mapping[bytes, PublicKey]
) -> int:
    key = controller_keys.get(outcome.certificate)
    if key is None or not outcome.countersignature:
        return 0
    if outcome.head not in heads:
        raise StoreDamaged(f"border ledger, row {sequence}: the controller signed a head that is not in this chain")
    try:
        verify(key, outcome.countersignature, head_statement(outcome.head), LEDGER_HEAD_CONTEXT)
    except CertificateUntrusted as error:
        raise StoreDamaged(f"border ledger, row {sequence}: {error}") from None
    return heads[outcome.head]
