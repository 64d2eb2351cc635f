"""Which field of which row the audit holds against something: each is changed in turn, in the rows of a real run.

The cores are pure, so this needs no files. What nothing is signed or said twice about is listed here, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
from audited import REGIONS, train

from combiners.audit import audit_zone, seals_of
from combiners.audit_ledger import Keys
from combiners.audit_rows import ZoneRows, read_blobs, read_zone
from controller.audit import audit_run
from controller.audit_regions import join
from controller.audit_rows import RunRows, SeenBlob, gather, see_blobs
from controller.auditing import audit_controller
from controller.leader import checker
from controller.rows import RunRow
from controller.store import SqliteStore
from hierfl.audit import Book, Kind, RegionSummary
from hierfl.pki import Kit
from hierfl.snapshot import copied
from hierfl.types import RegionId, RunId, TaskKind

FEDERATION = "test-federation"

NOT_HELD_IN_A_REGION = {"partials.is_kept"}
"""What retention removed is the region's word."""

NOT_HELD_AT_THE_CONTROLLER = {
    # what is told to people: a name, when, how long, why
    *("runs.request_id", "runs.ended_unix_ns", "runs.reason", "runs.last_reason", "runs.state", "runs.job"),
    *("rounds.seconds", "rounds.committed_unix_ns", "attempts.opened_unix_ns", "attempts.reason"),
    *("answers.received_unix_ns", "answers.size_bytes", "answers.code"),
    # what attempts that failed have left behind
    *("runs.rounds_abandoned", "runs.abandoned_in_a_row", "runs.evaluation_over"),
    # digests of transfers: a model's own hash is what is signed and checked
    *("runs.model_digest", "attempts.base_digest"),
}
"""A job's work is in the tasks of its attempts, whose hash the regions have sealed."""


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunId]:
    folder = tmp_path_factory.mktemp("audited")
    return folder, RunId(train(folder, drop_bits=16))


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    return next(change for kind, change in CHANGES.items() if isinstance(value, kind))(value)


def _with_another_field(value: Any) -> Any:
    name = next(field.name for field in fields(value) if field.name != "kind")
    return replace(value, **{name: changed(getattr(value, name))})


CHANGES: dict[type, Callable[[Any], Any]] = {
    Enum: lambda value: next(other for other in type(value) if other is not value),
    bool: lambda value: not value,
    int: lambda value: value + 1,
    float: lambda value: value + 1,
    str: lambda value: value[:-1] + ("0" if value[-1:] != "0" else "1"),
    bytes: lambda value: value[:-1] + bytes([(value or b"0")[-1] ^ 1]),
    tuple: lambda value: value[:-1],
    dict: lambda value: {**value, next(iter(value), "x"): 99},
    NoneType: lambda value: value,
    object: _with_another_field,
}
"""By kind; a value's is the first that it is of."""


