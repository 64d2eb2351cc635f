"""Error feedback at a client: what an update left out is added to the next one, once it was counted and never before.

The app adds 0.5 to each of four values, and one of the four is sent: round 1 sends the first, 0.5; where that counts,
round 2 has 0.5 of the first and 1.0 of the others, and sends the second.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hierfl import encodings
from hierfl.aggregation import ColumnGroup, GroupKind, Weighting
from hierfl.client import making
from hierfl.client.held import Held, HeldUpdates, Work, encode_update
from hierfl.client.residuals import KEEP_RUNS, Residuals
from hierfl.errors import StorageError, StoreDamaged
from hierfl.plan import Plan
from hierfl.receipts import ReceiptState
from hierfl.records import UpdateHead
from hierfl.types import ModelHash, RunId, TaskKind

TOPK = encodings.spec("topk", {"fraction": 0.25})
ENCODING = encodings.get(TOPK.name, TOPK.options)
GROUPS = (ColumnGroup(name="train", kind=GroupKind.FIXED, s=28, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=4),)
RUN = RunId("r")
VECTORS = {"train": np.arange(5, dtype=np.float32)}
LEFT_OUT = {"train": np.array([0, 1, 2, 3], np.float32)}

MakePlan = Callable[..., Plan]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something on the client's side that the combiner does not see."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


# --- over real gRPC


@pytest.fixture
def topk(plan: MakePlan, combiner: Any) -> MakePlan:
    combiner.encoding = "topk"
    return lambda **changes: plan(encoding=TOPK, **changes)


def sent(combiner: Any) -> list[tuple[int, float]]:
    """Per update received the one entry in it."""
    return [(int(u.vectors["train.index"][0]), float(u.vectors["train"][0])) for u in combiner.received]


async def test_what_a_counted_update_left_out_goes_along_with_the_next(
    combiner: Any, running: Any, topk: MakePlan
) -> None:
    for number in (1, 2, 3):
        combiner.offer(topk(round=number))
        async with running():  # another process each time
            await combiner.until(lambda number=number: len(combiner.received) == number)
            combiner.tell_all(ReceiptState.COMMITTED, version=number)
            await until(lambda number=number: f"counted in model version {number}" in running.said)
        combiner.offers.clear()
    assert sent(combiner) == [(0, 0.5), (1, 1.0), (2, 1.5)]


@pytest.mark.parametrize("reason", ["invalid", "attempt_abandoned", "late"])
async def test_what_an_update_that_was_not_counted_left_out_is_forgotten(
    combiner: Any, running: Any, topk: MakePlan, reason: str
) -> None:
    combiner.offer(topk())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
        combiner.tell_all(ReceiptState.NOT_COUNTED, reason=reason)
        combiner.offer(topk(round=2))
        await combiner.until(lambda: len(combiner.received) == 2)
    assert sent(combiner) == [(0, 0.5), (0, 0.5)]


async def test_a_new_attempt_has_the_same_bytes_and_one_of_them_advances_the_residual(
    combiner: Any, running: Any, topk: MakePlan
) -> None:
    combiner.offer(topk())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
        combiner.tell_all(ReceiptState.NOT_COUNTED, reason="attempt_abandoned")
        combiner.offer(topk(attempt=2))
        await combiner.until(lambda: len(combiner.received) == 2)
        combiner.tell_all(ReceiptState.COMMITTED, version=1)
        combiner.offer(topk(round=2))
        await combiner.until(lambda: len(combiner.received) == 3)
    assert combiner.received[0].digest == combiner.received[1].digest
    assert sent(combiner)[2] == (1, 1.0)


async def test_an_update_waits_for_the_last_word_on_the_one_before(combiner: Any, running: Any, topk: MakePlan) -> None:
    combiner.offer(topk())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
        combiner.offer(topk(round=2))
        asked = combiner.calls.count("GetReceipts")
        await combiner.until(lambda: combiner.calls.count("GetReceipts") > asked)
        assert len(combiner.received) == 1
        combiner.tell_all(ReceiptState.COMMITTED, version=1)
        await combiner.until(lambda: len(combiner.received) == 2)
    assert sent(combiner) == [(0, 0.5), (1, 1.0)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_without_that_word_it_goes_without_and_nothing_is_sent_twice_in_whatever_order_the_words_come(
    combiner: Any, running: Any, topk: MakePlan, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    monkeypatch.setattr(making, "RESIDUAL_WAIT_S", 0.1)
    combiner.offer(topk())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
        combiner.offer(topk(round=2))
        await combiner.until(lambda: len(combiner.received) == 2)
        assert "no last word on the update before" in running.said
        for which in order:
            receipt = list(combiner.book.values())[which]
            combiner.tell(
                type(receipt)(key=receipt.key, digest=receipt.digest, state=ReceiptState.COMMITTED, version=which + 1)
            )
        await until(lambda: all(f"model version {number}" in running.said for number in (1, 2)))
        combiner.offer(topk(round=3))
        await combiner.until(lambda: len(combiner.received) == 3)
    assert sent(combiner) == [(0, 0.5), (0, 0.5), (1, 1.0)], "round 3 has what round 1 left out; round 2's is lost"


async def test_an_update_that_the_combiner_does_not_know_is_not_waited_for(
    combiner: Any, running: Any, topk: MakePlan
) -> None:
    combiner.offer(topk())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
        combiner.book.clear()
        combiner.offer(topk(round=2))
        async with asyncio.timeout(making.RESIDUAL_WAIT_S / 2):
            await combiner.until(lambda: len(combiner.received) == 2)
    assert sent(combiner) == [(0, 0.5), (0, 0.5)]


async def test_a_damaged_residual_begins_anew_and_the_site_is_told(combiner: Any, running: Any, topk: MakePlan) -> None:
    combiner.offer(topk())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
        combiner.tell_all(ReceiptState.COMMITTED, version=1)
        await until(lambda: "counted in model version 1" in running.said)
        residual = next(running.directory.rglob("residuals/*"))
        residual.write_bytes(residual.read_bytes()[:-1])
        combiner.offer(topk(round=2))
        await combiner.until(lambda: len(combiner.received) == 2)
    assert sent(combiner) == [(0, 0.5), (0, 0.5)]
    assert "was damaged; it begins anew" in running.said


async def test_the_end_of_a_run_ends_its_residual(combiner: Any, running: Any, topk: MakePlan) -> None:
    combiner.offer(topk())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
        combiner.tell_all(ReceiptState.COMMITTED, version=1)
        await until(lambda: "counted in model version 1" in running.said)
        assert list(running.directory.rglob("residuals/*"))
        combiner.offer(topk(round=2))
        await combiner.until(lambda: len(combiner.received) == 2)
        combiner.tell_all(ReceiptState.NOT_COUNTED, reason="run_cancelled")
        await until(lambda: "run_cancelled" in running.said)
    assert list(running.directory.rglob("residuals/*")) == []


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
async def test_dense_encodings_keep_nothing_and_travel_by_their_name(
    combiner: Any, running: Any, plan: MakePlan, name: str
) -> None:
    combiner.encoding = name
    combiner.offer(plan(encoding=encodings.spec(name)))
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
    received = {vector: [values] for vector, values in combiner.received[0].vectors.items()}
    assert np.allclose(encodings.get(name).decode(GROUPS[0], received), 0.5, rtol=2**-7)
    assert not list(running.directory.rglob("*.residual"))


@pytest.mark.parametrize("name", ["bfloat16", "int8", "topk", "randomk"])
async def test_an_encoded_update_that_is_held_is_sent_after_a_restart_with_the_same_bytes(
    combiner: Any, running: Any, linear: Any, plan: MakePlan, name: str
) -> None:
    combiner.encoding, combiner.refuse_uploads = name, 10**6
    combiner.offer(plan(encoding=encodings.spec(name)))
    async with running():
        await combiner.until(lambda: "Upload refused" in combiner.calls)
    combiner.refuse_uploads = 0
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
    assert len(linear.calls) == 1
    assert f'"encoding":"{name}"' in next(running.directory.rglob("updates/*.json")).read_text()


# --- on disk: at each step a crash leaves the old residual or the new one


def held(round_number: int) -> Held:
    work = Work(run=RUN, task=TaskKind.TRAIN, round=round_number, base_model_hash=ModelHash("m"), task_hash="t")
    head = UpdateHead(weight=3, metrics={}, base_model_hash=ModelHash("m"), task_hash="t")
    outgoing = encode_update("0" * 64, VECTORS, head)
    return Held(
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


def stored(folder: Path) -> list[float]:
    loaded = Residuals(folder).load(RUN, ENCODING, GROUPS)
    return loaded["train"].tolist() if loaded else []


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A client's folder with a residual of earlier rounds, and an update whose residual would be the next."""
    folder = tmp_path / "client"
    residuals, updates = Residuals(folder), HeldUpdates(folder)
    earlier = held(1)
    updates.save(earlier, VECTORS, {"train": np.full(4, 9, np.float32)})
    residuals.advance(RUN, updates.residual(earlier.work))
    updates.drop(earlier.work)
    updates.save(held(2), VECTORS, LEFT_OUT)
    return folder


