"""What is kept of cut uploads, and for how long; and models fetched over calls that break off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hierfl.errors import DigestMismatch, TransferIncomplete, WireError
from hierfl.layout import Layout, model_hash
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc
from hierfl.wire.fetch import Fetcher, model_frames
from hierfl.wire.resume import Unfinished
from hierfl.wire.transfer import Expect, Incoming, Outgoing

CHUNK = 262_144


def update(value: float = 1.0, num_values: int = 5 * CHUNK + 3, **changes: object) -> Outgoing:
    return Outgoing("update", "ab" * 32, {"train": np.full(num_values, value, np.float32)}, **changes)  # type: ignore[arg-type]


SENT = update()
FRAMES = list(SENT.frames())
CHUNKS = FRAMES[1:-1]


def expecting(sent: Outgoing, digest: str | None = None) -> Expect:
    return Expect("update", None, sent.descriptor.vectors, 2**30, digest)


class Context:
    """As much of a gRPC call as ``rpc.Frames`` asks for."""

    def __init__(self, resumes: str) -> None:
        self._metadata = ((rpc.RESUME, resumes),) if resumes else ()
        self.told: dict[str, str] = {}

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self.told.update(metadata)


class Stream:
    """One call that uploads: frames go in by hand, ``cut`` is what gRPC does to it when its link breaks."""

    def __init__(
        self, unfinished: Unfinished[str], sent: Outgoing = SENT, *, asks: bool = True, who: str = "a"
    ) -> None:
        self.context = Context(sent.digest if asks else "")
        self.incoming = Incoming(expecting(sent))
        self.held = 0
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._asks = asyncio.Event()
        self.send(*list(sent.frames())[:1])
        self.task = asyncio.create_task(self._handle(unfinished, who))

    async def _frames(self) -> AsyncIterator[bytes]:
        while True:
            if self._queue.empty():
                self._asks.set()
            frame = await self._queue.get()
            if frame is None:
                return
            yield frame

    async def _handle(self, unfinished: Unfinished[str], who: str) -> Incoming:
        call = rpc.Frames(self._frames(), self.context)  # type: ignore[arg-type]
        self.incoming.feed(await rpc.first_frame(call))
        await unfinished.receive(who, call, self.incoming, hold=self._hold, silence_s=60.0)
        return self.incoming

    def _hold(self) -> Callable[[], None]:
        self.held += 1
        return self._release

    def _release(self) -> None:
        self.held -= 1

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self._asks.clear()
            self._queue.put_nowait(frame)

    def end(self) -> None:
        self._queue.put_nowait(None)

    async def taken(self) -> None:
        """Wait until it asks for more than it was sent."""
        async with asyncio.timeout(10):
            await self._asks.wait()

    async def cut(self) -> None:
        await self.taken()
        self.task.cancel()
        await asyncio.wait({self.task})
        assert self.task.cancelled()

    @property
    def there(self) -> int:
        """How many chunks the sender was told to leave out."""
        return rpc.chunks_there(self.context.told.items())


async def cut_after(unfinished: Unfinished[str], num_chunks: int, **how: object) -> Stream:
    stream = Stream(unfinished, **how)  # type: ignore[arg-type]
    stream.send(*list((how.get("sent") or SENT).frames())[1 : 1 + num_chunks])  # type: ignore[union-attr]
    await stream.cut()
    return stream


# ---------------------------------------------------------------- one transfer that goes on as another


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 6), max_size=4),
    sizes=st.lists(st.integers(0, 3 * CHUNK), min_size=1, max_size=3),
    keeps_frames=st.booleans(),
)
def test_a_transfer_cut_anywhere_any_number_of_times_is_the_same_transfer(cuts, sizes, keeps_frames):
    vectors = {f"v{n}": np.full(size, n, np.float32) for n, size in enumerate(sizes)}
    sent = Outgoing("update", "ab" * 32, vectors)
    header, *chunks, trailer = sent.frames()
    incoming = Incoming(expecting(sent, sent.digest), keeps_frames=keeps_frames)
    incoming.feed(header)
    for cut in cuts:
        for chunk in chunks[incoming.num_taken :][:cut]:
            incoming.feed(chunk)
        earlier, incoming = incoming, Incoming(expecting(sent, sent.digest), keeps_frames=keeps_frames)
        incoming.feed(header)
        assert incoming.go_on_from(earlier) == earlier.num_taken
    for frame in [*chunks[incoming.num_taken :], trailer]:
        incoming.feed(frame)
    incoming.close()
    assert incoming.digest == sent.digest
    assert incoming.frames == (chunks if keeps_frames else [])
    assert {name: vector.tolist() for name, vector in incoming.vectors().items()} == {
        name: vector.tolist() for name, vector in vectors.items()
    }


def test_nothing_is_taken_over_from_another_transfer():
    earlier = Incoming(expecting(SENT))
    empty = Incoming(expecting(SENT))
    for frame in FRAMES[:3]:
        earlier.feed(frame)
    for other in (update(digest_alg="sha256"), update(meta=b'{"x":1}')):
        incoming = Incoming(expecting(other))
        incoming.feed(next(other.frames()))
        assert incoming.go_on_from(earlier) == 0
        assert incoming.go_on_from(empty) == 0
    expects_more = Incoming(expecting(SENT, SENT.digest))
    expects_more.feed(FRAMES[0])
    assert expects_more.go_on_from(earlier) == 0


# ---------------------------------------------------------------- what a server keeps


async def test_a_cut_upload_goes_on_where_it_broke_off_as_often_as_it_takes():
    unfinished: Unfinished[str] = Unfinished()
    first = await cut_after(unfinished, 2)
    assert len(unfinished) == 1
    second = Stream(unfinished)
    second.send(CHUNKS[2])
    await second.cut()
    assert (second.there, first.held, second.held) == (2, 0, 1)
    third = Stream(unfinished)
    third.send(*CHUNKS[3:], FRAMES[-1])
    third.end()
    received = await third.task
    assert third.there == 3
    assert (received.digest, len(received.frames)) == (SENT.digest, len(CHUNKS))
    assert (len(unfinished), second.held, third.held) == (0, 0, 0)


async def test_an_upload_that_lacked_its_trailer_only_sends_just_that():
    unfinished: Unfinished[str] = Unfinished()
    await cut_after(unfinished, len(CHUNKS))
    again = Stream(unfinished)
    again.send(FRAMES[-1])
    again.end()
    assert (await again.task).digest == SENT.digest


async def test_an_upload_that_ends_early_is_kept_like_one_that_is_cut():
    unfinished: Unfinished[str] = Unfinished()
    stream = Stream(unfinished)
    stream.send(*CHUNKS[:1])
    stream.end()
    with pytest.raises(TransferIncomplete):
        await stream.task
    assert len(unfinished) == 1


async def test_a_sender_that_did_not_ask_starts_anew_and_leaves_nothing():
    unfinished: Unfinished[str] = Unfinished()
    stream = await cut_after(unfinished, 2, asks=False)
    assert (len(unfinished), stream.held) == (0, 0)
    await cut_after(unfinished, 2)
    older = Stream(unfinished, asks=False)
    older.send(*FRAMES[1:])
    older.end()
    assert (await older.task).digest == SENT.digest
    assert older.context.told == dict([rpc.GO_ON])


async def test_what_nobody_comes_back_for_is_dropped_in_time():
    unfinished: Unfinished[str] = Unfinished(keep_s=0.01)
    stream = await cut_after(unfinished, 2)
    async with asyncio.timeout(10):
        while stream.held:
            await asyncio.sleep(0.001)
    assert len(unfinished) == 0
    late = Stream(unfinished)
    await late.cut()
    assert late.there == 0


async def test_what_brought_no_chunk_is_not_kept():
    unfinished: Unfinished[str] = Unfinished()
    assert (await cut_after(unfinished, 0)).held == 0
    assert len(unfinished) == 0


@pytest.mark.parametrize("other", [update(2.0), update(meta=b'{"x":1}')], ids=["values", "descriptor"])
async def test_another_update_of_the_same_sender_goes_on_from_nothing_and_takes_nothing_away(other):
    unfinished: Unfinished[str] = Unfinished()
    await cut_after(unfinished, 2)
    stream = Stream(unfinished, other)
    stream.send(*list(other.frames())[1:])
    stream.end()
    assert (await stream.task).digest == other.digest
    assert stream.there == 0
    assert len(unfinished) == 1


async def test_a_sender_that_names_the_digest_of_another_update_gets_none_of_its_chunks():
    unfinished: Unfinished[str] = Unfinished()
    first = await cut_after(unfinished, 2)
    other = update(meta=b'{"x":1}')
    liar = Stream(unfinished, other)
    liar.context = Context(SENT.digest)
    liar.send(*list(other.frames())[1:])
    liar.end()
    assert (await liar.task).digest == other.digest
    assert (liar.there, first.held) == (0, 0)


async def test_another_senders_upload_is_not_gone_on_with():
    unfinished: Unfinished[str] = Unfinished()
    await cut_after(unfinished, 2)
    other = await cut_after(unfinished, 1, who="b")
    assert (other.there, len(unfinished)) == (0, 2)


async def test_of_two_streams_of_one_upload_the_newer_wins_and_takes_over_what_the_older_brought():
    unfinished: Unfinished[str] = Unfinished()
    older = Stream(unfinished)
    older.send(*CHUNKS[:2])
    await older.taken()
    newer = Stream(unfinished)
    with pytest.raises(TransferIncomplete, match="newer stream"):
        await older.task
    older.send(b"what it still sends goes nowhere")
    newer.send(*CHUNKS[2:], FRAMES[-1])
    newer.end()
    assert (await newer.task).digest == SENT.digest
    assert newer.there == 2
    assert (older.held, newer.held, len(unfinished)) == (0, 0, 0)


async def test_of_many_streams_at_once_the_last_wins_and_nothing_stays_held():
    unfinished: Unfinished[str] = Unfinished()
    streams = [Stream(unfinished) for _ in range(5)]
    streams[-1].send(*FRAMES[1:])
    streams[-1].end()
    assert (await streams[-1].task).digest == SENT.digest
    ended = await asyncio.gather(*(stream.task for stream in streams[:-1]), return_exceptions=True)
    assert {type(error) for error in ended} == {TransferIncomplete}
    assert [stream.held for stream in streams] == [0] * 5
    assert len(unfinished) == 0


async def test_bytes_that_do_not_fit_end_it_and_nothing_is_kept():
    unfinished: Unfinished[str] = Unfinished()
    stream = Stream(unfinished)
    stream.send(CHUNKS[0], b"\xff" * 100)
    with pytest.raises(WireError):
        await stream.task
    assert (len(unfinished), stream.held) == (0, 0)


async def test_a_whole_that_has_another_digest_is_refused_and_nothing_is_kept():
    unfinished: Unfinished[str] = Unfinished()
    await cut_after(unfinished, 2)
    spoilt = Stream(unfinished)
    spoilt.send(*list(update(2.0).frames())[3:])
    spoilt.end()
    with pytest.raises(DigestMismatch):
        await spoilt.task
    assert (len(unfinished), spoilt.held) == (0, 0)


async def test_what_is_kept_is_bounded_the_oldest_goes_first_and_a_large_one_stays_alone():
    unfinished: Unfinished[str] = Unfinished(max_bytes=5 * 2**20)
    first, second, third = [await cut_after(unfinished, 2, who=who) for who in "abc"]
    assert [stream.held for stream in (first, second, third)] == [0, 1, 1]
    large = await cut_after(Unfinished(max_bytes=10), 2)
    assert large.held == 1


async def test_what_is_over_is_dropped_and_a_stream_on_its_way_leaves_nothing():
    unfinished: Unfinished[str] = Unfinished()
    kept, other = await cut_after(unfinished, 1), await cut_after(unfinished, 1, who="b")
    streaming = Stream(unfinished, who="a2")
    streaming.send(CHUNKS[0])
    await streaming.taken()
    unfinished.drop(lambda who: who.startswith("a"))
    assert (kept.held, streaming.held, other.held) == (0, 0, 1)
    await streaming.cut()
    assert len(unfinished) == 1
    unfinished.close()
    assert (other.held, len(unfinished)) == (0, 0)
    assert (await cut_after(unfinished, 1)).held == 0, "closed, it keeps nothing more"


# ---------------------------------------------------------------- models


class ModelServer:
    """``FetchModel`` without a network: breaks off after so many chunks, once a call."""

    def __init__(self, breaks: list[int], outgoing: Outgoing | None = None) -> None:
        values = np.arange(3 * CHUNK + 5, dtype=np.float32)
        self.layout = Layout.of({"w": values})
        self.vectors = self.layout.flatten({"w": values})
        self.hash = model_hash(self.layout, self.vectors)
        self.outgoing = outgoing or Outgoing("model", self.layout.hash, self.vectors, meta=self.layout.to_bytes())
        self.breaks = breaks
        self.num_sent: list[int] = []
        self.knows_better = True
        """Whether it goes on where a caller broke off."""

    def FetchModel(self, request: pb.FetchModelRequest) -> ModelCall:  # noqa: N802  the RPC's name
        return ModelCall(self, request if self.knows_better else pb.FetchModelRequest(model_hash=request.model_hash))

    @property
    def expect(self) -> Expect:
        return Expect("model", self.layout.hash, None, 2**30)


class ModelCall:
    def __init__(self, server: ModelServer, request: pb.FetchModelRequest) -> None:
        self._server = server
        self._context = Context("")
        self._frames = self._sent(model_frames(server.outgoing.frames(), request, self._context))

    async def _sent(self, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self._server.num_sent.append(-1)  # the header
        left = self._server.breaks.pop(0) if self._server.breaks else 10**9
        async for frame in frames:
            if self._server.num_sent[-1] == left:
                return
            self._server.num_sent[-1] += 1
            yield frame

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._frames

    async def initial_metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._context.told.items())

    def cancel(self) -> None:
        """Nothing to cancel."""


async def fetched(server: ModelServer, fetcher: Fetcher, tries: int) -> Incoming:
    for _ in range(tries - 1):
        with pytest.raises(TransferIncomplete):
            await fetcher.fetch(server, server.hash, server.expect)  # type: ignore[arg-type]
    return await fetcher.fetch(server, server.hash, server.expect)  # type: ignore[arg-type]


async def test_a_model_is_fetched_over_calls_that_break_off_each_chunk_once():
    server = ModelServer([0, 1, 2])
    got = await fetched(server, Fetcher(), 4)
    assert got.vectors()["train"].tobytes() == server.vectors["train"].tobytes()
    assert server.num_sent == [0, 1, 2, 4 - 3 + 1], "and the trailer"


async def test_a_server_that_cannot_go_on_sends_all_of_it():
    server = ModelServer([2])
    server.knows_better = False
    got = await fetched(server, Fetcher(), 2)
    assert got.vectors()["train"].tobytes() == server.vectors["train"].tobytes()
    assert server.num_sent == [2, 5]


async def test_a_server_with_another_descriptor_sends_all_of_it():
    server, fetcher = ModelServer([2]), Fetcher()
    with pytest.raises(TransferIncomplete):
        await fetcher.fetch(server, server.hash, server.expect)  # type: ignore[arg-type]
    meta = server.layout.to_bytes()
    server.outgoing = Outgoing("model", server.layout.hash, server.vectors, meta=meta, digest_alg="sha256")
    await fetcher.fetch(server, server.hash, server.expect)  # type: ignore[arg-type]
    assert server.num_sent == [2, 5]


async def test_a_caller_that_claims_more_chunks_than_there_are_gets_them_all():
    server = ModelServer([])
    context = Context("")
    digest = "sha256:" + "0" * 64
    for asked in (pb.FetchModelRequest(from_chunk=2**64 - 1), pb.FetchModelRequest(from_chunk=1)):
        asked.descriptor_digest = digest
        frames = [frame async for frame in model_frames(server.outgoing.frames(), asked, context)]
        assert frames == list(server.outgoing.frames())
    assert context.told == {}


async def test_what_turns_out_to_be_another_model_is_forgotten_and_fetched_anew():
    server, fetcher = ModelServer([2]), Fetcher()
    honest = server.outgoing
    false = {"train": server.vectors["train"] + 1}
    server.outgoing = Outgoing("model", server.layout.hash, false, meta=server.layout.to_bytes())
    with pytest.raises(TransferIncomplete):
        await fetcher.fetch(server, server.hash, server.expect)  # type: ignore[arg-type]
    server.outgoing = honest
    with pytest.raises(DigestMismatch):
        await fetcher.fetch(server, server.hash, server.expect)  # type: ignore[arg-type]
    got = await fetcher.fetch(server, server.hash, server.expect)  # type: ignore[arg-type]
    assert got.vectors()["train"].tobytes() == server.vectors["train"].tobytes()


async def test_a_model_whose_digest_is_vouched_for_is_taken_and_any_other_has_to_have_the_hash():
    server = ModelServer([])
    vouching = replace(server.expect, vouched=server.outgoing.digest)
    other_name = "0" * 64
    await Fetcher().fetch(server, other_name, vouching)  # type: ignore[arg-type]  # the signature named this digest
    with pytest.raises(DigestMismatch):
        await Fetcher().fetch(server, other_name, server.expect)  # type: ignore[arg-type]
    with pytest.raises(DigestMismatch):
        await Fetcher().fetch(server, other_name, replace(vouching, vouched="blake3:" + other_name))  # type: ignore[arg-type]
    meta = server.layout.to_bytes()
    server.outgoing = Outgoing("model", server.layout.hash, server.vectors, meta=meta, digest_alg="sha256")
    await Fetcher().fetch(server, server.hash, vouching)  # type: ignore[arg-type]  # another digest, and the hash holds
    server.outgoing = Outgoing("model", server.layout.hash, {"train": server.vectors["train"] + 1}, meta=meta)
    with pytest.raises(DigestMismatch):
        await Fetcher().fetch(server, server.hash, vouching)  # type: ignore[arg-type]
