"""The border ledger: signatures, chain, countersignatures."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from hierfl import documents
from hierfl.border import (
    GENESIS,
    Control,
    Crossing,
    LedgerRow,
    Outcome,
    SignedRow,
    head_statement,
    merkle_root,
    sign_row,
    verify_rows,
)
from hierfl.certificates import sign
from hierfl.errors import StoreDamaged
from hierfl.records import LEDGER_HEAD_CONTEXT
from hierfl.types import AttemptKey, RegionId, RunId, TaskKind

KEY = ed25519.Ed25519PrivateKey.generate()
CONTROLLER = ec.generate_private_key(ec.SECP256R1())
LEAF = b"leaf"
CROSSING = Crossing(
    key=AttemptKey(RunId("run-1"), TaskKind.TRAIN, 1, 1),
    destination="spiffe://test/controller",
    digest="blake3:aa",
    length_bytes=8,
    base_model_hash="00",
    task_hash="11",
    seal_id="1-1",
    num_sites=3,
    num_updates=3,
    weight=3,
    sites_needed=3,
    max_share=0.8,
    metrics=(),
    updates_root="sha256:00",
)


def ledger(*entries: Crossing | Outcome | Control) -> list[SignedRow]:
    rows: list[SignedRow] = []
    for sequence, entry in enumerate(entries, start=1):
        row = LedgerRow(
            federation="test",
            region=RegionId("eu"),
            store_id="store",
            region_epoch=1,
            sequence=sequence,
            previous=rows[-1].hash if rows else GENESIS,
            written_unix_ns=sequence,
            crossing=entry if isinstance(entry, Crossing) else None,
            outcome=entry if isinstance(entry, Outcome) else None,
            control=entry if isinstance(entry, Control) else None,
        )
        rows.append(sign_row(row, KEY))
    return rows


def outcome(head: str, key: ec.EllipticCurvePrivateKey = CONTROLLER) -> Outcome:
    signature = sign(key, head_statement(head), LEDGER_HEAD_CONTEXT)
    return Outcome(
        of=1, digest="blake3:aa", result="acknowledged", head=head, countersignature=signature, certificate=LEAF
    )


def test_a_whole_ledger_is_proved_up_to_the_newest_head_that_the_controller_signed():
    head = ledger(CROSSING)[0].hash
    control = Control(counts={"Report": 3}, bytes_out=100, seconds=1.5)
    rows = ledger(CROSSING, outcome(head), control, CROSSING)
    summary = verify_rows(rows, KEY.public_key(), {LEAF: CONTROLLER.public_key()})
    assert (summary.num_rows, summary.num_crossings, summary.countersigned) == (4, 2, 1)
    assert summary.head == rows[-1].hash


def test_an_empty_ledger_proves_nothing():
    assert verify_rows([], KEY.public_key()).countersigned == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows: rows[1:],
        lambda rows: [rows[0], rows[2]],
        lambda rows: [rows[1], rows[0], rows[2]],
        lambda rows: [*rows[:2], SignedRow(rows[2].data.replace(b'"weight":3', b'"weight":4'), rows[2].signature)],
        lambda rows: [*rows[:2], SignedRow(rows[2].data, rows[1].signature)],
        lambda rows: [*rows[:2], sign_row(replace(rows[2].row(), written_unix_ns=9), _other_key())],
    ],
    ids=["first row gone", "row gone", "order", "changed", "signature of another row", "another key"],
)
def test_a_ledger_that_was_tampered_with_is_found_out(damage):
    with pytest.raises(StoreDamaged, match="border ledger, row"):
        verify_rows(damage(ledger(CROSSING, CROSSING, CROSSING)), KEY.public_key())


def _other_key() -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.generate()


def test_a_chain_rewritten_after_a_countersignature_is_found_out():
    signed_head = ledger(CROSSING)[0].hash
    rewritten = ledger(replace(CROSSING, num_sites=4), outcome(signed_head))
    with pytest.raises(StoreDamaged, match="not in this chain"):
        verify_rows(rewritten, KEY.public_key(), {LEAF: CONTROLLER.public_key()})


def test_a_countersignature_that_does_not_hold_is_found_out():
    head = ledger(CROSSING)[0].hash
    forged = outcome(head, ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(StoreDamaged):
        verify_rows(ledger(CROSSING, forged), KEY.public_key(), {LEAF: CONTROLLER.public_key()})


def test_a_countersignature_by_somebody_unknown_proves_nothing():
    head = ledger(CROSSING)[0].hash
    assert verify_rows(ledger(CROSSING, outcome(head)), KEY.public_key()).countersigned == 0


def test_a_row_is_a_document_that_reads_back_as_it_was():
    row = ledger(CROSSING)[0]
    assert row.row().crossing == CROSSING
    assert documents.encode(row.row()) == row.data


def test_a_merkle_root_does_not_depend_on_order_and_is_that_of_rfc_6962():
    leaves = [b"a", b"b", b"c"]
    assert merkle_root(leaves) == merkle_root(reversed(leaves))
    one, two, three = sorted(hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves)
    pair = hashlib.sha256(b"\1" + one + two).digest()
    assert merkle_root(leaves) == "sha256:" + hashlib.sha256(b"\1" + pair + three).hexdigest()
    assert merkle_root([]) == "sha256:" + hashlib.sha256(b"").hexdigest()
    assert merkle_root([b"a"]) == "sha256:" + hashlib.sha256(b"\0a").hexdigest()
