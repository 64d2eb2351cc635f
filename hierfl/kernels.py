"""Kernels: the few loops that touch every value of every update, each beside its slow NumPy oracle.

Both forms give the same bits, on every machine: scaling by a power of two and ``rint`` are exact in float64,
and the rest is integers. The NumPy form runs until ``warm_up()`` has compiled the others, so that a site needs
no numba and a program that folds nothing does not wait for it. Servers call ``warm_up()`` when they start.

Only ``hierfl/kernels_build.py`` imports numba. Kernels hold no lock and release the GIL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hierfl import kernels_finish, kernels_packing, kernels_rounding
from hierfl.kernels_build import Form, build
from hierfl.types import Float32Array, Int64Array

__all__ = ["NUMPY", "Kernels", "active", "compiled", "warm_up"]

UInt64Array = npt.NDArray[np.uint64]

BLOCK = 4_096
"""Values checked and then folded while they are in the first-level cache (16 KiB, sums 32 KiB)."""

LOW = 0xFFFFFFFF

EXACT = 2.0**51
MAGIC = 1.5 * 2.0**52
MAGIC_BITS = int(np.float64(MAGIC).view(np.int64))
"""``MAGIC``'s unit in the last place is 1, and stays 1 with any integer of at most ``EXACT`` in magnitude added: the
integer is the difference of their bits. Machines without AVX-512 have neither that conversion nor a product of 64-bit
integers as one instruction: where every ``weight * q`` is so small, both are done in float64, exactly."""


class Kernels(NamedTuple):
    """One form of all kernels.

    ``first_out_of_range(values, limit)``: index of the first value that is not within ``±limit`` (NaN is not),
    or -1. ``values`` has shape ``(n,)``, float32.

    ``fold_fixed(sums, values, limit, scale, weight)``: ``sums += weight * rint(values * scale)`` for whole blocks
    of ``BLOCK`` values, up to the first block with a value outside ``±limit``; returns how many values were
    folded, ``n`` if all. ``sums`` has shape ``(n,)``, int64; the caller has made sure that no sum can overflow.

    ``fold_wide(high, low, values, limit, scale, weight)``: the same into 128-bit sums, two's complement, of
    which ``high`` (int64) and ``low`` (uint64) hold the halves.
    """

    first_out_of_range: Callable[[Float32Array, np.float32], int]
    fold_fixed: Callable[[Int64Array, Float32Array, np.float32, float, int], int]
    fold_wide: Callable[[Int64Array, UInt64Array, Float32Array, np.float32, float, int], int]


# --- First value out of range ------------------------------------------------------------------------------


def _first_out_of_range_numpy(values: Float32Array, limit: np.float32) -> int:
    if values.size and -limit <= values.min() and values.max() <= limit:  # no temporary; false for NaN
        return -1
    bad = ~(np.abs(values) <= limit)
    return int(np.argmax(bad)) if bad.any() else -1


def _first_out_of_range(values: Float32Array, limit: np.float32) -> int:
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        bad = 0
        for i in range(len(block)):  # no early exit: a loop with one does not vectorise
            bad += not (abs(block[i]) <= limit)
        if bad:
            for i in range(len(block)):
                if not (abs(block[i]) <= limit):
                    return start + i
    return -1


# --- Fixed-point sums in 64 bits ---------------------------------------------------------------------------


def _fold_fixed_numpy(sums: Int64Array, values: Float32Array, limit: np.float32, scale: float, weight: int) -> int:
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        if _first_out_of_range_numpy(block, limit) >= 0:
            return start
        sums[start : start + BLOCK] += weight * np.rint(block.astype(np.float64) * scale).astype(np.int64)
    return values.size


def _fold_fixed(sums: Int64Array, values: Float32Array, limit: np.float32, scale: float, weight: int) -> int:
    factor = np.float64(weight)
    is_small = abs(factor) * (np.float64(limit) * scale + 1) <= EXACT
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        bad = 0
        for i in range(len(block)):
            bad += not (abs(block[i]) <= limit)
        if bad:
            return start
        part = sums[start : start + BLOCK]
        for i in range(len(block)):
            q = np.rint(np.float64(block[i]) * scale)
            if is_small:
                part[i] += np.float64(q * factor + MAGIC).view(np.int64) - MAGIC_BITS
            else:
                part[i] += weight * np.int64(q)
    return len(values)


# --- Fixed-point sums in 128 bits --------------------------------------------------------------------------
#
# weight * q = weight * (q >> 32) * 2**32 + weight * (q & LOW); |q| <= 2**62 and |weight| < 2**16, so both
# products fit int64. Shifting the first one up by 32 splits it over the halves; the second is sign-extended.


def _fold_wide_numpy(
    high: Int64Array, low: UInt64Array, values: Float32Array, limit: np.float32, scale: float, weight: int
) -> int:
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        if _first_out_of_range_numpy(block, limit) >= 0:
            return start
        q = np.rint(block.astype(np.float64) * scale).astype(np.int64)
        upper, lower = weight * (q >> 32), weight * (q & LOW)
        stop = start + block.size
        for part, carry_over in ((upper << 32, upper >> 32), (lower, lower >> 63)):
            before = low[start:stop].copy()
            low[start:stop] += part.view(np.uint64)
            high[start:stop] += carry_over + (low[start:stop] < before)
    return values.size


def _fold_wide(
    high: Int64Array, low: UInt64Array, values: Float32Array, limit: np.float32, scale: float, weight: int
) -> int:
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        bad = 0
        for i in range(len(block)):
            bad += not (abs(block[i]) <= limit)
        if bad:
            return start
        upper_half, lower_half = high[start : start + BLOCK], low[start : start + BLOCK]
        for i in range(len(block)):
            q = np.int64(np.rint(np.float64(block[i]) * scale))
            upper, lower = weight * (q >> np.int64(32)), weight * (q & np.int64(LOW))
            before = lower_half[i]
            once = before + np.uint64(upper << np.int64(32))
            twice = once + np.uint64(lower)
            carries = np.int64(once < before) + np.int64(twice < once)
            upper_half[i] += (upper >> np.int64(32)) + (lower >> np.int64(63)) + carries
            lower_half[i] = twice
    return len(values)


# --- Which form runs ---------------------------------------------------------------------------------------

NUMPY = Kernels(_first_out_of_range_numpy, _fold_fixed_numpy, _fold_wide_numpy)


def _compiled(types: Any) -> Kernels:
    # Received messages are read-only, and their values may stand at any address.
    values = types.Array(types.float32, 1, "C", readonly=True, aligned=False)
    sums, low = types.int64[::1], types.uint64[::1]
    scaling = (types.float32, types.float64, types.int64)

    return Kernels(
        build(_first_out_of_range, values, types.float32),
        build(_fold_fixed, sums, values, *scaling),
        build(_fold_wide, sums, low, values, *scaling),
    )


FORM = Form(NUMPY, _compiled)
active, compiled = FORM.active, FORM.compiled


def warm_up() -> bool:
    """Compile the kernels, also those of packing, rounding and finishing, or load them from numba's cache; use them.

    Returns whether they are compiled: False where numba is not installed, and NumPy's form goes on.
    """
    for others in kernels_packing, kernels_finish, kernels_rounding:
        others.warm_up()
    return FORM.warm_up()
