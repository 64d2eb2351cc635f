"""The ledger audit over a real federation: two regions, real gRPC, certificates and files; then what was tampered with.

One run for the whole module; each test looks at a copy of its folders.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audited import REGIONS, ROUNDS, train
from federations import job, noisy_app

from combiners.auditing import audit_region
from controller.auditing import audit_controller
from controller.blobs import Blobs
from controller.commits import SignedRecord
from controller.store import SqliteStore
from hierfl import documents
from hierfl.audit import Kind, SignedSummary
from hierfl.pki import Kit
from hierfl.records import COMMIT_CONTEXT, CommitRecord
from hierfl.types import ModelHash, RunId, TaskKind

FEDERATION = "test-federation"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folders of a federation that has finished a run, and the run."""
    folder = tmp_path_factory.mktemp("audited")
    return folder, train(folder)


class Copy:
    """A copy of the folders, to be tampered with and audited."""

    def __init__(self, state: Path, run: str, hierfl: Callable[..., Any]) -> None:
        self.state, self.run, self._hierfl = state, RunId(run), hierfl

    def audit(self, *options: object) -> Any:
        return self._hierfl("audit", self.run, "--dir", self.state, "-o", "json", *options)

    def wrong(self, *options: object) -> list[dict[str, str]]:
        """What the audit names, which must be something, and its exit code that of a mismatch."""
        ended = self.audit(*options)
        assert (ended.code, ended.document["ok"]) == (8, False), ended.out
        assert "HFL-702" in ended.err
        named: list[dict[str, str]] = ended.document["wrong"]
        return named

    def named(self, *options: object) -> set[tuple[str, str, str]]:
        return {(finding["where"], finding["table"], finding["key"]) for finding in self.wrong(*options)}

    def zone(self, region: str, sql: str, *values: object) -> int:
        return _change(self.state / "regions" / region / "zone.sqlite", sql, values)

    def controller(self, sql: str, *values: object) -> int:
        return _change(self.state / "controller" / "controller.sqlite", sql, values)

    @property
    def blobs(self) -> Path:
        return self.state / "controller" / "blobs"

    def store(self) -> SqliteStore:
        return SqliteStore(self.state / "controller" / "controller.sqlite", FEDERATION)

    def digest(self, region: str, number: int = 1) -> str:
        """Of a region's partial in a round of training."""
        store = self.store()
        told = next(row for row in store.rounds(self.run) if (row.task, row.round) == (TaskKind.TRAIN, number))
        store.close()
        return next(share.digest for share in told.regions if share.region == region)


def _change(path: Path, sql: str, values: tuple[object, ...]) -> int:
    database = sqlite3.connect(path)
    try:
        with database:
            changed = database.execute(sql, values).rowcount
    finally:
        database.close()
    assert changed > 0, "the test has changed nothing"
    return changed


