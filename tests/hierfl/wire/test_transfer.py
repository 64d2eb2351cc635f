"""Transfers: what is sent is what arrives, under one digest; anything else is refused by name."""

import hashlib
import random
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hierfl import documents
from hierfl.errors import DigestMismatch, LayoutMismatch, TransferIncomplete, WireError
from hierfl.types import AttemptKey, RunId, TaskKind
from hierfl.wire import arrow, digest, transfer
from hierfl.wire.header import MAX_HEADER_BYTES
from hierfl.wire.transfer import Expect, Incoming, Outgoing, VectorSpec

LAYOUT = "ab" * 32
KEY = AttemptKey(RunId("run-1"), TaskKind.TRAIN, 3, 1)
CAP = 2**30


def outgoing(num_train: int = 5, num_mean: int = 2, **options: object) -> Outgoing:
    vectors = {"train": np.arange(num_train, dtype=np.float32), "mean": np.arange(num_mean, dtype=np.float32)}
    return Outgoing("update", LAYOUT, vectors, meta=b'{"weight":3}', **options)


def expecting(sent: Outgoing, **changes: object) -> Expect:
    spec = {"kind": "update", "layout_hash": LAYOUT, "vectors": sent.descriptor.vectors, "max_bytes": CAP}
    return Expect(**(spec | changes))


def received(frames, expect: Expect) -> Incoming:
    incoming = Incoming(expect)
    for frame in frames:
        incoming.feed(frame)
    incoming.close()
    return incoming


def test_what_is_sent_arrives():
    sent = outgoing()
    got = received(sent.frames(KEY, b"\x01\x02"), expecting(sent))
    assert {name: vector.tolist() for name, vector in got.vectors().items()} == {
        "train": [0, 1, 2, 3, 4],
        "mean": [0, 1],
    }
    assert got.header.key == KEY
    assert got.header.ticket_bytes == b"\x01\x02"
    assert got.meta == b'{"weight":3}'
    assert got.digest == sent.digest
    assert got.complete


@pytest.mark.parametrize("num_values", [0, 1, 262_143, 262_144, 262_145, 524_289])
def test_chunks_are_full_but_the_last_and_never_span_two_vectors(num_values):
    sent = outgoing(num_train=num_values, num_mean=3)
    got = received(sent.frames(), expecting(sent))
    lengths = [chunk.size for chunk in got.chunks["train"]]
    assert sum(lengths) == num_values
    assert all(length == 262_144 for length in lengths[:-1])
    assert [chunk.size for chunk in got.chunks["mean"]] == [3]
    assert len(list(sent.frames())) == sent.descriptor.num_chunks + 2
    assert got.vectors()["train"].tobytes() == np.arange(num_values, dtype=np.float32).tobytes()


def test_a_transfer_without_values_has_no_chunk():
    sent = Outgoing("update", LAYOUT, {"train": np.empty(0, np.float32)}, meta=b"{}")
    assert len(list(sent.frames(KEY))) == 2
    assert received(sent.frames(KEY), expecting(sent)).vectors()["train"].shape == (0,)


def test_an_evaluation_has_no_vector_at_all():
    sent = Outgoing("update", LAYOUT, {}, meta=b'{"metrics":{}}')
    assert received(sent.frames(KEY), expecting(sent)).vectors() == {}


def test_a_partial_is_int64():
    sums = np.array([-(2**63), 2**63 - 1, 0], np.int64)
    sent = Outgoing("partial", LAYOUT, {"train": sums})
    got = received(sent.frames(KEY), expecting(sent, kind="partial"))
    assert got.vectors()["train"].tolist() == sums.tolist()
    assert sent.descriptor.encoding == "int64"


def encoded(num_blocks: int = 2) -> Outgoing:
    vectors = {"train": np.arange(5, dtype=np.int8), "train.scale": np.ones(num_blocks, np.float32)}
    return Outgoing("update", LAYOUT, vectors, encoding="int8-blocks")


def test_an_encoding_has_vectors_of_several_dtypes():
    sent = encoded()
    got = received(sent.frames(), expecting(sent, encoding="int8-blocks"))
    assert [(spec.name, spec.dtype) for spec in got.descriptor.vectors] == [
        ("train", "int8"),
        ("train.scale", "float32"),
    ]
    assert got.vectors()["train"].tolist() == [0, 1, 2, 3, 4]


def test_an_encoding_that_was_not_asked_for_is_refused():
    with pytest.raises(LayoutMismatch, match="'int8-blocks', expected is 'float32'"):
        received(encoded().frames(), expecting(encoded()))


