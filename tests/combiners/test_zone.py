"""The zone store: what survives a crash."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from combiners.messages import Claim
from combiners.sealed import Sealed, read_sealed, seal, write_sealed
from combiners.zone import ZoneStore
from hierfl.aggregation import Accumulator
from hierfl.border import Control, verify_rows
from hierfl.errors import DiskFull, StaleEpoch, StorageError, StoreDamaged, StoreLocked, StoreTooNew
from hierfl.plan import Plan
from hierfl.receipts import Reason, Receipt, ReceiptEvent, ReceiptState
from hierfl.residency import Contribution, ZonePolicy, release
from hierfl.types import ClientId, ClientRef, RegionId, RunId, SiteId, UpdateKey

EU = RegionId("eu")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ZoneStore]:
    made = ZoneStore(tmp_path, "test", EU)
    yield made
    made.close()


def key_of(plan: Plan, number: int) -> UpdateKey:
    return UpdateKey(plan.key, ClientRef(EU, SiteId(f"site-{number}"), ClientId("client-00")))


def claims_of(plan: Plan) -> list[Claim]:
    return [Claim(key=key_of(plan, n), digest=f"blake3:{n:02x}", weight=1, signature=b"s") for n in range(3)]


def sealed_of(plan: Plan, seal_id: str = "1-1", value: float = 1.0) -> Sealed:
    total = Accumulator(plan.task.groups)
    for _ in range(3):
        total.fold({"train": [np.full(3000, value, np.float32)]}, 1)
    made = release(
        total.partial(3),
        policy=ZonePolicy(k=2, max_share=1.0),
        plan=plan,
        region=EU,
        contributions=[Contribution(site=claim.key.client.site, weight=1) for claim in claims_of(plan)],
        region_epoch=1,
        seal_id=seal_id,
    )
    return seal(made, plan.base.layout_hash)


def write(store: ZoneStore, plan: Plan, sealed: Sealed | None = None) -> Sealed:
    sealed = sealed or sealed_of(plan)
    claims = claims_of(plan)
    store.write_seal(
        sealed,
        key=plan.key,
        claims=claims,
        receipts=[Receipt(key=claim.key, digest=claim.digest, state=ReceiptState.SEALED) for claim in claims],
        sites_needed=2,
        max_share=1.0,
        updates_root="sha256:00",
    )
    return sealed


def test_each_start_takes_the_next_region_epoch_and_keeps_the_store_id(tmp_path):
    first = ZoneStore(tmp_path, "test", EU)
    first.close()
    second = ZoneStore(tmp_path, "test", EU)
    second.close()
    assert (first.region_epoch, second.region_epoch) == (1, 2)
    assert first.store_id == second.store_id


def test_only_one_process_has_it(store, tmp_path):
    with pytest.raises(StoreLocked, match="another combiner"):
        ZoneStore(tmp_path, "test", EU)


def test_a_store_of_another_region_is_refused(tmp_path):
    ZoneStore(tmp_path, "test", EU).close()
    with pytest.raises(StoreDamaged, match="belongs to test/eu"):
        ZoneStore(tmp_path, "test", RegionId("us"))


def test_a_store_of_a_later_release_is_refused(tmp_path):
    ZoneStore(tmp_path, "test", EU).close()
    with sqlite3.connect(tmp_path / "zone.sqlite") as database:
        database.execute("pragma user_version = 99")
    database.close()
    with pytest.raises(StoreTooNew, match="schema 99"):
        ZoneStore(tmp_path, "test", EU)


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "zone.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreDamaged):
        ZoneStore(tmp_path, "test", EU)


def test_a_region_that_was_replaced_writes_nothing_more(store, plan, tmp_path):
    with sqlite3.connect(tmp_path / "zone.sqlite") as database:
        database.execute("update meta set value = '2' where name = 'region_epoch'")
    database.close()
    with pytest.raises(StaleEpoch):
        write(store, plan)
    assert list((tmp_path / "blobs").iterdir()) == []


def test_a_seal_survives_a_restart_with_its_receipts(store, plan, tmp_path):
    sealed = write(store, plan)
    store.close()
    again = ZoneStore(tmp_path, "test", EU)
    assert again.load_sealed(sealed.digest).digest == sealed.digest
    assert again.released() == {(plan.base.model_hash, plan.task.hash): sealed.digest}
    assert [(one.key, one.digest) for one in again.pending()] == [(plan.key, sealed.digest)]
    assert again.receipt(key_of(plan, 0)).state is ReceiptState.SEALED
    again.close()


def test_one_release_for_one_base_and_task_is_held_by_the_store_too(store, plan):
    write(store, plan)
    with pytest.raises(StorageError):
        write(store, plan, sealed_of(plan, "1-2", value=2.0))


def test_a_verdict_settles_every_receipt_once(store, plan):
    sealed = write(store, plan)
    settled = store.settle(plan.key, ReceiptEvent.COMMIT, version=1)
    assert {(receipt.state, receipt.version) for receipt in settled} == {(ReceiptState.COMMITTED, 1)}
    assert store.settle(plan.key, ReceiptEvent.REFUSE, reason=Reason.LATE) == []
    assert store.pending() == []
    assert store.load_sealed(sealed.digest)


def test_a_verdict_on_a_later_attempt_settles_the_receipts_of_the_first(store, plan):
    sealed = write(store, plan)
    again = replace(plan, attempt=2)
    store.readdress(sealed.digest, again.key)
    assert len(store.pending()) == 2
    settled = store.settle(again.key, ReceiptEvent.COMMIT, version=1)
    assert {receipt.key.attempt for receipt in settled} == {plan.key}
    assert store.pending() == []


def test_the_verdict_of_another_run_over_the_same_bytes_leaves_receipts_alone(store, plan):
    sealed = write(store, plan)
    other = replace(plan, run=RunId("run-2"))
    store.readdress(sealed.digest, other.key)
    assert store.settle(other.key, ReceiptEvent.COMMIT, version=1) == []
    assert store.receipt(key_of(plan, 0)).state is ReceiptState.SEALED


def test_pruned_bytes_are_gone_but_their_release_is_remembered(store, plan, tmp_path):
    write(store, plan)
    assert store.prune(keep_bytes=0) == []
    store.settle(plan.key, ReceiptEvent.COMMIT, version=1)
    assert store.prune(keep_bytes=2**20) == []
    pair = (plan.base.model_hash, plan.task.hash)
    assert store.prune(keep_bytes=0) == [pair]
    assert store.released() == {pair: ""}
    assert list((tmp_path / "blobs").iterdir()) == []


def test_a_last_word_on_an_update_never_changes(store, plan):
    key = key_of(plan, 0)
    first = Receipt(key=key, digest="blake3:aa", state=ReceiptState.NOT_COUNTED, reason=Reason.LATE)
    store.record([first])
    store.record([Receipt(key=key, digest="blake3:bb", state=ReceiptState.NOT_COUNTED, reason=Reason.INVALID)])
    assert store.receipt(key) == first


def test_a_leader_epoch_never_goes_backwards(store):
    store.raise_leader_epoch(3)
    store.raise_leader_epoch(3)
    with pytest.raises(StaleEpoch):
        store.raise_leader_epoch(2)
    assert store.leader_epoch == 3


def test_a_full_disk_leaves_nothing_half_written(store, plan, tmp_path, monkeypatch):
    def no_space(path: Path, sealed: Sealed) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("combiners.zone.write_sealed", no_space)
    with pytest.raises(DiskFull):
        write(store, plan)
    assert store.pending() == []
    assert list((tmp_path / "blobs").iterdir()) == []


def test_the_ledger_chains_over_restarts(store, tmp_path, combiner_kit):
    control = Control(counts={"Report": 1}, bytes_out=10, seconds=1.0)
    key = combiner_kit.ledger.key
    assert store.ledger.append(control, key)[0] == 1
    sequence, head = store.ledger.append(control, key)
    summary = verify_rows(store.ledger.signed_rows(), combiner_kit.ledger.certificate)
    assert (sequence, summary.num_rows, summary.head) == (2, 2, head)


def test_sealed_bytes_that_were_changed_on_disk_are_not_read(plan, tmp_path):
    sealed, path = sealed_of(plan), tmp_path / "one.partial"
    write_sealed(path, sealed)
    assert read_sealed(path, sealed.digest).head == sealed.head
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreDamaged):
        read_sealed(path, sealed.digest)


def test_only_a_release_is_sealed(plan):
    with pytest.raises(TypeError):
        seal(object(), plan.base.layout_hash)  # type: ignore[arg-type]
