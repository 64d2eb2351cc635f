"""Sums that do not depend on order: add integers first, divide last.

Every value becomes ``q = rint(value * 2**s)`` and every sum ``sum(weight * q)``, exactly. ``s`` stands in the plan
(``hierfl/columns.py``) and never depends on who is alive, so any grouping of updates into regions, and any order, has
the same bits. Nothing wraps: what could overflow is refused before it is added. What follows the sum uses only
IEEE float64 operations that have one right answer (``+ - * /``, ``sqrt``, comparison, ``rint``, casts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from hierfl import buffers, kernels_finish, limbs
from hierfl.columns import ColumnGroup, GroupKind, Weighting, check_values, choose_scale
from hierfl.encodings.base import Encoding, Received
from hierfl.encodings.plain import PLAIN
from hierfl.encodings.update import encoding_of, wire_vectors
from hierfl.errors import InvalidTransition, LayoutMismatch, ValueOutOfRange
from hierfl.metrics import add_metrics
from hierfl.packing import PackedSums, columns_of
from hierfl.types import Float64Array, Int64Array

__all__ = [
    "FINISH_BLOCK",
    "MAX_WEIGHT",
    "Accumulator",
    "ColumnGroup",
    "GroupKind",
    "PartialAggregate",
    "Weighting",
    "check_counts",
    "check_values",
    "choose_scale",
]

MAX_WEIGHT = 65_535
"""Largest weight of one update: 16 bits."""

FINISH_BLOCK = 16_384
"""Values finished at a time, so that they stay in the cache from one operation to the next."""


@dataclass(frozen=True, eq=False)
class PartialAggregate:
    """Exact sums over the updates of one region, or of several regions added together.

    Means cannot be merged, sums can: ``a + b == b + a``, ``empty(groups) + a == a``, and any grouping of clients
    into regions has the same ``finish()``, bit for bit.
    """

    groups: tuple[ColumnGroup, ...]
    sums: Mapping[str, Int64Array]
    """Per group ``sum(multiplier * rint(value * 2**s))``, of the group's ``shape``. A wide group's second row is
    the low half's 64 bits, read as int64."""
    weight: int
    """Sum of the aggregation weights."""
    num_sites: int
    """Distinct sites in the sum. Regions have no site in common, so it adds."""
    num_updates: int
    metrics: Mapping[str, int] = field(default_factory=dict)
    """Sums of the declared metrics' integers."""

    def __post_init__(self) -> None:
        if set(self.sums) != {group.name for group in self.groups}:
            raise LayoutMismatch(f"sums are {sorted(self.sums)}, the groups {[group.name for group in self.groups]}")
        for group in self.groups:
            array = self.sums[group.name]
            if array.dtype != np.int64 or array.shape != group.shape:
                raise LayoutMismatch(f"group {group.name!r} has {array.dtype} {array.shape}, not int64 {group.shape}")
        check_counts(self.num_sites, self.num_updates, self.weight)

    @classmethod
    def empty(cls, groups: tuple[ColumnGroup, ...]) -> PartialAggregate:
        """The sum over nobody."""
        return cls(groups, {group.name: np.zeros(group.shape, np.int64) for group in groups}, 0, 0, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all sums in memory."""
        return sum(array.nbytes for array in self.sums.values())

    def __add__(self, other: PartialAggregate) -> PartialAggregate:
        """The sum over the updates of both.

        Raises:
            LayoutMismatch: Other groups.
            ValueOutOfRange: Sums beyond their bounds, or a result that could overflow.
        """
        if not isinstance(other, PartialAggregate):
            return NotImplemented
        total = Accumulator(self.groups)
        total.add(self)
        total.add(other)
        return total.partial(self.num_sites + other.num_sites)

    def __eq__(self, other: object) -> bool:
        """Whether both are the same sums, bit for bit, over the same counts."""
        if not isinstance(other, PartialAggregate):
            return NotImplemented
        return self._counts == other._counts and all(
            np.array_equal(self.sums[group.name], other.sums[group.name]) for group in self.groups
        )

    __hash__ = None  # type: ignore[assignment]  # holds arrays

    @property
    def _counts(self) -> tuple[object, ...]:
        return (self.groups, self.weight, self.num_sites, self.num_updates, dict(self.metrics))

    def check_bounds(self, max_weight: int) -> None:
        """Refuse sums that no updates within the caps can have: asked before a stranger's partial is added.

        Args:
            max_weight: Share of the round's total weight that the sender may fill.
        Raises:
            ValueOutOfRange: The weight is above its share, or names the group with a value out of bounds.
        """
        check_counts(self.num_sites, self.num_updates, self.weight, max_weight)
        for group in self.groups:
            bound = group.max_q * group.total(self.weight, self.num_updates)
            if not _within(group, self.sums[group.name], bound):
                raise ValueOutOfRange(f"group {group.name!r} has a sum above what weight {self.weight} can make")

    def finish(self) -> dict[str, Float64Array]:
        """Means (or sums, for weighting ``none``) in the values' own units, shape ``(n,)``, float64, by group.

        Raises:
            ValueOutOfRange: No update is in the sum.
        """
        self.require_updates()
        return {group.name: self._finish_group(group) for group in self.groups}

    def require_updates(self) -> None:
        """Raise ``ValueOutOfRange`` if no update is in the sum: it has no mean."""
        if not self.num_updates:
            raise ValueOutOfRange("a sum over no update has no mean")

    def finish_part(self, group: ColumnGroup, part: slice) -> Float64Array:
        """Some of a group's values as ``finish`` makes them: to work on a large model block by block."""
        sums, (divisor, scale) = self.sums[group.name][..., part], self.units(group)
        if group.kind is GroupKind.WIDE:
            wide: Float64Array = limbs.as_float64(sums) / divisor * scale
            return wide
        means = np.empty(sums.size, np.float64)
        kernels_finish.active().mean(sums, divisor, scale, means)
        return means

    def units(self, group: ColumnGroup) -> tuple[float, float]:
        """What a group's sums are divided by, and then multiplied with (which is exact), to be means in its units."""
        total = 1 if group.weighting is Weighting.NONE else group.total(self.weight, self.num_updates)
        return float(total), 1.0 / 2**group.s

    def _finish_group(self, group: ColumnGroup) -> Float64Array:
        result = np.empty(group.num_values, np.float64)
        for start in range(0, group.num_values, FINISH_BLOCK):
            part = slice(start, start + FINISH_BLOCK)
            result[part] = self.finish_part(group, part)
        return result


def check_counts(num_sites: int, num_updates: int, weight: int, max_weight: int | None = None) -> None:
    """Raise ``ValueOutOfRange`` for counts that no updates have, or a weight above the share that it may fill."""
    if not 0 <= num_sites <= num_updates <= weight <= num_updates * MAX_WEIGHT:
        raise ValueOutOfRange(f"{num_updates} updates of {num_sites} sites cannot have weight {weight}")
    if max_weight is not None and weight > max_weight:
        raise ValueOutOfRange(f"a partial aggregate of weight {weight} is above its share of {max_weight}")


class Accumulator:
    """Sums being made: one intake's, a region's over its intakes, or the controller's over its regions.

    Make it before the updates arrive: it writes all its memory once. Not for two threads at once. After
    ``partial()`` it takes no more: the sums are handed over, not copied.
    """

    def __init__(self, groups: tuple[ColumnGroup, ...], encoding: Encoding = PLAIN) -> None:
        """``encoding`` is that of the updates to be folded; sums made elsewhere have none."""
        self.groups = groups
        self.encoding = encoding
        self.weight = 0
        self.num_updates = 0
        self.metrics: dict[str, int] = {}
        # All written now: the pages are there before the first update is.
        self._sums = {group.name: buffers.zeros(group.shape, np.int64) for group in groups}
        self._handed_over = False

    @property
    def nbytes(self) -> int:
        """Bytes of all sums: depends on the model, not on the number of clients."""
        return sum(array.nbytes for array in self._sums.values())

    def fold(self, vectors: Received, weight: int, metrics: Mapping[str, int] | None = None) -> None:
        """Add one update, wholly or not at all.

        Args:
            vectors: Per wire vector its chunks in order, each of shape ``(n,)`` and of the encoding's dtype, which is
                float32 where there is none; views on received messages will do.
            weight: The update's aggregation weight, 1 to ``MAX_WEIGHT``.
            metrics: The update's quantised metrics.
        Raises:
            LayoutMismatch: Other vectors, lengths or dtypes than the plan's.
            ValueOutOfRange: Names the value out of range, or the weight, metric or group without room.
        """
        self._require_open("fold")
        if not 1 <= weight <= MAX_WEIGHT:
            raise ValueOutOfRange(f"an update's weight is {weight}: must be from 1 to {MAX_WEIGHT}")
        for group in self.groups:
            group.require_room(self.weight + weight, self.num_updates + 1)
        self._check_chunks(vectors)
        summed = add_metrics(self.metrics, metrics or {})
        self._fold_values(vectors, weight)
        self.metrics = summed
        self.weight += weight
        self.num_updates += 1

    def add(self, partial: PartialAggregate) -> None:
        """Add sums made elsewhere, wholly or not at all.

        Raises:
            LayoutMismatch: Other groups.
            ValueOutOfRange: Sums beyond their bounds, or a total that could overflow.
        """
        self._require_open("add")
        if partial.groups != self.groups:
            raise LayoutMismatch("a partial aggregate has other column groups than the plan's")
        for group in self.groups:
            group.require_room(self.weight + partial.weight, self.num_updates + partial.num_updates)
        partial.check_bounds(partial.weight)
        summed = add_metrics(self.metrics, partial.metrics)
        for group in self.groups:
            _add_sums(group, self._sums[group.name], partial.sums[group.name])
        self.metrics = summed
        self.weight += partial.weight
        self.num_updates += partial.num_updates

    def add_packed(self, packed: PackedSums, weight: int, num_updates: int, metrics: Mapping[str, int]) -> None:
        """Add sums made elsewhere, packed: wholly or not at all, and never unpacked as a whole.

        Their values must have been held against their bounds (``hierfl/wire/packed.py`` does as they arrive).

        Raises:
            LayoutMismatch: Other groups.
            ValueOutOfRange: A total that could overflow.
        """
        self._require_open("add")
        if packed.blocks.columns != columns_of(self.groups):
            raise LayoutMismatch("a packed partial aggregate has other column groups than the plan's")
        for group in self.groups:
            group.require_room(self.weight + weight, self.num_updates + num_updates)
        summed = add_metrics(self.metrics, metrics)
        packed.add_into(self._sums)
        self.metrics = summed
        self.weight += weight
        self.num_updates += num_updates

    def partial(self, num_sites: int) -> PartialAggregate:
        """Hand the sums over, over ``num_sites`` distinct sites; nothing can be added afterwards."""
        self._require_open("partial")
        partial = PartialAggregate(self.groups, self._sums, self.weight, num_sites, self.num_updates, self.metrics)
        self._handed_over = True
        return partial

    def _require_open(self, event: str) -> None:
        if self._handed_over:
            raise InvalidTransition("accumulator", "handed over", event)

    def _fold_values(self, vectors: Received, weight: int) -> None:
        for count, group in enumerate(self.groups):
            if not self._fold_group(group, vectors, group.multiplier(weight)):
                for done in self.groups[:count]:  # integers: taking them away again is exact
                    self._fold_group(done, vectors, -done.multiplier(weight))
                encoding_of(self.encoding, group).check(group, vectors)

    def _fold_group(self, group: ColumnGroup, vectors: Received, multiplier: int) -> bool:
        return encoding_of(self.encoding, group).fold(self._sums[group.name], group, vectors, multiplier)

    def _check_chunks(self, vectors: Received) -> None:
        expected = wire_vectors(self.encoding, self.groups)
        if set(vectors) != {vector.name for vector in expected}:
            raise LayoutMismatch(f"vectors are {sorted(vectors)}, the plan has {[vector.name for vector in expected]}")
        for name, dtype, num_values in expected:
            chunks = vectors[name]
            if any(chunk.dtype != dtype or chunk.ndim != 1 or not chunk.flags.c_contiguous for chunk in chunks):
                raise LayoutMismatch(f"vector {name!r} must come as contiguous {dtype} chunks of one dimension")
            length = sum(chunk.size for chunk in chunks)
            if length != num_values:
                raise LayoutMismatch(f"vector {name!r} has {length} values, the plan {num_values}")


def _within(group: ColumnGroup, sums: Int64Array, bound: int) -> bool:
    if group.kind is GroupKind.WIDE:
        return limbs.within(sums, bound)
    return not sums.size or (-bound <= int(sums.min()) and int(sums.max()) <= bound)


def _add_sums(group: ColumnGroup, sums: Int64Array, other: Int64Array) -> None:
    if group.kind is GroupKind.WIDE:
        limbs.add_into(sums, other)
    else:
        sums += other
