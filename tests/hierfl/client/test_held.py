"""What a client keeps on disk: whole or not at all, found again, dropped in time."""

from __future__ import annotations

import errno
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hierfl.client import files
from hierfl.client.files import FolderLock, make_folder, write_durably
from hierfl.client.folder import ClientFolder
from hierfl.client.held import Held, HeldUpdates, LocalTensors, Work, encode_update
from hierfl.errors import DiskFull, StorageError, StoreDamaged, StoreLocked
from hierfl.receipts import ReceiptState
from hierfl.records import UpdateHead
from hierfl.types import ClientId, ClientRef, ModelHash, RegionId, RunId, SiteId, TaskKind

VECTORS = {"train": np.arange(5, dtype=np.float32), "mean": np.ones(2, np.float32)}
CLIENT = ClientRef(RegionId("eu"), SiteId("a"), ClientId("c"))


def held(round_number: int = 1, **changes: Any) -> Held:
    work = Work(run=RunId("r"), task=TaskKind.TRAIN, round=round_number, base_model_hash=ModelHash("m"), task_hash="t")
    head = UpdateHead(weight=3, metrics={"n": 3}, base_model_hash=ModelHash("m"), task_hash="t")
    outgoing = encode_update("0" * 64, VECTORS, head)
    update = Held(
        work=work,
        attempt=1,
        digest=outgoing.digest,
        layout_hash="0" * 64,
        vectors=outgoing.descriptor.vectors,
        head=head,
        state=ReceiptState.OFFERED,
        made_unix_ns=time.time_ns(),
        hold_s=60.0,
    )
    return replace(update, **changes)


def test_an_update_is_found_again_with_the_same_digest(tmp_path: Path) -> None:
    HeldUpdates(tmp_path).save(held(), VECTORS)
    updates = HeldUpdates(tmp_path)
    found = updates.find(held().work)
    assert found is not None
    assert updates.outgoing(found).digest == held().digest
    assert updates.find_key(found.key) == found
    assert len(updates) == 1


def test_an_address_and_a_last_word_outlast_a_restart_and_other_states_are_asked_for_again(tmp_path: Path) -> None:
    updates = HeldUpdates(tmp_path)
    updates.save(held(), VECTORS)
    addressed = updates.mark(updates.address(held(), 2), ReceiptState.SEALED)
    assert updates.find(held().work) == addressed
    found = HeldUpdates(tmp_path).find(held().work)
    assert found is not None
    assert (found.attempt, found.state) == (2, ReceiptState.OFFERED)
    updates.mark(addressed, ReceiptState.NOT_COUNTED)
    found = HeldUpdates(tmp_path).find(held().work)
    assert found is not None
    assert (found.attempt, found.state) == (2, ReceiptState.NOT_COUNTED)


def test_a_dropped_update_leaves_nothing(tmp_path: Path) -> None:
    updates = HeldUpdates(tmp_path)
    updates.save(held(), VECTORS)
    updates.drop(held().work)
    assert list(updates.folder.iterdir()) == []


def test_what_is_held_too_long_is_dropped(tmp_path: Path) -> None:
    updates = HeldUpdates(tmp_path)
    updates.save(held(1, made_unix_ns=time.time_ns() - 61 * 10**9), VECTORS)
    updates.save(held(2), VECTORS)
    assert [update.work.round for update in updates.drop_expired()] == [1]
    assert [update.work.round for update in HeldUpdates(tmp_path)] == [2]


def test_what_a_crash_left_half_written_is_removed(tmp_path: Path) -> None:
    updates = HeldUpdates(tmp_path)
    updates.save(held(), VECTORS)
    (updates.folder / "0123.values").write_bytes(b"never recorded")
    (updates.folder / ".4567.json.part").write_bytes(b"{")
    (updates.folder / "89ab.json").write_bytes(b"no document")
    assert len(HeldUpdates(tmp_path)) == 1
    assert len(list(updates.folder.iterdir())) == 2


