"""A partial aggregate arrives: on disk and in the store before its region is told that it is there.

It is written and held against its plan while it arrives, and added to the attempt's sum once it is durable.

The same bytes under the same key get the same answer again, however late; others are refused. A partial whose
contents break its plan is that region's last word on the attempt: the others do not wait for a better one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable

from controller.blobs import ArrivingPartial
from controller.collection import Collection, abstention
from controller.leader import Leader
from controller.merge import check_head
from controller.rows import AnswerRow
from hierfl import documents
from hierfl.errors import HierFLError, RegionRejected, RoundClosed, WireError
from hierfl.failpoints import reach
from hierfl.packing import PackedSums
from hierfl.plan import Plan
from hierfl.receipts import Reason
from hierfl.records import PartialHead
from hierfl.types import AttemptKey, RegionId
from hierfl.wire import rpc
from hierfl.wire.packed import NO_WORDS, WORDS, BoundsCheck, blocks_of, expect_partial, packed_sums
from hierfl.wire.resume import Unfinished
from hierfl.wire.transfer import Incoming, read_header

__all__ = ["receive_partial", "take_abstention"]


async def receive_partial(
    leader: Leader, region: RegionId, frames: rpc.Frames, unfinished: Unfinished[tuple[RegionId, AttemptKey]]
) -> AnswerRow:
    """Receive, check and store one partial; returns its row, which is durable.

    Raises:
        RoundClosed: The attempt takes no partial of this region any more.
        DigestMismatch: The region sent another partial for this attempt before.
        RegionRejected: The partial breaks its plan.
        WireError: The transfer does not fit; it may be sent again.
    """
    stream = _heard(frames, lambda: leader.registry.heard(region))
    first = await rpc.first_frame(stream)
    key = read_header(first).key
    if key is None:
        raise WireError("transfer: a partial aggregate names its attempt")
    earlier = _earlier(leader, key, region)
    row = leader.attempt(key) if earlier else leader.collecting(key, region).row
    assert row is not None, "what was answered was offered"
    expect = expect_partial(row.spec.groups, leader.run(row.run).row.layout_hash, earlier.digest if earlier else None)
    incoming = Incoming(expect)
    if earlier is not None:
        incoming.feed(first)
        await unfinished.receive((region, key), frames, incoming, stream)
        return earlier
    with leader.blobs.arriving_partial() as file:
        arrival = Arrival(incoming, leader.collecting(key, region).plans[region], region, file)
        try:
            arrival.feed(first)
        except WireError as error:
            raise _refusal(leader, key, region, error) from None
        await unfinished.receive((region, key), frames, incoming, stream, through=arrival)
        return await _take(leader, leader.collecting(key, region), region, arrival)


class Arrival:
    """A partial that is arriving: looked at and written while the rest is on its way.

    What is wrong with its contents is told once all of it is there and has its digest: until then they may have
    changed on the way.
    """

    def __init__(self, incoming: Incoming, plan: Plan, region: RegionId, file: ArrivingPartial) -> None:
        self.incoming, self._plan, self._region, self._file = incoming, plan, region, file
        self._has_header, self._written, self._seen = False, 0, 0
        self._bounds: BoundsCheck | None = None
        self._objection: HierFLError | None = None

    def feed(self, frame: bytes) -> None:
        """Take the next frame. Raises as ``Incoming.feed``, and ``StorageError`` if it cannot be written."""
        is_chunk = self._has_header
        self.incoming.feed(frame)
        self._has_header = True
        for chunk in self.incoming.frames[self._written :]:
            self._file.write(chunk)
            self._written += 1
        if not is_chunk or self.incoming.complete:
            self._file.write(frame)
        if self._objection is None:
            try:
                self._look()
            except (WireError, RegionRejected) as error:
                self._objection = error

    def close(self) -> None:
        """All frames are there; whether they are right. Raises as ``Incoming.close``."""
        self.incoming.close()

    def _look(self) -> None:
        if self._bounds is None:
            blocks = blocks_of(self.incoming, self._plan.task.groups)
            if blocks is None:
                return
            self.head = documents.decode(self.incoming.meta, PartialHead, "partial head")
            check_head(self._plan, self._region, self.head)
            self._bounds = BoundsCheck(blocks, self.head.weight, self.head.num_updates, self.head.drop_bits)
            self._bounds.feed(NO_WORDS)
        words = self.incoming.chunks[WORDS]
        for piece in words[self._seen :]:
            self._bounds.feed(piece)
        self._seen = len(words)

    def accept(self) -> PackedSums:
        """Its sums, once it is closed.

        Raises:
            RegionRejected, WireError: Its contents break the plan.
        """
        if self._objection is not None:
            raise self._objection
        assert self._bounds is not None, "the transfer is complete"
        packed = packed_sums(self.incoming, self._plan.task.groups)
        self._bounds.finish(packed)
        return packed

    def keep(self) -> str:
        """Make it durable; returns the name of its blob."""
        self._file.keep(self.incoming.digest)
        return self.incoming.digest


async def _heard(frames: AsyncIterable[bytes], heard: Callable[[], None]) -> AsyncIterator[bytes]:
    """Pass frames on; each is a sign of life, so that a long transfer is no silence."""
    async for frame in frames:
        heard()
        yield frame


def _earlier(leader: Leader, key: AttemptKey, region: RegionId) -> AnswerRow | None:
    answers = leader.store.answers(key)
    return next((answer for answer in answers if answer.region == region and answer.digest), None)


async def _take(leader: Leader, open_: Collection, region: RegionId, arrival: Arrival) -> AnswerRow:
    try:
        packed = await asyncio.to_thread(arrival.accept)
    except (WireError, RegionRejected) as error:
        raise _refusal(leader, open_.row.key, region, error) from None
    blob = await asyncio.to_thread(arrival.keep)
    reach("controller.accepted")
    answer = AnswerRow(
        run=open_.row.run,
        task=open_.row.task,
        round=open_.row.round,
        attempt=open_.row.attempt,
        region=region,
        received_unix_ns=time.time_ns(),
        digest=arrival.incoming.digest,
        head=arrival.head,
        blob=blob,
        size_bytes=sum(map(len, arrival.incoming.frames)),
    )
    leader.run(open_.row.run).answer(open_, answer)
    reach("controller.answered")
    if open_.answers[region] is answer:
        open_.sum.begin(answer, packed)
    return open_.answers[region]


def _refusal(leader: Leader, key: AttemptKey, region: RegionId, error: HierFLError) -> RegionRejected:
    """Sealed bytes do not change: what is wrong with them ends the region's part in the attempt."""
    take_abstention(leader, key, region, Reason.INVALID)
    return RegionRejected(f"the partial aggregate of {region} for {key} is refused: {error}")


def take_abstention(leader: Leader, key: AttemptKey, region: RegionId, code: str) -> None:
    """The region takes no part in an attempt. Said of a closed one, it changes nothing."""
    try:
        open_ = leader.collecting(key, region)
    except RoundClosed:
        return
    leader.run(key.run).answer(open_, abstention(open_.row, region, code, time.time_ns()))
