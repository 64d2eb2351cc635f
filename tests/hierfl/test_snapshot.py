"""Copies of an SQLite database that another connection holds alone and writes to."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hierfl.errors import NotFound
from hierfl.snapshot import copied


@pytest.fixture(params=["exclusive", "normal"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """In WAL mode, whose log begins anew very often."""
    made = sqlite3.connect(tmp_path / "some.sqlite", isolation_level=None, check_same_thread=False)
    made.execute(f"pragma locking_mode = {request.param}")
    made.execute("pragma journal_mode = wal")
    made.execute("pragma synchronous = off")
    made.execute("pragma wal_autocheckpoint = 5")
    made.execute("create table pairs (name text primary key, value integer, padding blob)")
    for name in ("left", "right"):
        made.execute("insert into pairs values (?, 0, zeroblob(9000))", (name,))
    yield made
    made.close()


def values(path: Path) -> tuple[int, int]:
    with copied(path) as copy:
        connection = sqlite3.connect(copy)
        try:
            assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
            left, right = connection.execute("select value from pairs order by name").fetchall()
        finally:
            connection.close()
    return left[0], right[0]


def test_a_copy_has_what_was_committed_last_although_its_writer_holds_the_file(database, tmp_path):
    database.execute("update pairs set value = 7")
    assert values(tmp_path / "some.sqlite") == (7, 7)


def test_a_copy_leaves_nothing_beside_the_original(database, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    values(tmp_path / "some.sqlite")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_every_copy_is_one_state_of_a_database_that_is_written_to_all_the_time(database, tmp_path):
    ended = threading.Event()

    def write() -> None:
        number = 0
        while not ended.wait(0.002):
            number += 1
            database.execute("begin")
            for name in ("left", "right"):
                database.execute(
                    "update pairs set value = ?, padding = zeroblob(?) where name = ?", (number, 9000, name)
                )
            database.execute("commit")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [values(tmp_path / "some.sqlite") for _ in range(60)]
    finally:
        ended.set()
        writer.join()
    assert all(left == right for left, right in seen)
    assert [left for left, _ in seen] == sorted(left for left, _ in seen)
    assert seen[-1][0] > seen[0][0]


def test_a_database_that_was_closed_needs_no_log(tmp_path):
    connection = sqlite3.connect(tmp_path / "some.sqlite")
    connection.execute("pragma journal_mode = wal")
    connection.execute("create table pairs (name text, value integer)")
    connection.executemany("insert into pairs values (?, 3)", [("left",), ("right",)])
    connection.commit()
    connection.close()
    assert not (tmp_path / "some.sqlite-wal").exists()
    assert values(tmp_path / "some.sqlite") == (3, 3)


def test_a_store_that_is_not_there_is_said(tmp_path):
    with pytest.raises(NotFound, match="--dir"), copied(tmp_path / "none.sqlite"):
        pass
