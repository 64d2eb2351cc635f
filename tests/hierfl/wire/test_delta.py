"""Models as differences on the wire: the same bits, gone on with where cut, and never used where they are wrong."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hierfl import delta, documents
from hierfl.errors import DigestMismatch, LayoutMismatch, TransferIncomplete, WireError
from hierfl.layout import Layout, model_hash
from hierfl.types import Float32Array, ModelHash
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.delta import DELTA, Base, DeltaHead, Difference, outgoing_delta
from hierfl.wire.fetch import Fetched, Fetcher, model_frames
from hierfl.wire.header import VectorSpec
from hierfl.wire.packed import outgoing_packed
from hierfl.wire.transfer import Expect, Incoming, Outgoing

NUM = 3 * 2**18 + 5
LAYOUT = Layout.of({"w": np.zeros(NUM, np.float32)})


class Version:
    """A model and its transfer."""

    def __init__(self, vector: Float32Array) -> None:
        self.vectors = {"train": vector}
        self.hash = model_hash(LAYOUT, self.vectors)
        self.outgoing = Outgoing("model", LAYOUT.hash, self.vectors, meta=LAYOUT.to_bytes())

    @property
    def base(self) -> Base:
        return Base.of(tuple(self.outgoing.frames()))


def changed(base: Version, share: float, seed: int = 1) -> Version:
    rng = np.random.default_rng(seed)
    vector = base.vectors["train"].copy()
    vector[rng.random(NUM) < share] += np.float32(0.5)
    return Version(vector)


FIRST = Version(np.random.default_rng(0).standard_normal(NUM).astype(np.float32))
SECOND = changed(FIRST, 0.2)
EXPECT = Expect("model", LAYOUT.hash, None, 4 * NUM, vouched=SECOND.outgoing.digest)


def difference(base: Version = FIRST, model: Version = SECOND) -> Outgoing:
    made = outgoing_delta(LAYOUT, base.hash, base.vectors, model.vectors)
    assert made is not None
    return made


class Context:
    def __init__(self) -> None:
        self.told: dict[str, str] = {}

    async def send_initial_metadata(self, metadata: Iterable[tuple[str, str]]) -> None:
        self.told.update(metadata)


class Server:
    """``FetchModel`` without a network: the difference for who has the base, if it is there. ``breaks``: after so many
    frames, once a call.
    """

    def __init__(self, deltas: Mapping[ModelHash, Outgoing], breaks: Iterable[int] = ()) -> None:
        self.deltas, self.breaks = dict(deltas), list(breaks)
        self.sent: list[tuple[str, int]] = []
        """Of each call the encoding and the number of frames."""

    def FetchModel(self, request: pb.FetchModelRequest) -> Call:  # noqa: N802  the RPC's name
        return Call(self, request)


class Call:
    def __init__(self, server: Server, request: pb.FetchModelRequest) -> None:
        outgoing = next((server.deltas[base] for base in request.bases if base in server.deltas), SECOND.outgoing)
        self._context, self._server = Context(), server
        self._encoding = outgoing.descriptor.encoding
        self._frames = self._sent(model_frames(outgoing.frames(), request, self._context))

    async def _sent(self, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        left, count = self._server.breaks.pop(0) if self._server.breaks else 10**9, 0
        self._server.sent.append((self._encoding, 0))
        async for frame in frames:
            if count == left:
                return
            count += 1
            self._server.sent[-1] = (self._encoding, count)
            yield frame

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._frames

    async def initial_metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._context.told.items())

    def cancel(self) -> None:
        """Nothing to cancel."""


async def fetch(server: Server, fetcher: Fetcher | None = None, expect: Expect = EXPECT) -> Fetched:
    bases = {FIRST.hash: FIRST.base}
    return await (fetcher or Fetcher()).fetch(server, SECOND.hash, expect, bases)  # type: ignore[arg-type]


def same(fetched: Fetched) -> bool:
    return (
        fetched.vectors()["train"].tobytes() == SECOND.vectors["train"].tobytes()
        and list(fetched.frames()) == list(SECOND.outgoing.frames())
        and fetched.layout == LAYOUT
    )


@pytest.mark.parametrize("vouched", [SECOND.outgoing.digest, "", "sha256:" + "0" * 64, "md7:00"])
async def test_a_difference_makes_the_model_and_its_transfer_bit_for_bit_and_is_smaller(vouched):
    server = Server({FIRST.hash: difference()})
    fetched = await fetch(server, expect=replace(EXPECT, vouched=vouched))
    assert fetched.base == FIRST.hash
    assert fetched.vectors()["train"].tobytes() == SECOND.vectors["train"].tobytes()
    if vouched.startswith("blake3"):
        assert same(fetched)
    assert fetched.incoming.descriptor.length_bytes < 0.3 * SECOND.outgoing.length_bytes
    assert [encoding for encoding, _ in server.sent] == [DELTA]


async def test_who_has_no_base_or_another_gets_the_whole_model():
    server = Server({ModelHash("0" * 64): difference()})
    assert same(await fetch(server))
    assert same(await Fetcher().fetch(Server({FIRST.hash: difference()}), SECOND.hash, EXPECT))  # type: ignore[arg-type]
    assert server.sent[0][0] == "float32"


async def test_too_much_change_is_no_difference():
    assert outgoing_delta(LAYOUT, FIRST.hash, FIRST.vectors, changed(FIRST, 0.3).vectors) is None


async def test_a_model_that_did_not_change_has_a_difference_without_chunks():
    nothing = difference(SECOND, SECOND)
    assert nothing.descriptor.num_chunks == 0
    fetched = await Fetcher().fetch(Server({SECOND.hash: nothing}), SECOND.hash, EXPECT, {SECOND.hash: SECOND.base})  # type: ignore[arg-type]
    assert same(fetched)


async def test_a_difference_that_is_cut_goes_on_where_it_broke_off():
    made = difference()
    assert made.descriptor.num_chunks >= 3, "or cut in other places"
    server, fetcher = Server({FIRST.hash: made}, breaks=[2, 2]), Fetcher(keeps_frames=False)
    for _ in range(2):
        with pytest.raises(TransferIncomplete):
            await fetch(server, fetcher)
    assert same(await fetch(server, fetcher))
    assert sum(count for _, count in server.sent) == made.descriptor.num_chunks + 3 + 1, "three headers and a trailer"


async def test_a_difference_that_is_cut_and_gone_is_given_up_for_the_whole_model():
    server, fetcher = Server({FIRST.hash: difference()}, breaks=[2]), Fetcher()
    with pytest.raises(TransferIncomplete):
        await fetch(server, fetcher)
    server.deltas.clear()
    assert same(await fetch(server, fetcher))
    assert [encoding for encoding, _ in server.sent] == [DELTA, "float32"]


async def test_a_difference_that_makes_another_model_is_never_used_and_said_in_the_log(caplog):
    wrong = difference(model=changed(FIRST, 0.01, seed=9))
    server = Server({FIRST.hash: wrong}, breaks=[10**9, 2])
    fetcher = Fetcher()
    with caplog.at_level(logging.WARNING), pytest.raises(TransferIncomplete):
        await fetch(server, fetcher)
    assert "fetched whole" in caplog.text
    assert same(await fetch(server, fetcher))
    assert [encoding for encoding, _ in server.sent] == [DELTA, "float32", "float32"], "it is not asked for again"


def rows() -> dict[str, np.ndarray]:
    found = delta.changes(FIRST.vectors, SECOND.vectors, NUM)
    assert found is not None
    return found


def hostile(spoil: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Outgoing:
    """A difference with other rows, described as these are."""
    made = spoil(rows())
    counts = {"train": made["train.gap"].size}
    groups = delta.groups_of(counts, {"train": max(NUM, counts["train"])})
    meta = documents.encode(DeltaHead(base=FIRST.hash, changed=counts))
    return outgoing_packed("model", LAYOUT.hash, groups, made, meta, DELTA)


def described(head: Mapping[str, Any] | bytes, vectors: tuple[VectorSpec, ...] | None = None) -> Outgoing:
    """An honest difference under another head, or with other vectors."""
    honest = difference()
    meta = head if isinstance(head, bytes) else documents.encode(head)
    specs = honest.descriptor.vectors if vectors is None else vectors
    values = (np.zeros(length, spec.dtype) for spec in specs for length in spec.chunk_lengths())
    return Outgoing.made("model", LAYOUT.hash, specs, lambda: values, meta, DELTA)


def spec(name: str, dtype: Any, num_values: int) -> VectorSpec:
    return VectorSpec(name=name, dtype=dtype, num_values=num_values)


HEAD = {"base": FIRST.hash, "changed": {"train": 3}}
BLOCKS = (spec("widths", "uint8", 2), spec("references", "int64", 2))
HOSTILE = {
    "gaps of nothing": lambda: hostile(lambda r: r | {"train.gap": np.zeros_like(r["train.gap"])}),
    "gaps beyond the end": lambda: hostile(lambda r: r | {"train.gap": r["train.gap"] * 7}),
    "steps above 32 bits": lambda: hostile(lambda r: r | {"train.step": r["train.step"] << 20}),
    "more changes than values": lambda: described(HEAD | {"changed": {"train": NUM + 1}}),
    "fewer than none": lambda: described(HEAD | {"changed": {"train": -1}}),
    "another vector": lambda: described(HEAD | {"changed": {"mean": 3}}),
    "a number of 400 digits": lambda: described(b'{"base":"a","changed":{"train":' + b"9" * 400 + b"}}"),
    "a base that was not offered": lambda: described(HEAD | {"base": "f" * 64}),
    "a head that is none": lambda: described(b"[]"),
    "other vectors": lambda: described(HEAD, (spec("train", "uint64", 4),)),
    "more words than there can be": lambda: described(HEAD, (*BLOCKS, spec("words", "uint64", 2**19))),
    "fewer words than its widths need": lambda: described(
        {"base": FIRST.hash, "changed": {"train": 10**5}}, (*BLOCKS, spec("words", "uint64", 1))
    ),
    "widths above 64 bits": lambda: Outgoing.made(
        "model",
        LAYOUT.hash,
        (*BLOCKS, spec("words", "uint64", 16)),
        lambda: iter((np.full(2, 255, np.uint8), np.zeros(2, np.int64), np.zeros(16, np.uint64))),
        documents.encode(HEAD),
        DELTA,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_strangers_difference_is_refused_and_the_model_fetched_whole(name, caplog):
    server = Server({FIRST.hash: HOSTILE[name]()})
    with caplog.at_level(logging.WARNING):
        assert same(await fetch(server))
    assert [encoding for encoding, _ in server.sent] == [DELTA, "float32"]
    assert "fetched whole" in caplog.text


def test_what_a_header_claims_is_bounded_before_anything_is_kept():
    """By the number of changes that the base has room for, and the bytes of the model."""
    bases = {FIRST.hash: FIRST.base}
    most = {"base": FIRST.hash, "changed": {"train": NUM}}
    for head in (most, HEAD):
        taken = Difference(described(head).descriptor, bases).expect(EXPECT)
        assert taken.max_bytes == 4 * NUM
        large = described(head, (*BLOCKS, spec("words", "uint64", NUM)))
        with pytest.raises((LayoutMismatch, WireError)):
            Incoming(taken).feed(next(large.frames()))


def test_a_whole_model_is_expected_where_no_base_was_offered():
    with pytest.raises(LayoutMismatch):
        Incoming(EXPECT).feed(next(difference().frames()))


def test_a_base_is_read_from_its_frames_wherever_they_lie():
    frames = tuple(map(memoryview, FIRST.outgoing.frames()))
    assert Base.of(frames).copy()["train"].tobytes() == FIRST.vectors["train"].tobytes()


def test_applying_takes_one_copy_of_the_model_and_leaves_the_base_as_it_was():
    import tracemalloc

    before = FIRST.vectors["train"].tobytes()
    made = difference()
    coming = Difference(made.descriptor, {FIRST.hash: Base(LAYOUT, lambda: {"train": [FIRST.vectors["train"]]})})
    incoming = Incoming(coming.expect(EXPECT))
    for frame in made.frames():
        incoming.feed(frame)
    tracemalloc.start()
    try:
        vectors, _ = coming.model(incoming, SECOND.hash, SECOND.outgoing.digest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert vectors["train"].tobytes() == SECOND.vectors["train"].tobytes()
    assert peak < 4 * NUM + 16 * 2**20
    assert FIRST.vectors["train"].tobytes() == before
    with pytest.raises(DigestMismatch):
        coming.model(incoming, FIRST.hash, "")
