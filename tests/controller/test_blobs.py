"""Blobs and commit records: files whose names say what they contain."""

from __future__ import annotations

import resource
import tracemalloc

import numpy as np
import pytest

from controller.blobs import Blobs
from controller.commits import Commits, SignedRecord
from hierfl import documents
from hierfl.aggregation import ColumnGroup, GroupKind, Weighting
from hierfl.errors import CertificateUntrusted, DiskFull, NotFound, StoreDamaged
from hierfl.layout import Layout, model_hash
from hierfl.records import CommitRecord
from hierfl.types import ModelHash, RunId
from hierfl.wire.packed import outgoing_partial
from hierfl.wire.transfer import Outgoing


@pytest.fixture
def blobs(tmp_path):
    return Blobs(tmp_path / "blobs")


PARAMS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32(0.5).reshape(())}
LAYOUT = Layout.of(PARAMS)
VECTORS = LAYOUT.flatten(PARAMS)
GROUPS = tuple(
    ColumnGroup(name=name, kind=kind, s=32, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=size)
    for name, kind, size in (("train", GroupKind.FIXED, 100_000), ("mean", GroupKind.WIDE, 3))
)


def test_a_model_comes_back_with_its_layout(blobs):
    name = blobs.put_model(LAYOUT, VECTORS)
    assert name == model_hash(LAYOUT, VECTORS)
    assert blobs.put_model(LAYOUT, VECTORS) == name
    layout, vectors = blobs.model(name)
    assert layout == LAYOUT
    assert {k: v.tolist() for k, v in vectors.items()} == {k: v.tolist() for k, v in VECTORS.items()}


def test_a_model_that_is_not_there_is_not_found(blobs):
    for name in ("0" * 64, "../layouts/x"):
        with pytest.raises(NotFound):
            blobs.model(ModelHash(name))


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b[:-1] + b"\x01", lambda b: b + b"\0"])
def test_a_damaged_model_is_never_returned(blobs, tmp_path, spoil):
    name = blobs.put_model(LAYOUT, VECTORS)
    path = tmp_path / "blobs" / "models" / name
    path.write_bytes(spoil(path.read_bytes()))
    blobs = Blobs(tmp_path / "blobs")  # one that has nothing in memory
    if spoil(b"xy") == b"xy\0":
        assert blobs.model(name)[1]["train"].size == 7  # bytes after the vectors are no part of the model
    else:
        with pytest.raises(StoreDamaged):
            blobs.model(name)


def test_a_model_that_is_in_use_outlives_its_file_and_whatever_takes_its_place(blobs, tmp_path):
    """Mapped files are removed or renamed over, never cut: whoever reads one goes on reading what it was."""
    name = blobs.put_model(LAYOUT, VECTORS)
    path = tmp_path / "blobs" / "models" / name
    transfer, (_, vectors) = blobs.model_transfer(name), blobs.model(name)
    frames = list(transfer.frames())
    other = tmp_path / "other"
    other.write_bytes(bytes(1))
    other.replace(path)
    assert vectors["train"].tolist() == VECTORS["train"].tolist()
    path.unlink()
    assert list(transfer.frames()) == frames == list(Outgoing.over(transfer, VECTORS).frames())
    assert blobs.put_model(LAYOUT, VECTORS) == name
    with pytest.raises(ValueError, match="read-only"):
        vectors["train"][0] = 1


def test_a_stored_model_takes_no_memory_of_the_process(blobs):
    """The vectors given are let go, and neither they nor frames of them are kept."""
    layout = Layout.of({"w": np.zeros(2**20, np.float32)})
    names = []
    tracemalloc.start()
    try:
        for seed in range(3):
            values = np.random.default_rng(seed).standard_normal(2**20).astype(np.float32)
            names.append(blobs.put_model(layout, {"train": values}))
            del values
        for name in names:
            for frame in blobs.model_transfer(name).frames():
                del frame
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2**20


def test_a_strategy_state_comes_back_by_its_digest(blobs, tmp_path):
    digest = blobs.put_state({"v": np.ones(3), "m": np.arange(3.0), "step": np.array(2)})
    assert digest.startswith("sha256:")
    assert blobs.state(digest)["m"].tolist() == [0.0, 1.0, 2.0]
    assert blobs.state(digest)["step"].shape == ()
    assert blobs.put_state({}) == ""
    assert blobs.state("") == {}
    next((tmp_path / "blobs" / "states").iterdir()).write_bytes(b"no")
    with pytest.raises(StoreDamaged):
        blobs.state(digest)


@pytest.fixture
def partial() -> Outgoing:
    sums = {"train": np.arange(100_000), "mean": np.arange(6).reshape(2, 3)}
    return outgoing_partial("a" * 64, GROUPS, sums, b"{}")


