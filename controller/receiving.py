"""A partial aggregate arrives: on disk and in the store before its region is told that it is there.

The same bytes under the same key get the same answer again, however late; others are refused. A partial whose
contents break its plan is that region's last word on the attempt: the others do not wait for a better one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable

from controller.collection import Collection, abstention
from controller.leader import Leader
from controller.merge import check_partial, partial_sizes
from controller.rows import AnswerRow, AttemptRow
from hierfl import documents
from hierfl.errors import HierFLError, RegionRejected, RoundClosed, WireError
from hierfl.receipts import Reason
from hierfl.records import PartialHead
from hierfl.types import AttemptKey, RegionId
from hierfl.wire import rpc
from hierfl.wire.resume import Unfinished
from hierfl.wire.transfer import Expect, Incoming, VectorSpec, read_header

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
    incoming = Incoming(_expect(leader, row, earlier.digest if earlier else None))
    try:
        incoming.feed(first)
    except WireError as error:
        raise (_refusal(leader, key, region, error) if earlier is None else error) from None
    await unfinished.receive((region, key), frames, incoming, stream)
    if earlier is not None:
        return earlier
    return await _take(leader, leader.collecting(key, region), region, incoming)


async def _heard(frames: AsyncIterable[bytes], heard: Callable[[], None]) -> AsyncIterator[bytes]:
    """Pass frames on; each is a sign of life, so that a long transfer is no silence."""
    async for frame in frames:
        heard()
        yield frame


def _earlier(leader: Leader, key: AttemptKey, region: RegionId) -> AnswerRow | None:
    answers = leader.store.answers(key)
    return next((answer for answer in answers if answer.region == region and answer.digest), None)


def _expect(leader: Leader, row: AttemptRow, digest: str | None) -> Expect:
    sizes = partial_sizes(row)
    vectors = tuple(VectorSpec(name=name, dtype="int64", num_values=size) for name, size in sizes.items())
    return Expect("partial", leader.run(row.run).row.layout_hash, vectors, 8 * sum(sizes.values()), digest)


async def _take(leader: Leader, open_: Collection, region: RegionId, incoming: Incoming) -> AnswerRow:
    try:
        head = await asyncio.to_thread(_checked, open_, region, incoming)
    except (WireError, RegionRejected) as error:
        raise _refusal(leader, open_.row.key, region, error) from None
    chunks = [chunk for vector in incoming.chunks.values() for chunk in vector]
    blob = await asyncio.to_thread(leader.blobs.put_partial, chunks)
    answer = AnswerRow(
        run=open_.row.run,
        task=open_.row.task,
        round=open_.row.round,
        attempt=open_.row.attempt,
        region=region,
        received_unix_ns=time.time_ns(),
        digest=incoming.digest,
        head=head,
        blob=blob,
        size_bytes=sum(map(len, incoming.frames)),
    )
    leader.run(open_.row.run).answer(open_, answer)
    return open_.answers[region]


def _refusal(leader: Leader, key: AttemptKey, region: RegionId, error: HierFLError) -> RegionRejected:
    """Sealed bytes do not change: what is wrong with them ends the region's part in the attempt."""
    take_abstention(leader, key, region, Reason.INVALID)
    return RegionRejected(f"the partial aggregate of {region} for {key} is refused: {error}")


def _checked(open_: Collection, region: RegionId, incoming: Incoming) -> PartialHead:
    head = documents.decode(incoming.meta, PartialHead, "partial head")
    check_partial(open_.plans[region], region, head, incoming.vectors())
    return head


def take_abstention(leader: Leader, key: AttemptKey, region: RegionId, code: str) -> None:
    """The region takes no part in an attempt. Said of a closed one, it changes nothing."""
    try:
        open_ = leader.collecting(key, region)
    except RoundClosed:
        return
    leader.run(key.run).answer(open_, abstention(open_.row, region, code, time.time_ns()))