def flip(path: Path, at: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def copy(original: tuple[Path, str], tmp_path: Path, hierfl: Callable[..., Any]) -> Copy:
    folder, run = original
    shutil.copytree(folder, tmp_path / "state")
    return Copy(tmp_path / "state", run, hierfl)


# --- what is as it was


def test_a_federation_that_nobody_touched_passes_and_its_models_come_out_again(copy):
    ended = copy.audit("--replay")
    assert ended.code == 0, ended.out
    found = ended.document
    assert (found["schema"], found["ok"], found["wrong"], found["pruned"]) == ("hierfl.audit/1", True, [], [])
    assert found["open"] == []
    assert found["controller"]["replayed"] == ROUNDS
    assert found["controller"]["missing_summaries"] == []
    assert (found["controller"]["rounds"], found["controller"]["versions"]) == (ROUNDS + 1, ROUNDS + 1)
    by_version = {int(version): weight for version, weight in found["controller"]["weights"].items()}
    for version, weight in by_version.items():
        seals = [
            s
            for r in found["regions"]
            for s in r["seals"]
            if (s["version"], "train" in s["rounds"][0]) == (version, True)
        ]
        assert weight == sum(seal["weight"] for seal in seals)
        assert [seal["updates"] for seal in seals] == [3, 3]


def test_the_audit_leaves_every_file_as_it_was(copy):
    before = {path: path.read_bytes() for path in copy.state.rglob("*") if path.is_file()}
    assert copy.audit("--replay").code == 0
    assert {path: path.read_bytes() for path in copy.state.rglob("*") if path.is_file()} == before


def test_a_table_says_the_same_in_words(copy, hierfl):
    ended = hierfl("audit", copy.run, "--dir", copy.state)
    assert ended.code == 0
    assert "all fine" in ended.out
    assert "committed(2)" in ended.out


def test_a_run_that_is_not_there_is_said_with_those_that_are(copy, hierfl):
    ended = hierfl("audit", "digits-000000", "--dir", copy.state)
    assert ended.code == 4
    assert copy.run in ended.err


# --- in its two halves


def test_the_halves_meet_on_signed_summaries_without_names(copy, hierfl, tmp_path):
    for region in REGIONS:
        kit = copy.state / "kits" / "regions" / region / "combiner"
        half = ("audit", copy.run, "--region-dir", copy.state / "regions" / region, "--kit", kit)
        assert hierfl(*half, "--write-summary", tmp_path / f"{region}.json").code == 0
    documents_there = b"".join((tmp_path / f"{region}.json").read_bytes() for region in REGIONS)
    signed = [documents.decode((tmp_path / f"{r}.json").read_bytes(), SignedSummary, r) for r in REGIONS]
    plain = documents_there + b"".join(one.document for one in signed)
    assert not [site for sites in REGIONS.values() for site in sites if site.encode() in plain]
    at = ("audit", copy.run, "--controller-dir", copy.state / "controller", "--kit", copy.state / "kits" / "controller")
    both = hierfl(*at, "--summary", tmp_path / "eu.json", "--summary", tmp_path / "us.json", "-o", "json")
    assert (both.code, both.document["controller"]["missing_summaries"]) == (0, [])
    one = hierfl(*at, "--summary", tmp_path / "eu.json")
    assert one.code == 0
    assert "the summary of region us" in one.out


def test_a_summary_that_was_changed_is_not_believed(copy, hierfl, tmp_path):
    kit = copy.state / "kits" / "regions" / "eu" / "combiner"
    file = tmp_path / "eu.json"
    half = ("audit", copy.run, "--region-dir", copy.state / "regions" / "eu", "--kit", kit, "--write-summary", file)
    assert hierfl(*half).code == 0
    signed = documents.decode(file.read_bytes(), SignedSummary, "summary")
    changed = signed.document.replace(b'"num_updates":3', b'"num_updates":4')
    file.write_bytes(documents.encode(replace(signed, document=changed)))
    at = ("audit", copy.run, "--controller-dir", copy.state / "controller", "--kit", copy.state / "kits" / "controller")
    ended = hierfl(*at, "--summary", file)
    assert (ended.code, "HFL-303" in ended.err) == (5, True)


def test_a_partial_that_retention_removed_is_pruned_and_not_missing(copy):
    digest = copy.digest("eu")
    copy.zone("eu", "update partials set is_kept = 0 where digest = ?", digest)
    (copy.state / "regions" / "eu" / "blobs" / f"{digest.replace(':', '-')}.partial").unlink()
    ended = copy.audit()
    assert ended.code == 0
    assert [(one["table"], one["key"]) for one in ended.document["pruned"]] == [("blobs", digest)]


# --- what was tampered with, in a region


def test_a_flipped_bit_in_a_regions_partial_is_named(copy):
    digest = copy.digest("eu")
    flip(copy.state / "regions" / "eu" / "blobs" / f"{digest.replace(':', '-')}.partial")
    assert ("eu", "blobs", digest) in copy.named()


def test_a_partial_that_is_gone_from_a_region_is_named(copy):
    digest = copy.digest("us", 2)
    (copy.state / "regions" / "us" / "blobs" / f"{digest.replace(':', '-')}.partial").unlink()
    assert ("us", "blobs", digest) in copy.named()


def receipt_key(copy: Copy, site: str, number: int = 1) -> str:
    region = site.partition("-")[0]
    return f"{copy.run}/train/{number}.1@{region}/{site}/client-00"


@pytest.mark.parametrize(
    "change",
    ["weight = weight + 1", "digest = 'blake3:' || substr(digest, 8, 63) || '0'", "version = 7"],
    ids=["its weight", "its digest", "its version"],
)
def test_a_receipt_that_was_changed_is_named(copy, change):
    where = " where site = 'eu-b' and task = 'train' and round = 1"
    copy.zone("eu", f"update receipts set {change}{where}")
    assert ("eu", "receipts", receipt_key(copy, "eu-b")) in copy.named()


def test_a_receipt_turned_into_not_counted_is_named(copy):
    change = "update receipts set state = 'not_counted', version = 0, reason = 'late'"
    copy.zone("us", f"{change} where site = 'us-c' and task = 'train' and round = 2")
    assert ("us", "receipts", receipt_key(copy, "us-c", 2)) in copy.named()


def test_all_receipts_of_a_seal_turned_into_not_counted_are_found_by_the_controllers_half(copy):
    change = "update receipts set state = 'not_counted', version = 0, reason = 'late'"
    copy.zone("us", f"{change} where task = 'train' and round = 2")
    assert copy.named() == {("controller", "summary", f"{copy.run}/train/2 of us")}


def test_a_receipt_that_was_deleted_leaves_its_seal_without_its_root(copy):
    copy.zone("eu", "delete from receipts where site = 'eu-a' and task = 'train' and round = 1")
    found = [one for one in copy.wrong() if (one["where"], one["table"]) == ("eu", "partials")]
    assert ("number of its receipts", "2", "3") in {(one["what"], one["found"], one["expected"]) for one in found}


def test_a_receipt_added_by_hand_is_found(copy):
    columns = "run, task, round, attempt, site, 'client-77', digest, state, version, reason, seal_id, weight, signature"
    copy.zone(
        "eu",
        f"insert into receipts select {columns}, written_unix_ns from receipts"
        " where site = 'eu-a' and task = 'train' and round = 1",
    )
    assert "number of its receipts" in {one["what"] for one in copy.wrong() if one["where"] == "eu"}


def test_a_receipt_that_says_counted_without_a_seal_is_named(copy):
    columns = "run, task, round, attempt, site, 'client-77', digest, state, version, reason, null, 0, null"
    copy.zone(
        "eu",
        f"insert into receipts select {columns}, written_unix_ns from receipts"
        " where site = 'eu-a' and task = 'train' and round = 1",
    )
    key = f"{copy.run}/train/1.1@eu/eu-a/client-77"
    assert ("eu", "receipts", key) in copy.named()


def test_a_ledger_row_that_was_changed_is_named(copy):
    changed = "cast(replace(cast(data as text), 'num_sites\":3', 'num_sites\":9') as blob)"
    copy.zone("eu", f"update ledger set data = {changed} where sequence = 1")
    named = copy.named()
    assert ("eu", "ledger", "1") in named
    assert ("eu", "ledger", "2") not in named


def test_a_ledger_row_that_was_deleted_is_named(copy):
    copy.zone("eu", "delete from ledger where sequence = 2")
    named = copy.named()
    assert ("eu", "ledger", "2") in named
    assert ("eu", "ledger", "4") not in named


def test_a_seal_that_was_deleted_is_missed_by_the_ledger_and_by_the_controller(copy):
    digest = copy.digest("us")
    zone = copy.state / "regions" / "us" / "zone.sqlite"
    (seal,) = _rows(zone, "select seal_id from partials where digest = ?", digest)
    for name in ("receipts", "addresses", "partials"):
        copy.zone("us", f"delete from {name} where seal_id = ?", seal[0])
    named = copy.named()
    assert ("us", "partials", seal[0]) in named
    assert ("controller", "rounds", f"{copy.run}/train/1 of us") in named


def _rows(path: Path, sql: str, *values: object) -> list[Any]:
    database = sqlite3.connect(path)
    try:
        return database.execute(sql, values).fetchall()
    finally:
        database.close()


# --- what was tampered with, at the controller


def test_a_flipped_bit_in_a_partial_at_the_controller_is_named(copy):
    digest = copy.digest("eu")
    flip(copy.blobs / "partials" / digest.partition(":")[2])
    assert copy.named() == {("controller", "blobs", f"partials/{digest}")}


def test_a_model_file_that_was_swapped_is_named_with_the_model_that_it_holds(copy):
    store = copy.store()
    first, second = (store.model(copy.run, version).model_hash for version in (1, 2))
    store.close()
    shutil.copyfile(copy.blobs / "models" / first, copy.blobs / "models" / second)
    (found,) = copy.wrong()
    assert (found["table"], found["key"]) == ("blobs", f"models/{second}")
    assert first in found["found"]


@pytest.mark.parametrize(
    ("table", "key", "named"),
    [
        ("models", "{run}/0000000001", ("models", "{run}/1")),
        ("rounds", "{run}/train/0000000001", ("rounds", "{run}/train/1")),
        ("attempts", "{run}/train/0000000002/0000000001", ("attempts", "{run}/2: round 2, attempt 1")),
        ("answers", "{run}/train/0000000001/0000000001/us", ("answers", "{run}/train/1.1 of us")),
    ],
)
def test_a_row_that_was_deleted_at_the_controller_is_named(copy, table, key, named):
    copy.controller(f"delete from {table} where key = ?", key.format(run=copy.run))
    assert ("controller", *(part.format(run=copy.run) for part in named)) in copy.named()


@pytest.mark.parametrize(
    ("table", "source", "target", "changes", "named"),
    [
        ("models", "{run}/0000000002", "{run}/0000000003", ('"version":2', '"version":3'), "{run}/3"),
        ("rounds", "{run}/train/0000000002", "{run}/train/0000000003", ('"round":2', '"round":3'), "{run}/train/3"),
        (
            "answers",
            "{run}/train/0000000002/0000000001/us",
            "{run}/train/0000000002/0000000002/us",
            ('"attempt":1', '"attempt":2'),
            "{run}/train/2.2 of us",
        ),
        (
            "attempts",
            "{run}/train/0000000002/0000000001",
            "{run}/train/0000000002/0000000003",
            ('"attempt":1', '"attempt":3'),
            "{run}/train/2.2",
        ),
    ],
)
def test_a_row_added_by_hand_at_the_controller_is_named(copy, table, source, target, changes, named):
    copy.controller(
        f"insert into {table} select ?, cast(replace(cast(document as text), ?, ?) as blob) from {table} where key = ?",
        *(target.format(run=copy.run), *changes, source.format(run=copy.run)),
    )
    assert ("controller", table, named.format(run=copy.run)) in copy.named()


@pytest.mark.parametrize(
    ("table", "key", "changes", "named"),
    [
        ("rounds", "{run}/train/0000000001", ('"num_updates":6', '"num_updates":7'), "{run}/train/1"),
        (
            "answers",
            "{run}/train/0000000001/0000000001/eu",
            ('"num_sites":3', '"num_sites":4'),
            "{run}/train/1.1 of eu",
        ),
        ("models", "{run}/0000000002", ('"version":2', '"version":1'), "{run}/2"),
        ("runs", "{run}", ('"rounds_committed":2', '"rounds_committed":1'), "{run}"),
        ("attempts", "{run}/train/0000000001/0000000001", ('"committed"', '"abandoned"'), "{run}/train/1.1"),
    ],
)
def test_a_row_that_was_changed_at_the_controller_is_named(copy, table, key, changes, named):
    copy.controller(
        f"update {table} set document = cast(replace(cast(document as text), ?, ?) as blob) where key = ?",
        *(*changes, key.format(run=copy.run)),
    )
    assert ("controller", table, named.format(run=copy.run)) in copy.named()


def test_a_row_that_is_no_document_any_more_is_said_with_its_table(copy):
    copy.controller("update rounds set document = cast('{' as blob) where key = ?", f"{copy.run}/train/0000000001")
    assert ("controller", "rounds", copy.run) in copy.named()


def test_a_commit_record_with_another_weight_is_not_the_controllers(copy):
    path = copy.state / "controller" / "commits" / copy.run / "1"
    signed = documents.decode(path.read_bytes(), SignedRecord, "record")
    record = replace(signed.read(), weight=1)
    path.write_bytes(documents.encode(replace(signed, record=documents.encode(record))))
    assert ("controller", "commits", f"{copy.run}/1") in copy.named()


def test_a_commit_record_signed_by_a_region_is_not_the_controllers(copy):
    path = copy.state / "controller" / "commits" / copy.run / "1"
    kit = Kit.load(copy.state / "kits" / "regions" / "eu" / "combiner")
    path.write_bytes(documents.encode(_signed(kit, documents.decode(path.read_bytes(), SignedRecord, "r").read())))
    assert ("controller", "commits", f"{copy.run}/1") in copy.named()


def test_a_commit_record_that_is_gone_or_too_many_is_named(copy):
    folder = copy.state / "controller" / "commits" / copy.run
    (folder / "2").rename(folder / "9")
    named = copy.named()
    assert {("controller", "commits", f"{copy.run}/2"), ("controller", "commits", f"{copy.run}/9")} <= named


def test_a_run_whose_own_row_is_gone_is_a_mismatch_and_not_an_unknown_run(copy, hierfl):
    copy.controller("delete from runs where key = ?", copy.run)
    ended = hierfl("audit", copy.run, "--dir", copy.state)
    assert ended.code == 8
    assert f"runs {copy.run}: the row is not there" in ended.err


# --- beside a federation that runs


@pytest.mark.timeout(180)
async def test_a_run_that_goes_on_is_audited_without_disturbing_it(federate):
    async with federate(REGIONS, app=noisy_app(num_values=50)) as federation:
        run = await federation.submit(job(rounds=12, min_regions=2, min_clients=3))
        audits = 0
        outcome = asyncio.create_task(federation.outcome(run))
        while not outcome.done():
            await federation.hear("counted in model version", times=6 * min(audits + 1, 12))
            assert await asyncio.to_thread(_audit_all, federation.directory, run) == []
            audits += 1
        found = await outcome
        assert (found.summary.state, found.summary.rounds_abandoned) == ("finished", 0)
        assert audits > 1


def _audit_all(state: Path, run: RunId) -> list[str]:
    """Both halves, as `hierfl audit` runs them; what is wrong."""
    summaries, wrong = {}, []
    for region in REGIONS:
        kit = Kit.load(state / "kits" / "regions" / region / "combiner")
        book, summary, _ = audit_region(run, state / "regions" / region, kit, state / "kits" / "sites" / region)
        summaries[summary.region] = summary
        wrong += book.of_kind(Kind.WRONG)
    kit = Kit.load(state / "kits" / "controller")
    report = audit_controller(run, state / "controller", kit, summaries, again=True)
    return [str(finding) for finding in (*wrong, *report.book.of_kind(Kind.WRONG))]


# --- what its own controller forged, with its own key


def test_a_model_made_from_other_partials_is_found_when_it_is_made_again(copy):
    """Record, rows and files all agree, signed with the controller's own key: only the partials tell."""
    store, blobs = copy.store(), Blobs(copy.blobs)
    run, model = store.runs()[0], store.model(copy.run, ROUNDS)
    layout, vectors = blobs.model(model.model_hash)
    name = blobs.put_model(layout, {key: values + np.float32(1) for key, values in vectors.items()})
    kit = Kit.load(copy.state / "kits" / "controller")
    path = copy.state / "controller" / "commits" / copy.run / str(ROUNDS)
    record = replace(documents.decode(path.read_bytes(), SignedRecord, "r").read(), model_hash=name)
    signed = _signed(kit, record)
    path.write_bytes(documents.encode(signed))
    store.close()
    made = replace(model, model_hash=name, record=signed.record, signature=signed.signature)
    _put(copy, "models", f"{copy.run}/{ROUNDS:010d}", made)
    _put(copy, "runs", copy.run, replace(run, model_hash=name))
    for task, number in (("train", ROUNDS), ("evaluate", ROUNDS + 1)):
        _replace_hash(copy, "rounds", f"{copy.run}/{task}/{number:010d}", model.model_hash, name)
    _replace_hash(copy, "attempts", f"{copy.run}/evaluate/{ROUNDS + 1:010d}/{1:010d}", model.model_hash, name)
    for region in REGIONS:  # whose last evaluation was of the model that this one stands for
        _replace_hash(
            copy, "answers", f"{copy.run}/evaluate/{ROUNDS + 1:010d}/{1:010d}/{region}", model.model_hash, name
        )
    train = {one for one in copy.named() if "evaluate" not in one[2]}
    assert train == set()
    assert ("controller", "models", f"{copy.run}/{ROUNDS}") in copy.named("--replay")


def _signed(kit: Kit, record: CommitRecord) -> SignedRecord:
    data = documents.encode(record)
    return SignedRecord(record=data, signature=kit.sign(data, COMMIT_CONTEXT), certificate=kit.certificate_der)


def _put(copy: Copy, table: str, key: str, row: object) -> None:
    copy.controller(f"update {table} set document = ? where key = ?", documents.encode(row), key)


def _replace_hash(copy: Copy, table: str, key: str, old: ModelHash, new: ModelHash) -> None:
    document = "cast(replace(cast(document as text), ?, ?) as blob)"
    copy.controller(f"update {table} set document = {document} where key = ?", old, new, key)
