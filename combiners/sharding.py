"""Sums that an intake's shards keep: chunks are passed on as they come, and counted once all shards have the update.

The intake keeps digests and the head; each shard its range of every group, staged until the whole update is checked
here and at all shards, and claimed. Incarnation, list and shards live and die together: whatever a shard fails at,
but to find a value out of range, ends the incarnation, and its clients are asked again.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from combiners.checks import check_head, expect_update
from combiners.messages import HandOver
from combiners.shard import ShardPort, Share
from hierfl.columns import ColumnGroup
from hierfl.encodings.ranges import Division, UpdateSplitter
from hierfl.errors import HierFLError, StorageError, Unreachable, WireError
from hierfl.metrics import add_metrics
from hierfl.plan import Plan
from hierfl.records import UpdateHead
from hierfl.types import AttemptKey, Int64Array
from hierfl.wire.transfer import Incoming, Sink

__all__ = ["Passing", "ShardedSums", "Shards", "held", "hold", "room"]

WINDOW = 4
"""Pieces of one upload that are on their way to shards: at most so many MiB are held here."""

T = TypeVar("T")

GONE = "a shard of the intake is gone, and all that it held; hand the update in again"


class Shards:
    """The shards of one incarnation: made when an attempt first needs them, ended with it."""

    def __init__(self, make: Callable[[], ShardPort], on_lost: Callable[[], None]) -> None:
        """
        Args:
            make: Makes a shard.
            on_lost: Called, on the event loop, when one is gone that was not ended here.
        """
        self._make, self._on_lost = make, on_lost
        self._ports: list[ShardPort] = []
        self._is_over = False

    def first(self, count: int) -> tuple[ShardPort, ...]:
        """So many."""
        loop = asyncio.get_running_loop()
        while len(self._ports) < count:
            port = self._make()
            port.ended().add_done_callback(lambda _: loop.call_soon_threadsafe(self.lost))
            self._ports.append(port)
        return tuple(self._ports[:count])

    def lost(self) -> None:
        """One of them failed."""
        if not self._is_over:
            self._is_over = True
            self._on_lost()

    def end(self) -> None:
        """They end, with all that they hold."""
        self._is_over = True
        for port in self._ports:
            port.end()


class Passing:
    """Passes the chunks of one upload on. A ``Sink``: ``take`` may be called in a thread, all else on the loop.

    What has been passed on is dropped at the shards when the last ``hold`` ends, unless it was committed.
    """

    def __init__(self, sums: ShardedSums, number: int, splitter: UpdateSplitter) -> None:
        self.sums, self._splitter = sums, splitter
        self.number: int | None = number
        """The upload's at the shards; ``None`` where another has taken over."""
        self._on_their_way: deque[Future[None]] = deque()
        self._num_holds = 0

    def take(self, vector: str, values: np.ndarray) -> None:
        assert self.number is not None, "nothing is fed to an upload that another has taken over"
        for part in self._splitter.split(vector, values):
            port = self.sums.ports[part.owner]
            self._on_their_way.append(port.put(self.sums.key, self.number, part.vector, part.offset, part.values))

    def go_on_from(self, earlier: Sink) -> bool:
        if not isinstance(earlier, Passing) or earlier.number is None or earlier.sums is not self.sums:
            return False
        if self.number is not None:
            self.sums.drop(self.number)
        self.number, earlier.number = earlier.number, None
        self._splitter = earlier._splitter
        self._on_their_way.extend(earlier._on_their_way)
        return True

    async def room(self) -> None:
        """Wait until few enough pieces are on their way for the next chunk. Raises ``Unreachable`` as all do here."""
        await self.sums.opened()
        while len(self._on_their_way) > WINDOW:
            await self.sums.all_of([self._on_their_way.popleft()])

    async def settled(self) -> Sequence[Mapping[str, int]]:
        """Wait until all are there; per shard, the entries of each vector that were sent."""
        while self._on_their_way:
            await self.sums.all_of([self._on_their_way.popleft()])
        return self._splitter.given

    def hold(self) -> Callable[[], None]:
        """Keep what is at the shards; what it returns lets go, and is called once."""
        self._num_holds += 1

        def let_go() -> None:
            self._num_holds -= 1
            if not self._num_holds and self.number is not None:
                self.sums.drop(self.number)

        return let_go


@dataclass(frozen=True)
class ShardedRanges:
    """A ``Ranged`` that reads the shards."""

    ports: tuple[ShardPort, ...]
    division: Division
    key: AttemptKey
    seal_id: str
    weight: int
    num_updates: int
    metrics: Mapping[str, int]

    @property
    def groups(self) -> tuple[ColumnGroup, ...]:
        return self.division.groups

    async def block(self, group: str, start: int, stop: int) -> Int64Array:
        pieces = list(self.division.pieces(group, start, stop))
        calls = [self.ports[owner].block(self.key, self.seal_id, group, first, last) for owner, first, last in pieces]
        try:
            blocks = await asyncio.gather(*map(asyncio.wrap_future, calls))
        except HierFLError as error:
            raise StorageError(f"sums at a shard cannot be had: {error}") from None
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=-1)