def test_bytes_that_changed_on_disk_are_noticed_and_dropped(tmp_path: Path) -> None:
    updates = HeldUpdates(tmp_path)
    updates.save(held(), VECTORS)
    values = next(updates.folder.glob("*.values"))
    values.write_bytes(b"\1" + values.read_bytes()[1:])
    with pytest.raises(StoreDamaged, match="made again"):
        updates.outgoing(held())
    assert len(updates) == 0


def test_a_truncated_update_is_damaged_too(tmp_path: Path) -> None:
    updates = HeldUpdates(tmp_path)
    updates.save(held(), VECTORS)
    values = next(updates.folder.glob("*.values"))
    values.write_bytes(values.read_bytes()[:-4])
    with pytest.raises(StoreDamaged):
        updates.outgoing(held())


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_durably(tmp_path / "x", (b"old",))

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(DiskFull, match="make room"):
        write_durably(tmp_path / "x", (b"new",))
    with pytest.raises(DiskFull):
        HeldUpdates(tmp_path / "h").save(held(), VECTORS)
    assert [(path.name, path.is_dir()) for path in sorted(tmp_path.iterdir())] == [("h", True), ("x", False)]
    assert (tmp_path / "x").read_bytes() == b"old"
    assert list((tmp_path / "h" / "updates").iterdir()) == []


def test_a_folder_that_cannot_be_made_or_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        make_folder(tmp_path / "file" / "folder")
    with pytest.raises(StorageError, match="cannot be written"):
        write_durably(tmp_path / "missing" / "x", (b"",))


def test_a_folder_is_locked_by_one_at_a_time(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "client a"), pytest.raises(StoreLocked, match=r"client a already runs from .*--dir"):
        FolderLock(tmp_path, "client a")
    FolderLock(tmp_path, "client a").close()
    with pytest.raises(StorageError, match="cannot be used"):
        FolderLock(tmp_path / "missing", "client a")


def test_local_tensors_start_from_the_round_before_however_often_it_is_asked(tmp_path: Path) -> None:
    local = LocalTensors(tmp_path)
    run = RunId("r")
    assert local.load(run, 1) == {}
    for round_number in (1, 2, 3):
        local.save(run, round_number, {"n": np.array(round_number), "w": np.full((2, 2), round_number, np.float32).T})
    assert local.load(run, 3)["n"] == 2  # round 3 asked again
    assert local.load(run, 4)["n"] == 3
    assert local.load(run, 4)["n"].shape == ()
    assert local.load(RunId("other"), 4) == {}
    assert sorted(path.stem for path in (tmp_path / "local" / "r").iterdir()) == ["2", "3"]


def test_damaged_local_tensors_are_not_guessed(tmp_path: Path) -> None:
    local = LocalTensors(tmp_path)
    local.save(RunId("r"), 1, {"n": np.array(1)})
    next((tmp_path / "local" / "r").iterdir()).write_bytes(b"xx")
    with pytest.raises(StoreDamaged, match="restore or remove"):
        local.load(RunId("r"), 2)


def test_the_newest_leader_is_remembered(tmp_path: Path) -> None:
    folder = ClientFolder(tmp_path, CLIENT)
    folder.raise_epoch(5)
    folder.raise_epoch(4)
    folder.close()
    again = ClientFolder(tmp_path, CLIENT)
    assert again.leader_epoch == 5
    again.close()
    (again.path / "leader_epoch").write_text("five")
    with pytest.raises(StoreDamaged, match="does not hold a number"):
        ClientFolder(tmp_path, CLIENT)
    (again.path / "leader_epoch").unlink()
    ClientFolder(tmp_path, CLIENT).close()  # the lock was let go of


def test_only_the_newest_failures_are_kept(tmp_path: Path) -> None:
    folder = ClientFolder(tmp_path, CLIENT)
    for round_number in range(1, 26):
        last = folder.write_failure(held(round_number).key, "text")
    folder.close()
    assert len(list(last.parent.iterdir())) == 20
    assert last.read_text() == "text"
