"""The log of last words: appended, found again, pruned; whole lines only."""

from __future__ import annotations

import errno
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hierfl.client import receiptlog
from hierfl.client.receiptlog import FILE, KEEP_NS, KeptReceipt, ReceiptLog, read_log, still_kept
from hierfl.errors import DiskFull
from hierfl.receipts import ReceiptState
from hierfl.types import AttemptKey, RunId, TaskKind

NOW = time.time_ns()


def receipt(number: int = 1, run: str = "r", **changes: Any) -> KeptReceipt:
    made = KeptReceipt(
        key=AttemptKey(RunId(run), TaskKind.TRAIN, number, 1),
        digest=f"blake3:{number:064x}",
        weight=3,
        state=ReceiptState.COMMITTED,
        version=number,
        at_unix_ns=NOW,
    )
    return replace(made, **changes)


def test_a_line_is_there_for_any_other_process_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    log = ReceiptLog(tmp_path)
    log.append(receipt(1))
    log.append(receipt(2))
    assert read_log(tmp_path / FILE) == [receipt(1), receipt(2)]
    log.sync()
    log.sync()
    ReceiptLog(tmp_path).append(receipt(3))
    assert [one.version for one in read_log(tmp_path / FILE)] == [1, 2, 3]


def test_half_a_line_that_a_crash_left_costs_no_other(tmp_path: Path) -> None:
    ReceiptLog(tmp_path).append(receipt(1))
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"digest":"bla')
    assert read_log(tmp_path / FILE) == [receipt(1)]
    ReceiptLog(tmp_path).append(receipt(2))
    assert read_log(tmp_path / FILE) == [receipt(1), receipt(2)]


def test_a_full_disk_is_said_and_the_next_line_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ReceiptLog(tmp_path)
    log.append(receipt(1))

    def no_space(*arguments: object, **options: object) -> None:
        with (tmp_path / FILE).open("ab") as file:
            file.write(b'{"di')
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(receiptlog.documents, "encode", no_space)
        with pytest.raises(DiskFull):
            log.append(receipt(2))
    log.append(receipt(3))
    assert read_log(tmp_path / FILE) == [receipt(1), receipt(3)]


def test_a_run_whose_newest_word_is_30_days_old_is_forgotten_and_another_keeps_all_of_its_words(tmp_path: Path) -> None:
    log = ReceiptLog(tmp_path)
    old = NOW - KEEP_NS - 10**9
    for one in (receipt(1, "gone", at_unix_ns=old), receipt(1, "kept", at_unix_ns=old), receipt(2, "kept")):
        log.append(one)
    ReceiptLog(tmp_path)
    assert [(one.key.run, one.key.round) for one in read_log(tmp_path / FILE)] == [("kept", 1), ("kept", 2)]


def test_a_log_that_grows_without_end_keeps_its_newest_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiptlog, "MOST_LINES", 10)
    monkeypatch.setattr(receiptlog, "PRUNE_EVERY", 5)
    log = ReceiptLog(tmp_path)
    for number in range(1, 41):
        log.append(receipt(number))
        assert len(read_log(tmp_path / FILE)) < 15
    rounds = [one.key.round for one in read_log(tmp_path / FILE)]
    assert rounds == list(range(rounds[0], 41))
    assert len(rounds) >= 10


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-40, 0)), max_size=30))
def test_pruning_is_by_whole_runs_and_done_once(lines: list[tuple[str, int]]) -> None:
    found = [receipt(1, run, at_unix_ns=NOW + days * 86_400 * 10**9) for run, days in lines]
    kept = still_kept(found, NOW)
    fresh = {run for run, days in lines if days > -30}
    assert kept == [one for one in found if one.key.run in fresh]
    assert still_kept(kept, NOW) == kept