class ShardedSums:
    """See the module."""

    def __init__(self, plan: Plan, shards: Shards, count: int) -> None:
        self._plan, self._shards, self.is_instant = plan, shards, False
        self._division = Division(plan.task.update_encoding, plan.task.groups, count)
        self.key = plan.key
        self.ports = shards.first(count)
        self._numbers = itertools.count(1)
        self._opening: list[Future[None]] = [
            port.open(self.key, self._share(owner)) for owner, port in enumerate(self.ports)
        ]
        self._weight = self._num_updates = 0
        self._metrics: dict[str, int] = {}

    def _share(self, owner: int) -> Share:
        return Share(
            groups=self._division.groups_of(owner),
            starts={name: starts[owner] for name, starts in self._division.starts.items()},
            encoding=self._plan.task.update_encoding,
        )

    async def opened(self) -> None:
        """Wait until all shards know of the attempt."""
        if self._opening:
            await self.all_of(self._opening)
            self._opening = []

    async def all_of(self, calls: Iterable[Future[T]]) -> list[T]:
        """What shards answer; where one fails, but over a stranger's values, the incarnation is over.

        Raises:
            WireError: As ``Shard.check``.
            Unreachable: One has failed.
        """
        answers = await asyncio.gather(*map(asyncio.wrap_future, calls), return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        for error in failed:
            if not isinstance(error, WireError):
                self._shards.lost()
                raise Unreachable(GONE) from error
        if failed:
            raise failed[0]
        return answers  # type: ignore[return-value]  # no exception is among them

    def incoming(self, digest: str) -> Incoming:
        passing = Passing(self, next(self._numbers), self._division.splitter())
        return Incoming(expect_update(self._plan, digest), sink=passing)

    async def check(self, incoming: Incoming, weight: int) -> UpdateHead:
        passing = self._passing(incoming)
        sizes = await passing.settled()
        head = check_head(incoming, self._plan, weight)
        await self.all_of(
            port.check(self.key, _number(passing), size) for port, size in zip(self.ports, sizes, strict=True)
        )
        return head

    async def fold(self, incoming: Incoming, weight: int, metrics: Mapping[str, int]) -> None:
        for group in self._plan.task.groups:
            group.require_room(self._weight + weight, self._num_updates + 1)
        summed, passing = add_metrics(self._metrics, metrics), self._passing(incoming)
        number = _number(passing)
        await self.all_of(port.commit(self.key, number, weight) for port in self.ports)
        self._metrics, self._weight = summed, self._weight + weight
        self._num_updates += 1
        passing.number = None

    async def hand_over(self, listed: HandOver) -> HandOver:
        if not listed.entries:
            return listed
        counts = await self.all_of(port.freeze(self.key, listed.seal_id) for port in self.ports)
        if set(counts) != {(self._weight, self._num_updates)}:
            self._shards.lost()
            raise Unreachable("shards have other updates than their intake has listed")
        ranges = ShardedRanges(
            self.ports,
            self._division,
            self.key,
            listed.seal_id,
            self._weight,
            self._num_updates,
            dict(self._metrics),
        )
        return replace(listed, ranged=ranges)

    def resume(self, handed: HandOver) -> None:
        """Nothing was moved: the next commit ends the seal at the shards."""

    def _passing(self, incoming: Incoming) -> Passing:
        """Raises ``Unreachable`` for an update that was passed on under an incarnation before."""
        if not isinstance(incoming.sink, Passing) or incoming.sink.sums is not self:
            raise Unreachable(GONE)
        return incoming.sink

    def drop(self, number: int) -> None:
        """Have an upload dropped, if it was not committed."""
        for port in self.ports:
            _forget(port.drop(self.key, number))

    def close(self) -> None:
        for port in self.ports:
            _forget(port.close(self.key))


def hold(incoming: Incoming, also: Callable[[], None] | None = None) -> Callable[[], None]:
    """Keep what an upload has passed on; what it returns lets go of that, and of what ``also`` does."""
    let_go = incoming.sink.hold() if isinstance(incoming.sink, Passing) else None

    def let_both_go() -> None:
        for each in (let_go, also):
            if each is not None:
                each()

    return let_both_go


@contextmanager
def held(incoming: Incoming) -> Iterator[None]:
    """``hold`` for a block."""
    let_go = hold(incoming)
    try:
        yield
    finally:
        let_go()


async def room(incoming: Incoming) -> None:
    """Wait until an upload's next chunk may come. Raises ``Unreachable`` where what it passed on is lost."""
    if isinstance(incoming.sink, Passing):
        await incoming.sink.room()


def _number(passing: Passing) -> int:
    if passing.number is None:
        raise Unreachable("another stream of this update has taken over")
    return passing.number


def _forget(call: Future[Any]) -> None:
    """Whatever comes of it: a shard that is gone holds nothing."""
    call.add_done_callback(lambda done: done.exception())
