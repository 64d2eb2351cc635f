"""The kernel that rounds sums (``hierfl/feedback.py``), beside its NumPy oracle: the same bits in both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hierfl.kernels_build import Form, build
from hierfl.types import Int64Array

__all__ = ["NUMPY", "RoundingKernels", "active", "compiled", "warm_up"]


class RoundingKernels(NamedTuple):
    """One form of it.

    ``split(values, drop_bits, quotients, left_over)``: ``quotients = rint(values / 2**drop_bits)``, half to even, and
    ``left_over = values - quotients * 2**drop_bits``; arrays of shape ``(n,)``, ``drop_bits`` from 1 to 62.
    ``quotients`` may be ``values``. The caller has made sure that no value is within half a step of the ends of int64.
    """

    split: Callable[[Int64Array, int, Int64Array, Int64Array], int]


def _split_numpy(values: Int64Array, drop_bits: int, quotients: Int64Array, left_over: Int64Array) -> int:
    below = values >> drop_bits
    rounded = (values + ((1 << (drop_bits - 1)) - 1) + (below & 1)) >> drop_bits
    left_over[:] = values - (rounded << drop_bits)
    quotients[:] = rounded
    return values.size


def _split(values: Int64Array, drop_bits: int, quotients: Int64Array, left_over: Int64Array) -> int:
    bits = np.int64(drop_bits)
    almost_half = (np.int64(1) << (bits - np.int64(1))) - np.int64(1)
    for i in range(len(values)):
        value = values[i]
        rounded = (value + almost_half + ((value >> bits) & np.int64(1))) >> bits
        left_over[i] = value - (rounded << bits)
        quotients[i] = rounded
    return len(values)


NUMPY = RoundingKernels(_split_numpy)


def _compiled(types: Any) -> RoundingKernels:
    return RoundingKernels(
        build(_split, types.int64[::1], types.int64, types.int64[::1], types.int64[::1]),
    )


FORM = Form(NUMPY, _compiled)
active, compiled, warm_up = FORM.active, FORM.compiled, FORM.warm_up