def test_fewer_values_than_expected_are_taken_where_their_number_is_a_bound():
    most = encoded(num_blocks=3).descriptor.vectors
    rule = {"encoding": "int8-blocks", "vectors": most, "at_most": True}
    assert received(encoded().frames(), expecting(encoded(), **rule)).vectors()["train.scale"].size == 2
    with pytest.raises(LayoutMismatch):
        received(encoded(num_blocks=4).frames(), expecting(encoded(), **rule))


def test_received_chunks_are_views_on_the_frames():
    sent = outgoing()
    frames = list(sent.frames())
    got = received(frames, expecting(sent))
    assert np.shares_memory(got.chunks["train"][0], np.frombuffer(frames[1], np.uint8))
    assert not got.chunks["train"][0].flags.writeable


def test_frames_are_encoded_once_for_all_receivers():
    sent = outgoing()
    first, second = list(sent.frames(KEY)), list(sent.frames())
    assert first[0] != second[0]
    assert all(one is other for one, other in zip(first[1:-1], second[1:-1], strict=True))


def test_frames_made_as_they_are_sent_are_those_of_a_kept_copy():
    kept, made = outgoing(num_train=600_000), outgoing(num_train=600_000, keeps_copy=False)
    assert made.digest == kept.digest
    assert list(made.frames(KEY)) == list(kept.frames(KEY)) == list(made.frames(KEY))


def test_a_receiver_that_keeps_no_frames_has_the_same_vectors_and_checks_the_same():
    sent = outgoing(num_train=600_000)
    incoming = Incoming(expecting(sent), keeps_frames=False)
    for frame in sent.frames():
        incoming.feed(frame)
    incoming.close()
    assert not incoming.frames
    assert incoming.vectors()["train"].tolist() == list(range(600_000))
    assert np.concatenate(incoming.chunks["train"]).tolist() == list(range(600_000))
    other = Incoming(expecting(sent, digest="blake3:" + 64 * "0"), keeps_frames=False)
    for frame in sent.frames():
        other.feed(frame)
    with pytest.raises(DigestMismatch):
        other.close()


def test_threads_that_share_a_transfer_see_one_encoding():
    sent = outgoing(num_train=600_000)
    seen: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: seen.append([id(f) for f in list(sent.frames())[1:-1]])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4
    assert all(ids == seen[0] for ids in seen)


def test_a_received_transfer_is_passed_on_under_its_own_digest():
    sent = outgoing(num_train=300_000, digest_alg="sha256")
    got = received(sent.frames(KEY, b"t"), expecting(sent))
    passed_on = Outgoing.of(got)
    again = received(passed_on.frames(), expecting(sent, digest=sent.digest))
    assert again.digest == sent.digest
    assert again.frames[0] is got.frames[0]
    assert passed_on.length_bytes == sent.length_bytes


def test_half_a_transfer_is_not_passed_on():
    sent = outgoing()
    half = Incoming(expecting(sent))
    half.feed(next(sent.frames()))
    with pytest.raises(TransferIncomplete):
        Outgoing.of(half)


def test_the_digest_is_the_documented_root():
    values = np.arange(300_000, dtype=np.float32)
    sent = Outgoing("update", LAYOUT, {"train": values}, meta=b"{}", digest_alg="sha256")
    descriptor = documents.encode(sent.descriptor)
    chunks = [hashlib.sha256(part.tobytes()).digest() for part in (values[:262_144], values[262_144:])]
    head = b"hierfl.transfer/1\0" + len(descriptor).to_bytes(8, "little") + descriptor
    assert sent.digest == "sha256:" + hashlib.sha256(head + b"".join(chunks)).hexdigest()


def test_key_and_ticket_are_outside_of_the_digest_and_everything_else_is_in_it():
    base = outgoing()
    other_key = AttemptKey(RunId("run-1"), TaskKind.TRAIN, 3, 2)
    assert received(base.frames(other_key, b"x"), expecting(base)).digest == base.digest
    assert outgoing(num_train=6).digest != base.digest
    changed = Outgoing("update", LAYOUT, base_vectors(), meta=b'{"weight":4}')
    assert changed.digest != base.digest
    assert Outgoing("model", LAYOUT, base_vectors(), meta=b'{"weight":3}').digest != base.digest


def base_vectors() -> dict[str, np.ndarray]:
    return {"train": np.arange(5, dtype=np.float32), "mean": np.arange(2, dtype=np.float32)}


@pytest.mark.parametrize("alg", ["blake3", "sha256"])
def test_the_header_names_the_digests_algorithm(alg):
    sent = outgoing(digest_alg=alg)
    assert sent.digest.startswith(f"{alg}:")
    assert received(sent.frames(), expecting(sent, digest=sent.digest)).descriptor.digest_alg == alg


