"""The region's border ledger as rows in the zone store: appended, signed, never changed (``hierfl/border.py``)."""

from __future__ import annotations

import time

from cryptography.hazmat.primitives.asymmetric import ed25519

from combiners.sealed import Sealed
from combiners.zonefile import ZoneFile
from hierfl.border import GENESIS, Control, Crossing, LedgerRow, Outcome, SignedRow, sign_row
from hierfl.types import AttemptKey

__all__ = ["LedgerBook"]


class LedgerBook:
    """See the module. Not for two threads at once."""

    def __init__(self, file: ZoneFile) -> None:
        self._file = file

    def crossing(self, sealed: Sealed, key: AttemptKey, destination: str) -> Crossing:
        """The ledger entry for sending ``sealed`` to ``destination`` under ``key``."""
        needed, share, root = self._file.rows(
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
            exact_in_two_tiers=not head.drop_bits,
            drop_bits=head.drop_bits,
            carried=head.carried,
            left_over=head.left_over,
        )

    def append(self, entry: Crossing | Outcome | Control, key: ed25519.Ed25519PrivateKey) -> tuple[int, str]:
        """Append a signed row; durable when this returns. Returns its sequence and the new head."""
        with self._file.transaction() as database:
            last = database.execute(
                "select sequence, data, signature from ledger order by sequence desc limit 1"
            ).fetchone()
            sequence = last[0] + 1 if last else 1
            row = LedgerRow(
                federation=self._file.federation,
                region=self._file.region,
                store_id=self._file.store_id,
                region_epoch=self._file.region_epoch,
                sequence=sequence,
                previous=SignedRow(last[1], last[2]).hash if last else GENESIS,
                written_unix_ns=time.time_ns(),
                crossing=entry if isinstance(entry, Crossing) else None,
                outcome=entry if isinstance(entry, Outcome) else None,
                control=entry if isinstance(entry, Control) else None,
            )
            signed = sign_row(row, key)
            database.execute("insert into ledger values (?, ?, ?)", (sequence, signed.data, signed.signature))
        return sequence, signed.hash

    def signed_rows(self) -> list[SignedRow]:
        """The whole border ledger, in order."""
        rows = self._file.rows("select data, signature from ledger order by sequence")
        return [SignedRow(data, signature) for data, signature in rows]
