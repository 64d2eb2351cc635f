"""``hierfl audit``, the half inside a region: reads the zone store from a copy, signs the summary. Changes nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from combiners.audit import audit_zone, seals_of
from combiners.audit_ledger import Keys
from combiners.audit_rows import ZoneRows, read_blobs, read_zone
from hierfl.audit import Book, RegionSummary, SignedSummary, sign_summary
from hierfl.errors import ConfigError, HierFLError, NotFound
from hierfl.pki import Kit, RoleName, verify_ledger
from hierfl.types import ClientRef, RegionId, RunId

__all__ = ["audit_region"]


def audit_region(
    run: str, directory: Path, kit: Kit, sites: Path | None = None, *, anyway: bool = False
) -> tuple[Book, RegionSummary, SignedSummary]:
    """Audit a region's part in a run.

    Args:
        run: Its id.
        directory: The combiner's ``--dir``; the combiner may be running.
        kit: The combiner's: its CA is believed, its ledger key signs the summary.
        sites: Folder of the kits of the region's clients, where it is at hand: then each receipt is held against
            what its client signed, not only all of a seal together.
        anyway: Make a summary also where this region has no row of the run.
    Raises:
        NotFound: No zone store there, or it knows nothing of the run.
        ConfigError: The kit is not a combiner's.
        StoreDamaged: The zone store cannot be read at all.
    """
    if kit.identity.role is not RoleName.COMBINER or kit.ledger is None:
        raise ConfigError("--kit", str(kit.path), f"must be a combiner's kit, it is that of {kit.identity}")
    region = RegionId(kit.identity.region)
    now_unix_ns = time.time_ns()  # before the rows are read: what comes later is not held against them
    zone = read_zone(directory, region)
    if run not in zone.runs() and not anyway:
        there = ", ".join(zone.runs()[-5:]) or "none"
        raise NotFound("run", run, f"region {region} has rows of {there}")
    der = kit.ledger.certificate.public_bytes(Encoding.DER)
    keys = Keys(
        federation=kit.identity.federation,
        region=region,
        trust=kit.trust,
        ledger=verify_ledger(der, kit.trust, region, datetime.now(UTC)),
        clients={} if sites is None else _certificates(sites),
    )
    kept = [seal.digest for seal in seals_of(zone, run) if seal.is_kept]
    blobs = read_blobs(directory, kept)
    if any(blob.head is None and not blob.error for blob in blobs.values()):
        zone = _as_marked_now(zone, read_zone(directory, region))
    book, summary = audit_zone(zone, RunId(run), blobs, keys, now_unix_ns)
    return book, summary, sign_summary(summary, kit.ledger)


def _as_marked_now(zone: ZoneRows, later: ZoneRows) -> ZoneRows:
    """A running combiner may have pruned a partial between the rows and the files: its mark is durable first."""
    kept = {partial.seal_id: partial.is_kept for partial in later.partials}
    partials = (replace(one, is_kept=kept.get(one.seal_id, one.is_kept)) for one in zone.partials)
    return replace(zone, partials=tuple(partials))


def _certificates(sites: Path) -> Mapping[ClientRef, x509.Certificate]:
    """Leaves in the kits below a folder, by client. A renewed one is over the same key."""
    found = {}
    for file in sorted(sites.rglob("identity.pem")):
        try:
            kit = Kit.load(file.parent, x509.load_pem_x509_certificate(file.read_bytes()).not_valid_before_utc)
            found[kit.identity.client_ref] = kit.certificate
        except (HierFLError, ValueError):
            continue  # not a client's kit, or a damaged one: its receipts are checked by their root
    return found