def test_an_unknown_algorithm_is_refused_by_name():
    with pytest.raises(WireError, match="'md5' is none of blake3, sha256"):
        outgoing(digest_alg="md5")
    with pytest.raises(WireError, match="no digest"):
        digest.check("sha256:ABC")


# ---------------------------------------------------------------- what is refused


def test_half_a_transfer_is_incomplete():
    sent = outgoing(num_train=600_000)
    frames = list(sent.frames())
    for count in range(len(frames)):
        incoming = Incoming(expecting(sent))
        for frame in frames[:count]:
            incoming.feed(frame)
        assert not incoming.complete
        with pytest.raises(TransferIncomplete):
            incoming.close()


def test_a_trailer_before_the_last_chunk_is_incomplete():
    sent = outgoing(num_train=600_000)
    frames = list(sent.frames())
    with pytest.raises(TransferIncomplete, match="after 1 of 4 chunks"):
        received([*frames[:2], frames[-1]], expecting(sent))


def test_a_frame_after_the_trailer_is_refused():
    sent = outgoing()
    frames = list(sent.frames())
    with pytest.raises(WireError, match="after the trailer"):
        received([*frames, frames[-1]], expecting(sent))


def test_a_changed_value_is_a_digest_mismatch():
    sent = outgoing()
    frames = list(sent.frames())
    frames[1] = arrow.encode_chunk(np.array([0, 1, 2, 3, 5], np.float32))
    with pytest.raises(DigestMismatch, match="send it again"):
        received(frames, expecting(sent))


def test_another_digest_than_expected_is_refused():
    sent, other = outgoing(), outgoing(num_train=6)
    with pytest.raises(DigestMismatch, match="was expected"):
        received(sent.frames(), expecting(sent, digest=other.digest))
    with pytest.raises(DigestMismatch):
        received(sent.frames(), expecting(sent, digest="sha256:" + "0" * 64))


def test_another_layout_or_other_vectors_are_a_layout_mismatch():
    sent = outgoing()
    with pytest.raises(LayoutMismatch, match="layout"):
        received(sent.frames(), expecting(sent, layout_hash="cd" * 32))
    wanted = (VectorSpec(name="train", dtype="float32", num_values=6),)
    with pytest.raises(LayoutMismatch, match=r"'train' float32 \(5,\)"):
        received(sent.frames(), expecting(sent, vectors=wanted))


def test_a_transfer_above_the_cap_is_refused_at_its_header():
    sent = outgoing(num_train=100_000)
    with pytest.raises(WireError, match="more than 1000"):
        Incoming(expecting(sent, vectors=None, max_bytes=1000)).feed(next(sent.frames()))


def test_another_kind_is_refused():
    sent = outgoing()
    with pytest.raises(WireError, match="kind 'update', not 'model'"):
        received(sent.frames(), expecting(sent, kind="model"))


def header_with(sent: Outgoing, **changes: object) -> bytes:
    """The header of ``sent`` with parts of its descriptor replaced by a liar."""
    header = documents.decode(next(sent.frames()), dict, "header")
    header["descriptor"] = documents.encode(documents.decode(header["descriptor"].encode(), dict, "d") | changes)
    return documents.encode(header | {"descriptor": header["descriptor"].decode()})


