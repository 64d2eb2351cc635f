"""Kernels that decode and fold: values of an encoded update become float32 and then part of the sums, in registers.

Each stands beside its slow NumPy oracle, with the same bits: widening a bfloat16 is exact, a product of an int8 and
a step is one float32 multiplication, and the rest is ``hierfl/kernels.py``'s rule. The form follows that module's:
compiled after ``kernels.warm_up()``, NumPy's until then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hierfl import kernels
from hierfl.kernels import BLOCK, EXACT, MAGIC, MAGIC_BITS
from hierfl.kernels_build import Form, build
from hierfl.types import Float32Array, Int64Array

__all__ = ["NUMPY", "EncodingKernels", "active", "compiled", "warm_up"]

Int8Array = npt.NDArray[np.int8]
UInt16Array = npt.NDArray[np.uint16]
UInt32Array = npt.NDArray[np.uint32]


class EncodingKernels(NamedTuple):
    """One form of all kernels. Each does ``sums += weight * rint(decoded * scale)``.

    ``fold_bfloat16(sums, codes, limit, scale, weight)``: ``codes`` of shape ``(n,)``, uint16, as ``sums``. Goes up to
    the first block of ``BLOCK`` with a value that is not within ``±limit``; returns how many it folded.

    ``fold_int8(sums, codes, steps, offset, block, limit, scale, weight)``: ``codes`` begin at value ``offset`` of their
    vector, whose value i has step ``steps[i // block]``, which the caller has checked: ``127 * step`` is within
    ``limit``. Goes up to the first block with a code of -128, as above.

    ``fold_sparse(sums, indices, values, scale, weight)``: adds to ``sums[indices[i]]``; the caller has checked
    that every index is within ``sums``, and every value small enough.
    """

    fold_bfloat16: Callable[[Int64Array, UInt16Array, np.float32, float, int], int]
    fold_int8: Callable[[Int64Array, Int8Array, Float32Array, int, int, np.float32, float, int], int]
    fold_sparse: Callable[[Int64Array, UInt32Array, Float32Array, float, int], int]


def _quantised(values: Float32Array, scale: float, weight: int) -> Int64Array:
    q: Int64Array = np.rint(values.astype(np.float64) * scale).astype(np.int64)
    return weight * q


# --- bfloat16 ----------------------------------------------------------------------------------------------


def _fold_bfloat16_numpy(sums: Int64Array, codes: UInt16Array, limit: np.float32, scale: float, weight: int) -> int:
    for start in range(0, codes.size, BLOCK):
        block = codes[start : start + BLOCK]
        values = (block.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if not (np.abs(values) <= limit).all():
            return start
        sums[start : start + BLOCK] += _quantised(values, scale, weight)
    return codes.size


def _fold_bfloat16(sums: Int64Array, codes: UInt16Array, limit: np.float32, scale: float, weight: int) -> int:
    factor = np.float64(weight)
    is_small = abs(factor) * (np.float64(limit) * scale + 1) <= EXACT
    most = np.uint16(np.float32(limit).view(np.uint32) >> np.uint32(16))
    for start in range(0, len(codes), BLOCK):
        block = codes[start : start + BLOCK]
        bad = 0
        for i in range(len(block)):  # magnitudes compare as their codes do, infinity and NaN above all
            bad += (block[i] & np.uint16(0x7FFF)) > most
        if bad:
            return start
        part = sums[start : start + BLOCK]
        for i in range(len(block)):
            value = np.uint32(np.uint32(block[i]) << np.uint32(16)).view(np.float32)
            q = np.rint(np.float64(value) * scale)
            if is_small:
                part[i] += np.float64(q * factor + MAGIC).view(np.int64) - MAGIC_BITS
            else:
                part[i] += weight * np.int64(q)
    return len(codes)


# --- int8 in blocks ----------------------------------------------------------------------------------------


def _fold_int8_numpy(
    sums: Int64Array,
    codes: Int8Array,
    steps: Float32Array,
    offset: int,
    block: int,
    limit: np.float32,
    scale: float,
    weight: int,
) -> int:
    del limit
    bad = np.flatnonzero(codes == -128)
    count = max(0, (offset + int(bad[0])) // block * block - offset) if bad.size else codes.size
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        at = np.arange(offset + start, offset + stop) // block
        sums[start:stop] += _quantised(codes[start:stop].astype(np.float32) * steps[at], scale, weight)
    return count


def _fold_int8(
    sums: Int64Array,
    codes: Int8Array,
    steps: Float32Array,
    offset: int,
    block: int,
    limit: np.float32,
    scale: float,
    weight: int,
) -> int:
    factor = np.float64(weight)
    is_small = abs(factor) * (np.float64(limit) * scale + 1) <= EXACT
    start = 0
    while start < len(codes):
        at = offset + start
        stop = min(len(codes), start + block - at % block)
        step = np.float32(steps[at // block])
        piece, part = codes[start:stop], sums[start:stop]
        bad = 0
        for i in range(len(piece)):
            bad += piece[i] == -128
        if bad:
            return start
        for i in range(len(piece)):
            q = np.rint(np.float64(np.float32(piece[i]) * step) * scale)
            if is_small:
                part[i] += np.float64(q * factor + MAGIC).view(np.int64) - MAGIC_BITS
            else:
                part[i] += weight * np.int64(q)
        start = stop
    return len(codes)


# --- sparse ------------------------------------------------------------------------------------------------


def _fold_sparse_numpy(sums: Int64Array, indices: UInt32Array, values: Float32Array, scale: float, weight: int) -> int:
    np.add.at(sums, indices, _quantised(values, scale, weight))
    return values.size


def _fold_sparse(sums: Int64Array, indices: UInt32Array, values: Float32Array, scale: float, weight: int) -> int:
    for i in range(len(values)):  # one after the other: memory decides how fast
        sums[indices[i]] += weight * np.int64(np.rint(np.float64(values[i]) * scale))
    return len(values)


# --- Which form runs ---------------------------------------------------------------------------------------

NUMPY = EncodingKernels(_fold_bfloat16_numpy, _fold_int8_numpy, _fold_sparse_numpy)


def _compiled(types: Any) -> EncodingKernels:

    def received(kind: object) -> object:
        return types.Array(kind, 1, "C", readonly=True, aligned=False)  # messages: read-only, at any address

    sums, floats, whole = types.int64[::1], received(types.float32), types.int64
    scaling = (types.float32, types.float64, whole)
    return EncodingKernels(
        build(_fold_bfloat16, sums, received(types.uint16), *scaling),
        build(_fold_int8, sums, received(types.int8), floats, whole, whole, *scaling),
        build(_fold_sparse, sums, received(types.uint32), floats, *scaling[1:]),
    )


compiled = Form(NUMPY, _compiled).compiled


def active() -> EncodingKernels:
    """The kernels in use: compiled ones where those of ``hierfl/kernels.py`` are."""
    form = None if kernels.active() is kernels.NUMPY else compiled()
    return form or NUMPY


def warm_up() -> bool:
    """Compile both modules' kernels, or load them from numba's cache; whether they are compiled."""
    return kernels.warm_up() and compiled() is not None
