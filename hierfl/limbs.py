"""128-bit integers as two halves: what the sums of ``wide`` groups need outside the kernels.

An array of n integers has shape ``(2, n)``, int64, two's complement: row 0 is the high half with the sign, row 1
the 64 bits of the low half.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hierfl.types import Float64Array, Int64Array

__all__ = ["add_into", "as_float64", "within"]

UInt64Array = npt.NDArray[np.uint64]


def add_into(sums: Int64Array, other: Int64Array) -> None:
    """``sums += other``; the caller has made sure that no sum overflows 128 bits."""
    low, added = sums[1].view(np.uint64), other[1].view(np.uint64)
    low += added
    sums[0] += other[0]
    sums[0] += low < added  # the carry


def within(values: Int64Array, bound: int) -> bool:
    """Whether every integer is at most ``bound`` in magnitude."""
    high, low = _magnitude(values)
    bound = min(bound, 2**127)
    bound_high, bound_low = np.uint64(bound >> 64), np.uint64(bound & (2**64 - 1))
    return bool(np.all((high < bound_high) | ((high == bound_high) & (low <= bound_low))))


def as_float64(values: Int64Array) -> Float64Array:
    """As float64, shape ``(n,)``: the nearest one below ``2**85``, and within two roundings of it above."""
    high, low = _magnitude(values)
    upper = high.astype(np.float64) * 2.0**32 + (low >> np.uint64(32)).astype(np.float64)
    magnitude = upper * 2.0**32 + (low & np.uint64(2**32 - 1)).astype(np.float64)
    return np.where(values[0] < 0, -magnitude, magnitude)


def _magnitude(values: Int64Array) -> tuple[UInt64Array, UInt64Array]:
    negative = values[0] < 0
    high, low = values[0].view(np.uint64), values[1].view(np.uint64)
    borrow = (low == 0).astype(np.uint64)
    return np.where(negative, ~high + borrow, high), np.where(negative, ~low + np.uint64(1), low)