VECTOR = {"name": "train", "dtype": "float32", "num_values": 5}
LIES = {
    "length_bytes": {"length_bytes": 1},
    "negative length": {"length_bytes": -28},
    "num_chunks": {"num_chunks": 10**9},
    "a huge vector": {"vectors": [VECTOR | {"num_values": 2**62}], "length_bytes": 2**64, "num_chunks": 2**44},
    "a negative vector": {"vectors": [VECTOR | {"num_values": -5}], "length_bytes": -20, "num_chunks": 0},
    "a vector twice": {"vectors": [VECTOR, VECTOR], "length_bytes": 40, "num_chunks": 2},
    "a nameless vector": {"vectors": [VECTOR | {"name": ""}], "length_bytes": 20, "num_chunks": 1},
    "an unknown dtype": {"vectors": [VECTOR | {"dtype": "object"}]},
    "a dtype besides the encoding": {"vectors": [VECTOR | {"dtype": "int64"}], "length_bytes": 40, "num_chunks": 1},
    "too many vectors": {
        "vectors": [VECTOR | {"name": f"v{i}", "num_values": 0} for i in range(2000)],
        "length_bytes": 0,
        "num_chunks": 0,
    },
    "an unknown encoding": {"encoding": "pickle"},
    "an encoding without a name": {"encoding": ""},
    "an unknown digest": {"digest_alg": "md5"},
    "a layout hash": {"layout_hash": "../../etc/passwd"},
    "a missing part": {"vectors": None},
    "a number too large": {"length_bytes": 10**400},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_contradicts_itself_is_refused(lie):
    expect = Expect("update", None, None, CAP)
    with pytest.raises(WireError):
        Incoming(expect).feed(header_with(outgoing(), **LIES[lie]))


BAD_HEADERS = {
    "nothing": b"",
    "no json": b"\xff\xff\xff\xff",
    "a list": b"[]",
    "deep": b'{"x":' * 100_000,
    "deep in a field": b'{"descriptor":' + b"[" * 100_000,
    "another protocol": b'{"descriptor":"{}","key":null,"protocol":"hierfl.transfer/9","ticket":""}',
    "no descriptor": b'{"descriptor":"","key":null,"protocol":"hierfl.transfer/1","ticket":""}',
    "a surrogate": b'{"descriptor":"\\ud800x","key":null,"protocol":"hierfl.transfer/1","ticket":""}',
    "a ticket": b'{"descriptor":"{}","key":null,"protocol":"hierfl.transfer/1","ticket":"xyz"}',
    "round 0": b'{"descriptor":"{}","key":{"attempt":1,"round":0,"run":"r","task":"train"},'
    b'"protocol":"hierfl.transfer/1","ticket":""}',
    "a path for a run": b'{"descriptor":"{}","key":{"attempt":1,"round":1,"run":"../r","task":"train"},'
    b'"protocol":"hierfl.transfer/1","ticket":""}',
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_what_is_no_header_is_refused(name):
    with pytest.raises(WireError):
        Incoming(Expect("update", None, None, CAP)).feed(BAD_HEADERS[name])


def test_a_header_above_its_cap_is_refused_before_it_is_read():
    with pytest.raises(WireError, match="header has more than"):
        transfer.read_header(b" " * (MAX_HEADER_BYTES + 1))


@pytest.mark.parametrize("trailer", [b"", b"{}", b'{"digest":1}', b'{"digest":"blake3:xy"}', b" " * 5000])
def test_what_is_no_trailer_is_refused(trailer):
    sent = outgoing()
    with pytest.raises(WireError):
        received([*list(sent.frames())[:-1], trailer], expecting(sent))


@pytest.mark.parametrize(
    "vector", [np.zeros(3), np.zeros((2, 2), np.float32), np.zeros(3, np.int64), np.float32(1.0), np.zeros(3, ">f4")]
)
def test_vectors_of_another_dtype_or_shape_are_not_sent(vector):
    with pytest.raises(WireError, match="not float32 of one dimension"):
        Outgoing("update", LAYOUT, {"train": np.asarray(vector)})


def test_meta_that_is_no_text_is_not_sent():
    with pytest.raises(WireError, match="UTF-8"):
        Outgoing("update", LAYOUT, {}, meta=b"\xff")


def test_after_an_error_a_transfer_cannot_be_completed_by_guessing():
    sent = outgoing()
    frames = list(sent.frames())
    incoming = Incoming(expecting(sent))
    incoming.feed(frames[0])
    with pytest.raises(WireError):
        incoming.feed(frames[2])
    with pytest.raises(TransferIncomplete):
        incoming.feed(frames[-1])
    with pytest.raises(TransferIncomplete):
        incoming.close()


@given(seed=st.integers(0, 2**32), in_header=st.booleans())
def test_a_stream_with_anything_changed_gives_the_same_values_or_a_wire_error(seed, in_header):
    chance, sent = random.Random(seed), outgoing()
    frames = list(sent.frames(KEY, b"ticket"))
    for _ in range(chance.randint(1, 3)):
        spoil(frames, 0 if in_header else chance.randrange(max(1, len(frames))), chance)
    try:
        got = received(frames, expecting(sent, digest=sent.digest))
    except WireError:
        return
    assert {n: v.tolist() for n, v in got.vectors().items()} == {n: v.tolist() for n, v in base_vectors().items()}


def spoil(frames: list[bytes], index: int, chance: random.Random) -> None:
    """Change one byte, cut, drop, repeat or swap frames."""
    frame = bytearray(frames[index]) if frames else bytearray()
    match chance.randrange(5):
        case 0 if frame:
            frame[chance.randrange(len(frame))] ^= 1 << chance.randrange(8)
            frames[index] = bytes(frame)
        case 1 if frame:
            frames[index] = bytes(frame[: chance.randrange(len(frame))])
        case 2:
            del frames[index : index + 1]
        case 3:
            frames.insert(index, bytes(frame))
        case _:
            chance.shuffle(frames)