def test_a_residual_is_the_old_one_until_its_update_is_counted(before: Path) -> None:
    assert stored(before) == [9] * 4
    updates, residuals = HeldUpdates(before), Residuals(before)
    residuals.advance(RUN, updates.residual(held(2).work))
    assert stored(before) == [0, 1, 2, 3]


def test_a_crash_between_the_rename_and_the_drop_moves_nothing_twice(before: Path) -> None:
    updates, residuals = HeldUpdates(before), Residuals(before)
    residuals.advance(RUN, updates.residual(held(2).work))
    again = HeldUpdates(before)  # the process that comes after the crash is told COMMITTED once more
    assert again.find(held(2).work) is not None
    assert again.carrier(held(3).work) is None
    residuals.advance(RUN, again.residual(held(2).work))
    again.drop(held(2).work)
    assert stored(before) == [0, 1, 2, 3]


def test_a_crash_before_the_update_is_held_leaves_no_residual_of_it(before: Path) -> None:
    updates = HeldUpdates(before)
    record = updates.folder / f"{held(2).work.id}.json"
    record.unlink()  # as if the crash had come between the residual and the record
    assert HeldUpdates(before).carrier(held(3).work) is None
    assert not updates.residual(held(2).work).exists()
    assert stored(before) == [9] * 4


