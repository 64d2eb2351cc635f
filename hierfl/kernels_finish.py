"""Kernels of what follows a sum, each beside its NumPy oracle: from integers to means, from a step to the next model.

IEEE operations with one right answer only, so both forms give the same bits, on any number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hierfl.kernels_build import Form, build
from hierfl.types import Float32Array, Float64Array, Int64Array

__all__ = ["NUMPY", "FinishKernels", "active", "compiled", "warm_up"]

LIMIT = np.finfo(np.float32).max


class FinishKernels(NamedTuple):
    """One form of all. All arrays have shape ``(n,)``.

    ``mean(sums, divisor, scale, means)``: ``means = float64(sums) / divisor * scale``; returns ``n``.

    ``move(params, step, moved)``: ``moved = float32(params + step)``, summed in float64; returns the index of the
    first value that is not finite, or -1.

    ``follow(params, sums, divisor, scale, rate, moved)``: both in one pass, ``step = rate * mean``.
    """

    mean: Callable[[Int64Array, float, float, Float64Array], int]
    move: Callable[[Float32Array, Float64Array, Float32Array], int]
    follow: Callable[[Float32Array, Int64Array, float, float, float, Float32Array], int]


def _mean_numpy(sums: Int64Array, divisor: float, scale: float, means: Float64Array) -> int:
    means[:] = sums
    means /= divisor
    means *= scale
    return means.size


def _move_numpy(params: Float32Array, step: Float64Array, moved: Float32Array) -> int:
    with np.errstate(over="ignore", invalid="ignore"):  # looked for here
        moved[:] = params + step
    bad = ~np.isfinite(moved)
    return int(np.argmax(bad)) if bad.any() else -1


def _follow_numpy(
    params: Float32Array, sums: Int64Array, divisor: float, scale: float, rate: float, moved: Float32Array
) -> int:
    means = np.empty(sums.size)
    _mean_numpy(sums, divisor, scale, means)
    return _move_numpy(params, rate * means, moved)


def _mean(sums: Int64Array, divisor: float, scale: float, means: Float64Array) -> int:
    for i in range(len(sums)):
        means[i] = np.float64(sums[i]) / divisor * scale
    return len(sums)


def _move(params: Float32Array, step: Float64Array, moved: Float32Array) -> int:
    bad = 0
    for i in range(len(params)):
        value = np.float32(np.float64(params[i]) + step[i])
        moved[i] = value
        bad += not (abs(value) <= LIMIT)
    if bad:
        for i in range(len(params)):
            if not (abs(moved[i]) <= LIMIT):
                return i
    return -1


def _follow(
    params: Float32Array, sums: Int64Array, divisor: float, scale: float, rate: float, moved: Float32Array
) -> int:
    bad = 0
    for i in range(len(params)):
        step = rate * (np.float64(sums[i]) / divisor * scale)
        value = np.float32(np.float64(params[i]) + step)
        moved[i] = value
        bad += not (abs(value) <= LIMIT)
    if bad:
        for i in range(len(params)):
            if not (abs(moved[i]) <= LIMIT):
                return i
    return -1


NUMPY = FinishKernels(_mean_numpy, _move_numpy, _follow_numpy)


def _compiled(types: Any) -> FinishKernels:
    sums = types.Array(types.int64, 1, "C", readonly=True)
    params = types.Array(types.float32, 1, "C", readonly=True, aligned=False)
    step = types.Array(types.float64, 1, "C", readonly=True)

    # error_model: a division by zero is infinite, as NumPy's; the loop could not be vectorised otherwise.
    built = functools.partial(build, error_model="numpy")
    return FinishKernels(
        built(_mean, sums, types.float64, types.float64, types.float64[::1]),
        built(_move, params, step, types.float32[::1]),
        built(_follow, params, sums, types.float64, types.float64, types.float64, types.float32[::1]),
    )


FORM = Form(NUMPY, _compiled)
active, compiled, warm_up = FORM.active, FORM.compiled, FORM.warm_up
