"""Column groups: how each vector of an update is summed, and the number formats that this allows.

``s`` and ``max_abs`` are fixed when the job is submitted, from declared caps, and never depend on who is alive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from functools import cached_property

import numpy as np

from hierfl import kernels
from hierfl.errors import ConfigError, ValueOutOfRange
from hierfl.types import Float32Array

__all__ = ["ColumnGroup", "GroupKind", "Weighting", "check_values", "choose_scale"]

BEST_SCALE = 32
LEAST_SCALE = 28
"""Fraction bits of a ``fixed`` group: the usual number, and the least that is accepted."""

MAX_SUM = 2**63 - 1
MAX_WIDE_Q = 2**62
"""Bounds on a 64-bit sum, and on one value of a group whose sums have 128 bits."""


class GroupKind(StrEnum):
    """How the values of a group are summed."""

    FIXED = "fixed"  # fixed point, 64-bit sums
    COUNT = "count"  # whole numbers, no rounding, 64-bit sums
    WIDE = "wide"  # fixed point, 128-bit sums: small groups of large range


class Weighting(StrEnum):
    """What a value is multiplied by, and what its sum is divided by at the end."""

    WEIGHT = "weight"  # by the update's weight; the end divides by the sum of weights
    ONE = "one"  # by 1; the end divides by the number of updates
    NONE = "none"  # by 1; the sum itself is the result


@dataclass(frozen=True, kw_only=True)
class ColumnGroup:
    """One vector of an update and how it is summed: declared by the strategy, fixed in the plan."""

    name: str
    """The vector's name in the layout."""
    kind: GroupKind
    s: int
    """Fraction bits of the fixed point; 0 for counts."""
    max_abs: float
    """Largest magnitude of a value."""
    weighting: Weighting
    num_values: int

    def __post_init__(self) -> None:
        key = f"arithmetic.{self.name}"
        object.__setattr__(self, "max_abs", float(self.max_abs))  # 8 and 8.0 are one document
        if not (math.isfinite(self.max_abs) and self.max_abs > 0):
            raise ConfigError(f"{key}.max_abs", self.max_abs, "must be above 0 and finite")
        if not 0 <= self.s <= BEST_SCALE or (self.kind is GroupKind.COUNT and self.s):
            raise ConfigError(f"{key}.s", self.s, f"must be from 0 to {BEST_SCALE}, and 0 for counts")
        if self.max_q > MAX_WIDE_Q:
            raise ConfigError(f"{key}.max_abs", self.max_abs, f"must be at most 2**62 / 2**{self.s}")
        if self.num_values < 0:
            raise ConfigError(f"{key}.num_values", self.num_values, "must not be negative")

    @cached_property
    def max_q(self) -> int:
        """Largest magnitude of one value as an integer, before its weight."""
        return math.ceil(Fraction(self.max_abs) * (1 << self.s))

    @cached_property
    def limit(self) -> np.float32:
        """Largest float32 not above ``max_abs``: comparing with it is exact."""
        with np.errstate(over="ignore"):
            limit = np.float32(self.max_abs)
        return limit if float(limit) <= self.max_abs else np.nextafter(limit, np.float32(0))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the group's sums: ``(n,)`` int64, or ``(2, n)`` for the high and low halves of 128 bits."""
        return (2, self.num_values) if self.kind is GroupKind.WIDE else (self.num_values,)

    def multiplier(self, weight: int) -> int:
        """What an update of this weight is multiplied by."""
        return weight if self.weighting is Weighting.WEIGHT else 1

    def total(self, weight: int, num_updates: int) -> int:
        """Sum of the multipliers of so many updates of so much weight."""
        return weight if self.weighting is Weighting.WEIGHT else num_updates

    def require_room(self, weight: int, num_updates: int) -> None:
        """Raise ``ValueOutOfRange`` if sums over so many updates of so much weight could overflow."""
        if self.kind is not GroupKind.WIDE and self.max_q * self.total(weight, num_updates) > MAX_SUM:
            raise ValueOutOfRange(
                f"group {self.name!r}: {num_updates} updates of weight {weight} in all could exceed 64 bits"
            )


def choose_scale(max_abs: float, total_weight: int, kind: GroupKind = GroupKind.FIXED) -> int:
    """Fraction bits for a group: 32, or as many as the caps allow.

    Args:
        max_abs: Cap on the magnitude of a value.
        total_weight: Cap on the weights of one round, over all regions.
        kind: What the group's sums are; a count has no fraction bits.
    Raises:
        ConfigError: The caps leave a ``fixed`` group fewer than 28 bits; names what to lower, and to what.
    """
    if kind is GroupKind.COUNT:
        return 0
    room = MAX_WIDE_Q if kind is GroupKind.WIDE else min(MAX_SUM // total_weight, MAX_WIDE_Q)
    scale = BEST_SCALE
    while scale > 0 and Fraction(max_abs) * 2**scale > room:
        scale -= 1
    if kind is GroupKind.FIXED and scale < LEAST_SCALE:
        largest = math.floor(room / 2**LEAST_SCALE * 1000) / 1000
        other = MAX_SUM // math.ceil(Fraction(max_abs) * 2**LEAST_SCALE)
        raise ConfigError(
            "arithmetic.max_abs",
            max_abs,
            f"leaves sums of weight {total_weight} fewer than {LEAST_SCALE} fraction bits: lower it to"
            f" {largest:g}, or arithmetic.total_weight to {other}",
        )
    return scale


def check_values(group: ColumnGroup, values: Float32Array, offset: int = 0) -> None:
    """Refuse values that the group cannot hold. Clients call it before they send, intakes before they count.

    Args:
        group: Whose caps hold.
        values: Part of the group's vector, shape ``(n,)``, float32.
        offset: Index of the part's first value in the vector.
    Raises:
        ValueOutOfRange: Names vector, index and value of the first NaN, infinity, value above ``max_abs``, or
            fraction in a count.
    """
    bad = kernels.active().first_out_of_range(values, group.limit)
    if bad >= 0:
        raise ValueOutOfRange(
            f"vector {group.name!r}, value {offset + bad} is {values[bad]}:"
            f" must be finite and at most {group.max_abs:g} in magnitude"
        )
    if group.kind is GroupKind.COUNT:
        fractions = values != np.rint(values)
        if fractions.any():
            bad = int(np.argmax(fractions))
            raise ValueOutOfRange(
                f"vector {group.name!r}, value {offset + bad} is {values[bad]}: must be a whole number"
            )
