"""Error feedback at the combiner: a region's exact sums in, rounded sums out, and what is left over for its next round.

It only ever sees sums, and all of it is integers, so both are reproducible bit for bit. Over any number of rounds
``sum of releases * 2**drop_bits + last left over == sum of exact sums`` (``hierfl/rounding.py`` has the bounds).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hierfl import buffers, kernels_rounding, parallel
from hierfl.aggregation import PartialAggregate
from hierfl.errors import ValueOutOfRange
from hierfl.packing import PackedSums
from hierfl.rounding import has_room, rounded_groups
from hierfl.types import Int64Array

__all__ = ["RoundedOff", "restored", "round_off"]

SHARE = 2**18
"""Values that a thread takes at a time."""


@dataclass(frozen=True)
class RoundedOff:
    """What rounding makes of a region's sums."""

    partial: PartialAggregate
    """Over the same updates; its rounded groups hold multiples of the step: integers ``2**drop_bits`` times smaller."""
    left_over: Mapping[str, Int64Array]
    """Per rounded group ``sum + carried - released * 2**drop_bits``, shape ``(n,)``."""


def round_off(partial: PartialAggregate, drop_bits: int, carried: PackedSums | None) -> RoundedOff:
    """Round the sums that may be rounded; ``partial`` and its arrays stay as they are.

    Args:
        partial: A region's exact sums.
        drop_bits: How far, 1 to ``MAX_DROP_BITS``.
        carried: What earlier rounds of the run left over, over exactly the rounded groups; ``None``: nothing.
    Raises:
        ValueOutOfRange: Sums that no updates within the caps can have, or so large that rounding could overflow.
    """
    partial.check_bounds(partial.weight)
    groups = rounded_groups(partial.groups)
    if not has_room(groups, partial.weight, 1, drop_bits):
        raise ValueOutOfRange(f"sums of weight {partial.weight} leave no room to round {drop_bits} bits")
    sums = {group.name: buffers.empty(group.num_values, np.int64) for group in groups}
    left_over = {group.name: buffers.empty(group.num_values, np.int64) for group in groups}
    for name, values in sums.items():
        np.copyto(values, partial.sums[name])
    if carried is not None:
        carried.add_into(sums)
    for name, values in sums.items():
        _split(values, drop_bits, left_over[name])
    return RoundedOff(replace(partial, sums={**partial.sums, **sums}), left_over)


def _split(values: Int64Array, drop_bits: int, left_over: Int64Array) -> None:
    def share(start: int) -> None:
        part = values[start : start + SHARE]
        kernels_rounding.active().split(part, drop_bits, part, left_over[start : start + SHARE])

    parallel.each(share, range(0, values.size, SHARE))


def restored(total: PartialAggregate, drop_bits: int, num_partials: int) -> PartialAggregate:
    """Rounded sums of several regions in the units of exact ones; its arrays are changed in place.

    Raises:
        ValueOutOfRange: They could exceed 64 bits.
    """
    if not drop_bits:
        return total
    groups = rounded_groups(total.groups)
    if not has_room(groups, total.weight, num_partials, drop_bits):
        raise ValueOutOfRange(f"{num_partials} rounded sums of weight {total.weight} in all could exceed 64 bits")
    for group in groups:
        _scale(total.sums[group.name], drop_bits)
    return total


def _scale(values: Int64Array, drop_bits: int) -> None:
    def share(start: int) -> None:
        part = values[start : start + SHARE]
        part <<= drop_bits

    parallel.each(share, range(0, values.size, SHARE))