def put(blobs: Blobs, partial: Outgoing) -> str:
    with blobs.arriving_partial() as file:
        for frame in partial.frames():
            file.write(frame)
        file.keep(partial.digest)
    return partial.digest


def test_a_partial_is_stored_as_it_came_and_found_by_its_digest(blobs, partial, tmp_path):
    digest = put(blobs, partial)
    assert put(blobs, partial) == digest, "again, it changes nothing"
    sums = {group.name: np.zeros(group.shape, np.int64) for group in GROUPS}
    blobs.partial(digest, GROUPS).add_into(sums)
    assert sums["train"].tolist() == list(range(100_000))
    assert sums["mean"].tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(StoreDamaged):
        blobs.partial(digest, GROUPS[:1])
    with pytest.raises(StoreDamaged):
        blobs.partial(f"blake3:{'0' * 64}", GROUPS)
    assert len(list((tmp_path / "blobs" / "partials").iterdir())) == 1


def test_a_partial_that_was_changed_on_the_disk_is_refused_wherever_it_was(blobs, partial, tmp_path):
    path = tmp_path / "blobs" / "partials" / put(blobs, partial).partition(":")[2]
    whole = path.read_bytes()
    for at in (*range(0, 2000, 7), *range(2000, len(whole), 997)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = blobs.partial(partial.digest, GROUPS)
        except StoreDamaged:
            continue
        sums = {group.name: np.zeros(group.shape, np.int64) for group in GROUPS}
        found.add_into(sums)  # it was in the framing
        assert sums["train"].tolist() == list(range(100_000))
    path.write_bytes(whole[:-1])
    with pytest.raises(StoreDamaged):
        blobs.partial(partial.digest, GROUPS)


def test_a_partial_that_is_not_kept_leaves_nothing(blobs, partial, tmp_path):
    with blobs.arriving_partial() as file:
        file.write(next(partial.frames()))
    assert list((tmp_path / "blobs" / "partials").iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(blobs, partial, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DiskFull):
            put(blobs, partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "blobs" / "partials").iterdir()) == []


def test_what_a_dead_writer_left_behind_is_removed_at_a_start(blobs, tmp_path):
    left = tmp_path / "blobs" / "models" / ".part-dead"
    left.write_bytes(b"half")
    Blobs(tmp_path / "blobs")
    assert not left.exists()


# ------------------------------------------------------------------ commit records


def record(version=1, run="r", epoch=1, weight=5) -> SignedRecord:
    document = CommitRecord(
        federation="f",
        run=RunId(run),
        round=version,
        attempt=1,
        version=version,
        model_hash=ModelHash("a" * 64),
        layout_hash="b" * 64,
        previous_hash=ModelHash("c" * 64),
        leader_epoch=epoch,
        strategy="fedavg",
        exact_in_two_tiers=True,
        partials=(),
        weight=weight,
        metrics={},
        state_digest="",
        committed_unix_ns=0,
    )
    return SignedRecord(record=documents.encode(document), signature=b"good", certificate=b"c")


def check(signed: SignedRecord) -> None:
    if signed.signature != b"good":
        raise CertificateUntrusted("not ours")


@pytest.fixture
def commits(tmp_path):
    return Commits(tmp_path / "commits", check)


def test_the_first_record_of_a_version_stands_and_the_next_writer_gets_it(commits):
    assert commits.find(RunId("r"), 1) is None
    first = commits.create(RunId("r"), 1, record(weight=5))
    assert commits.create(RunId("r"), 1, record(weight=6)) == first
    assert commits.find(RunId("r"), 1).read().weight == 5


def test_a_record_that_is_not_signed_or_not_of_its_place_is_damage(commits, tmp_path):
    commits.create(RunId("r"), 1, record())
    path = tmp_path / "commits" / "r" / "1"
    good = path.read_bytes()
    for data in (good[:-9], documents.encode(record(version=2)), documents.encode(record(run="s"))):
        path.write_bytes(data)
        with pytest.raises(StoreDamaged):
            commits.find(RunId("r"), 1)
    signed = record()
    path.write_bytes(documents.encode(SignedRecord(record=signed.record, signature=b"bad", certificate=b"c")))
    with pytest.raises(StoreDamaged, match="not ours"):
        commits.find(RunId("r"), 1)


def test_the_highest_epoch_is_found_over_all_runs(commits):
    assert commits.highest_epoch() == 0
    commits.create(RunId("r"), 1, record(epoch=3))
    commits.create(RunId("r"), 10, record(version=10, epoch=9))
    commits.create(RunId("s"), 1, record(run="s", epoch=7))
    assert commits.highest_epoch() == 9