def test_an_update_that_cannot_be_held_leaves_no_residual(before: Path) -> None:
    updates = HeldUpdates(before)
    (updates.folder / f"{held(3).work.id}.json").mkdir()  # its record cannot be written
    with pytest.raises(StorageError):
        updates.save(held(3), VECTORS, LEFT_OUT)
    assert not updates.residual(held(3).work).exists()


def test_a_residual_goes_with_its_update(before: Path) -> None:
    updates = HeldUpdates(before)
    assert updates.carrier(held(2).work) is None, "it is the work's own"
    found = updates.carrier(held(3).work)
    assert found is not None
    assert updates.carrier(replace(held(3).work, run=RunId("another"))) is None
    updates.mark(found, ReceiptState.NOT_COUNTED)
    assert updates.carrier(held(3).work) is None
    updates.drop(found.work)
    assert not updates.residual(found.work).exists()
    assert stored(before) == [9] * 4


@pytest.mark.parametrize("damage", [b"", b"\0" * 15, b"\0" * 20, np.full(4, np.nan, np.float32).tobytes()])
def test_a_damaged_residual_is_refused_once(before: Path, damage: bytes) -> None:
    next((before / "residuals").iterdir()).write_bytes(damage)
    with pytest.raises(StoreDamaged, match="begins anew"):
        stored(before)
    assert stored(before) == []


def test_the_newest_runs_residuals_are_kept(before: Path) -> None:
    residuals = Residuals(before)
    for number in range(KEEP_RUNS):
        path = residuals.folder / f"run-{number}.float32"
        shutil.copy(residuals.folder / "r.float32", path)
        os.utime(path, (number + 2**31, number + 2**31))
    residuals.advance(RUN, HeldUpdates(before).residual(held(2).work))
    kept = sorted(path.stem for path in residuals.folder.iterdir())
    assert kept == ["r", *(f"run-{number}" for number in range(1, KEEP_RUNS))]