def changes(rows: Any, names: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Each field of each row changed, one at a time: its name, and all rows with it."""
    for attribute, table in names.items():
        found = getattr(rows, attribute)
        is_one = not isinstance(found, tuple)
        for number, row in enumerate((found,) if is_one else found):
            for field in fields(row):
                other = changed(getattr(row, field.name))
                if other == getattr(row, field.name):
                    continue
                made = replace(row, **{field.name: other})
                after = made if is_one else (*found[:number], made, *found[number + 1 :])
                yield f"{table}.{field.name}", replace(rows, **{attribute: after})


# ---------------------------------------------------------------- in a region


@pytest.fixture(scope="module")
def zone(state: tuple[Path, RunId]) -> tuple[ZoneRows, Any, RunId]:
    folder, run = state
    kit = Kit.load(folder / "kits" / "regions" / "eu" / "combiner")
    rows = read_zone(folder / "regions" / "eu", RegionId("eu"))
    blobs = read_blobs(folder / "regions" / "eu", [seal.digest for seal in seals_of(rows, run)])
    key = kit.ledger.certificate.public_key()
    keys = Keys(federation=FEDERATION, region=RegionId("eu"), trust=kit.trust, ledger=key)
    return rows, lambda rows: audit_zone(rows, run, blobs, keys, 2**62), run


def test_every_field_of_every_row_in_a_region_is_held_against_something(zone):
    rows, audit, _ = zone
    assert audit(rows)[0].findings == []
    passed = {
        name
        for name, after in changes(rows, {"partials": "partials", "addresses": "addresses", "receipts": "receipts"})
        if not audit(after)[0].of_kind(Kind.WRONG)
    }
    assert passed == NOT_HELD_IN_A_REGION


def test_every_row_of_a_region_is_missed_where_it_is_not_there(zone):
    rows, audit, run = zone
    for attribute in ("partials", "addresses", "receipts"):
        found = getattr(rows, attribute)
        for number in range(len(found)):
            book, summary = audit(replace(rows, **{attribute: found[:number] + found[number + 1 :]}))
            assert book.of_kind(Kind.WRONG), found[number]
            assert summary.num_wrong == len(book.of_kind(Kind.WRONG))
    ledger = rows.ledger
    for number in range(len(ledger) - 1):
        assert audit(replace(rows, ledger=ledger[:number] + ledger[number + 1 :]))[0].of_kind(Kind.WRONG)
    assert run in rows.runs()


# ---------------------------------------------------------------- at the controller


@pytest.fixture(scope="module")
def controller(state: tuple[Path, RunId], zone: Any) -> tuple[RunRows, Any]:
    folder, run = state
    kit, directory = Kit.load(folder / "kits" / "controller"), folder / "controller"
    with copied(directory / "controller.sqlite") as copy:
        store = SqliteStore(copy, FEDERATION)
        rows = gather(Book("controller"), store, directory, run, checker(kit))
        store.close()
    blobs = see_blobs(rows, directory / "blobs")
    summaries = {RegionId(region): _summary(folder, region, run) for region in REGIONS}

    def audit(after: RunRows, seen: dict[tuple[str, str], SeenBlob] = blobs, told: Any = summaries) -> Book:
        book = Book("controller")
        audit_run(book, after, seen, FEDERATION)
        join(book, after, told)
        return book

    return rows, (audit, blobs, summaries)


def _summary(folder: Path, region: str, run: RunId) -> RegionSummary:
    kit = Kit.load(folder / "kits" / "regions" / region / "combiner")
    rows = read_zone(folder / "regions" / region, RegionId(region))
    blobs = read_blobs(folder / "regions" / region, [seal.digest for seal in seals_of(rows, run)])
    key = kit.ledger.certificate.public_key()
    keys = Keys(federation=FEDERATION, region=RegionId(region), trust=kit.trust, ledger=key)
    return audit_zone(rows, run, blobs, keys, 2**62)[1]


def test_every_field_of_every_row_at_the_controller_is_held_against_something(controller):
    rows, (audit, _, _) = controller
    assert audit(rows).findings == []
    tables = {name: name for name in ("models", "rounds", "attempts", "answers")} | {"run": "runs"}
    passed = {name for name, after in changes(rows, tables) if not audit(after).of_kind(Kind.WRONG)}
    assert sorted(passed - NOT_HELD_AT_THE_CONTROLLER) == []
    assert sorted(NOT_HELD_AT_THE_CONTROLLER - passed) == []


def test_every_row_at_the_controller_is_missed_where_it_is_not_there(controller):
    rows, (audit, _, _) = controller
    for attribute in ("models", "rounds", "attempts", "answers"):
        found = getattr(rows, attribute)
        for number, row in enumerate(found):
            assert audit(replace(rows, **{attribute: found[:number] + found[number + 1 :]})).of_kind(Kind.WRONG), row


def test_every_field_of_a_record_is_held_against_something(controller):
    """As if the controller had signed it so."""
    rows, (audit, _, _) = controller
    passed = set()
    for version, record in rows.records.items():
        for field in fields(record):
            other = replace(record, **{field.name: changed(getattr(record, field.name))})
            if not audit(replace(rows, records={**rows.records, version: other})).of_kind(Kind.WRONG):
                passed.add((field.name, version))
    # an epoch may be any that does not go down; a state or a transfer in the middle of a run is for the replay
    assert passed <= {("leader_epoch", 2), ("state_digest", 1), ("model_digest", 1), ("model_digest", 2)}


def test_every_field_of_a_regions_summary_is_held_against_something(controller):
    rows, (audit, blobs, summaries) = controller
    summary = summaries[RegionId("eu")]
    passed = set()
    for number, seal in enumerate(summary.seals):
        for field in fields(seal):
            other = replace(seal, **{field.name: changed(getattr(seal, field.name))})
            seals = (*summary.seals[:number], other, *summary.seals[number + 1 :])
            told = {**summaries, summary.region: replace(summary, seals=seals)}
            if not audit(rows, blobs, told).of_kind(Kind.WRONG):
                passed.add(field.name)
    # the region's own half has these, against its ledger and its receipts
    assert passed <= {
        *("seal_id", "base_model_hash", "task_hash", "addressed_to", "updates_root", "reason", "is_kept"),
        *("collected_in", "crossings"),
    }


def test_what_rounding_left_over_may_go_into_one_later_sum_of_its_region_only(controller):
    rows, (audit, _, _) = controller
    first, second = (
        next(a for a in rows.answers if (a.region, a.task, a.round) == ("eu", TaskKind.TRAIN, number))
        for number in (1, 2)
    )
    assert first.head.left_over
    assert second.head.carried == first.head.left_over
    other = replace(second, head=replace(second.head, carried="blake3:" + "0" * 64))
    answers = tuple(other if answer is second else answer for answer in rows.answers)
    wrong = audit(replace(rows, answers=answers), {}).of_kind(Kind.WRONG)
    assert [(one.key, one.what) for one in wrong] == [(f"{second.key} of eu", "carried")]


def test_a_blob_that_is_not_what_it_is_named_is_wrong_whatever_it_is(controller):
    rows, (audit, blobs, summaries) = controller
    for kind, name in blobs:
        seen = {**blobs, (kind, name): SeenBlob(error="not there")}
        assert [one.key for one in audit(rows, seen, summaries).of_kind(Kind.WRONG)] == [f"{kind}/{name}"]


class Moving:
    """A store that is a round behind until it has been read once."""

    def __init__(self, store: SqliteStore) -> None:
        self._store, self._times = store, 0

    def runs(self) -> list[RunRow]:
        self._times += 1
        behind = self._times == 1
        return [replace(run, rounds_committed=1, version=1) if behind else run for run in self._store.runs()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_store_that_is_read_row_by_row_is_read_until_it_keeps_still(state, controller):
    folder, run = state
    _, (_, _, summaries) = controller
    kit, directory = Kit.load(folder / "kits" / "controller"), folder / "controller"
    with copied(directory / "controller.sqlite") as copy:
        store = SqliteStore(copy, FEDERATION)
        report = audit_controller(run, directory, kit, summaries, again=True, store=Moving(store))
        store.close()
    assert report.book.findings == []
    assert (report.versions, report.replayed) == (3, 2)  # of sums that were rounded
