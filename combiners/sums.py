"""Where an attempt's updates are added up at an intake: in its own memory, or by its shards (``sharding.py``)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import replace
from typing import Protocol

from combiners.checks import check_update, expect_update
from combiners.messages import HandOver
from hierfl.aggregation import Accumulator
from hierfl.plan import Plan
from hierfl.records import UpdateHead
from hierfl.wire.transfer import Incoming

__all__ = ["OwnSums", "Sums"]

INLINE_BYTES = 65_536
"""A smaller update is checked on the event loop: handing it to a thread would cost more."""
INLINE_VALUES = 16_384
"""The same for folding one."""


class Sums(Protocol):
    """One attempt's. ``fold`` and ``hand_over`` are never under way at once."""

    is_instant: bool
    """Whether a fold takes less time than a thread, or a span, would cost: it ends without waiting."""

    def incoming(self, digest: str) -> Incoming:
        """What receives one of its updates."""
        ...

    async def check(self, incoming: Incoming, weight: int) -> UpdateHead:
        """Check a received update as a whole. Raises as ``check_update``."""
        ...

    async def fold(self, incoming: Incoming, weight: int, metrics: Mapping[str, int]) -> None:
        """Add a checked update, wholly or not at all."""
        ...

    async def hand_over(self, listed: HandOver) -> HandOver:
        """The same with the sums of all that is listed. Nothing is added until ``resume``."""
        ...

    def resume(self, handed: HandOver) -> None:
        """Go on from what was handed over."""
        ...

    def close(self) -> None:
        """The attempt is over."""
        ...


class OwnSums:
    """In an accumulator of this process."""

    def __init__(self, plan: Plan, pool: Executor) -> None:
        self._plan, self._pool, self._expect = plan, pool, expect_update(plan)
        self.is_instant = sum(group.num_values for group in plan.task.groups) < INLINE_VALUES
        self._accumulator: Accumulator | None = None
        """Made by the first fold, in its thread: writing its memory takes as long as a fold."""

    def incoming(self, digest: str) -> Incoming:
        return Incoming(replace(self._expect, digest=digest))

    async def check(self, incoming: Incoming, weight: int) -> UpdateHead:
        if incoming.descriptor.length_bytes < INLINE_BYTES:
            return check_update(incoming, self._plan, weight)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, check_update, incoming, self._plan, weight)

    async def fold(self, incoming: Incoming, weight: int, metrics: Mapping[str, int]) -> None:
        if self.is_instant:
            self._fold(incoming, weight, metrics)
        else:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._pool, self._fold, incoming, weight, metrics)

    def _fold(self, incoming: Incoming, weight: int, metrics: Mapping[str, int]) -> None:
        if self._accumulator is None:
            self._accumulator = self._new_accumulator()
        self._accumulator.fold(incoming.chunks, weight, metrics)

    def _new_accumulator(self) -> Accumulator:
        return Accumulator(self._plan.task.groups, self._plan.task.update_encoding)

    async def hand_over(self, listed: HandOver) -> HandOver:
        if self._accumulator is None or not listed.entries:
            return listed
        return replace(listed, partial=self._accumulator.partial(len({one.key.client.site for one in listed.entries})))

    def resume(self, handed: HandOver) -> None:
        self._accumulator = None
        if handed.partial is not None:
            self._accumulator = self._new_accumulator()
            self._accumulator.add(handed.partial)

    def close(self) -> None:
        """Nothing to do: a fold that is under way may end, and the memory goes with this object."""
