"""Sealing what shards have: read block by block, added up, packed. Never are all 64-bit sums in this process.

The sums stay at the shards until they are packed: a shard that is gone by then loses what its intake handed over, and
the Region goes on collecting without that incarnation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import numpy as np

from combiners.events import Seal
from combiners.messages import HandOver, Ranged
from combiners.sealed import Sealed
from combiners.sealing import through_the_gate
from hierfl.aggregation import Accumulator, PartialAggregate
from hierfl.columns import ColumnGroup
from hierfl.errors import LayoutMismatch, StorageError, ValueOutOfRange
from hierfl.metrics import add_metrics
from hierfl.residency import ZonePolicy
from hierfl.types import Int64Array, RegionId
from hierfl.wire.piecewise import PackedPartial, Packer, pieces

__all__ = ["SumsLost", "can_stream", "seal_ranges", "whole"]

PIECE_VALUES = 2**21
"""Values read at a time: 16 MiB of sums from each intake."""

T = TypeVar("T")


class InThread(Protocol):
    """Runs a call beside the event loop."""

    def __call__(self, call: Callable[[], T]) -> Awaitable[T]: ...


class SumsLost(StorageError):
    """What ``incarnation`` handed over cannot be read any more."""

    def __init__(self, incarnation: str, message: str) -> None:
        super().__init__(incarnation, message)
        self.incarnation, self.message = incarnation, message

    def __str__(self) -> str:
        return f"the sums of {self.incarnation} are lost: {self.message}"


def can_stream(instruction: Seal, hand_overs: Sequence[HandOver]) -> bool:
    """Whether a seal is made here: some of the sums are at shards, and they are packed unrounded."""
    return not instruction.plan.drop_bits and any(one.ranged is not None for one in hand_overs)


async def whole(hand_over: HandOver, timeout_s: float) -> HandOver:
    """The same with its sums here, all at once. Raises ``SumsLost``."""
    ranged = hand_over.ranged
    if ranged is None:
        return hand_over
    read = _Source(hand_over, ranged, timeout_s)
    sums = {group.name: np.empty(group.shape, np.int64) for group in ranged.groups}
    for group, start, stop in pieces(ranged.groups, PIECE_VALUES):
        sums[group.name][..., start:stop] = await read.block(group, start, stop)
    sites = len({entry.key.client.site for entry in hand_over.entries})
    here = PartialAggregate(ranged.groups, sums, ranged.weight, sites, ranged.num_updates, dict(ranged.metrics))
    return replace(hand_over, partial=here, ranged=None)


async def seal_ranges(
    instruction: Seal,
    hand_overs: Sequence[HandOver],
    policy: ZonePolicy,
    region: RegionId,
    region_epoch: int,
    *,
    timeout_s: float,
    in_thread: InThread,
) -> Sealed:
    """What ``make_sealed`` makes, piece by piece.

    Args:
        instruction: Of the Region.
        hand_overs: Of all incarnations that it names, fetched but for the sums at shards.
        policy: The zone's rule.
        region: Whose sum it is.
        region_epoch: Of the Region that seals.
        timeout_s: Of reading a piece.
        in_thread: Runs what takes its time.
    Raises:
        SumsLost: A shard is gone.
        ResidencyError, ValueOutOfRange, LayoutMismatch: As ``make_sealed``.
    """
    plan = instruction.plan
    sources = [_Source(one, _ranged(one), timeout_s) for one in hand_overs if one.entries]
    total = _counts(plan.task.groups, sources)
    packer = Packer(plan.task.groups)
    for group, start, stop in pieces(plan.task.groups, PIECE_VALUES):
        blocks = await asyncio.gather(*(source.block(group, start, stop) for source in sources))
        await in_thread(partial(_pack, packer, group, sources, blocks))

    def finish() -> Sealed:
        summed = PackedPartial(
            plan.task.groups,
            packer.finish(),
            total.weight,
            instruction.num_sites,
            total.num_updates,
            total.metrics,
        )
        return through_the_gate(instruction, summed, policy, region, region_epoch)

    return await in_thread(finish)


@dataclass(frozen=True)
class _Whole:
    """A ``Ranged`` of sums that are here."""

    partial: PartialAggregate

    @property
    def groups(self) -> tuple[ColumnGroup, ...]:
        return self.partial.groups

    @property
    def weight(self) -> int:
        return self.partial.weight

    @property
    def num_updates(self) -> int:
        return self.partial.num_updates

    @property
    def metrics(self) -> Mapping[str, int]:
        return self.partial.metrics

    async def block(self, group: str, start: int, stop: int) -> Int64Array:
        return self.partial.sums[group][..., start:stop]


def _ranged(hand_over: HandOver) -> Ranged:
    if hand_over.ranged is not None:
        return hand_over.ranged
    if hand_over.partial is None:
        raise ValueOutOfRange(f"{hand_over.incarnation} handed over claims without their sums")
    return _Whole(hand_over.partial)


class _Source:
    """What one intake handed over, which has to be of exactly its claims."""

    def __init__(self, hand_over: HandOver, ranged: Ranged, timeout_s: float) -> None:
        self._incarnation, self._timeout_s = hand_over.incarnation, timeout_s
        self.ranged = ranged
        weight = sum(entry.weight for entry in hand_over.entries)
        if (ranged.weight, ranged.num_updates) != (weight, len(hand_over.entries)):
            raise ValueOutOfRange(f"{hand_over.incarnation} handed over sums of another weight than its claims have")

    async def block(self, group: ColumnGroup, start: int, stop: int) -> Int64Array:
        """Raises ``SumsLost``; ``LayoutMismatch`` for another shape."""
        try:
            async with asyncio.timeout(self._timeout_s):
                sums = await self.ranged.block(group.name, start, stop)
        except TimeoutError:
            raise SumsLost(self._incarnation, f"no answer within {self._timeout_s:g} s") from None
        except StorageError as error:
            raise SumsLost(self._incarnation, str(error)) from None
        if sums.dtype != np.int64 or sums.shape != (*group.shape[:-1], stop - start):
            raise LayoutMismatch(f"group {group.name!r} has {sums.dtype} {sums.shape} in a piece of {stop - start}")
        return sums


@dataclass(frozen=True)
class _Counts:
    weight: int
    num_updates: int
    metrics: Mapping[str, int]


def _counts(groups: tuple[ColumnGroup, ...], sources: Sequence[_Source]) -> _Counts:
    """Of all sources together. Raises ``LayoutMismatch``, and ``ValueOutOfRange`` where the sum could overflow."""
    weight = num_updates = 0
    metrics: dict[str, int] = {}
    for source in sources:
        if source.ranged.groups != groups:
            raise LayoutMismatch("sums at shards have other column groups than the plan's")
        weight, num_updates = weight + source.ranged.weight, num_updates + source.ranged.num_updates
        metrics = add_metrics(metrics, source.ranged.metrics)
    for group in groups:
        group.require_room(weight, num_updates)
    return _Counts(weight, num_updates, metrics)


def _pack(packer: Packer, group: ColumnGroup, sources: Sequence[_Source], blocks: Sequence[Int64Array]) -> None:
    packer.add(group, _added(group, sources, blocks))


def _added(group: ColumnGroup, sources: Sequence[_Source], blocks: Sequence[Int64Array]) -> Int64Array:
    """One piece's sum over all sources; the piece of an only one is held against its bounds when it is packed."""
    if len(blocks) == 1:
        return blocks[0]
    part = replace(group, num_values=blocks[0].shape[-1])
    total = Accumulator((part,))
    for source, sums in zip(sources, blocks, strict=True):
        total.add(PartialAggregate((part,), {part.name: sums}, source.ranged.weight, 0, source.ranged.num_updates))
    return total.partial(0).sums[part.name]
