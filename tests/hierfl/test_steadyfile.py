"""Files that go to the disk while they are written, and work that threads share."""

from __future__ import annotations

import os
import resource

import numpy as np
import pytest

from hierfl import parallel
from hierfl.steadyfile import STEP_BYTES, SteadyFile


def test_a_file_is_what_was_written(tmp_path):
    path = tmp_path / "file"
    large = np.arange(STEP_BYTES // 8 * 3 + 7)
    with SteadyFile(path) as file:
        file.write(b"head")
        file.write(np.empty(0, np.float32))
        file.write(large)
        file.write(memoryview(b"tail"))
        file.sync()
    assert path.read_bytes() == b"head" + large.tobytes() + b"tail"
    with pytest.raises(FileExistsError):
        SteadyFile(path)


def test_a_sync_on_the_way_that_failed_is_told(tmp_path, monkeypatch):
    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    with SteadyFile(tmp_path / "file") as file:
        file.write(bytes(STEP_BYTES))
        with pytest.raises(OSError, match="Input/output"):
            file.sync()


def test_a_full_disk_is_told_at_once_or_at_the_end(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        file = SteadyFile(tmp_path / "file")
        with pytest.raises(OSError, match="too large"):
            file.write(bytes(2 * STEP_BYTES))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.close()


def test_each_part_is_done_once_and_results_keep_their_order():
    assert parallel.each(lambda part: part * part, range(100)) == [part * part for part in range(100)]
    assert parallel.each(str, []) == []
    assert parallel.each(str, [7]) == ["7"]


def test_an_error_is_raised_when_no_part_is_being_done_any_more():
    done = []

    def work(part: int) -> None:
        if part == 3:
            raise ZeroDivisionError
        done.append(part)

    with pytest.raises(ZeroDivisionError):
        parallel.each(work, range(10))
    assert sorted(done) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
