"""Kernels of encodings: compiled and NumPy forms give the same bits, on both sides of what float64 holds exactly."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hierfl import kernels_encodings
from hierfl.kernels import BLOCK
from hierfl.kernels_encodings import NUMPY

COMPILED = kernels_encodings.compiled()
FORMS = [pytest.param(NUMPY, id="numpy")] + ([pytest.param(COMPILED, id="numba")] if COMPILED else [])
LIMITS = [8.0, 2.0**19, 2.0**29]
"""At s = 32 and the largest weight: products of up to 2**51, 2**67 (wrapping alike), 2**77."""

weights = st.integers(-65_535, 65_535)


def test_numba_is_there_in_this_environment():
    assert COMPILED is not None


@pytest.mark.parametrize("limit", LIMITS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(0, 3 * BLOCK), weight=weights, block=st.sampled_from([16, 4096]))
def test_both_forms_give_the_same_bits(limit, seed, size, weight, block):
    rng = np.random.default_rng(seed)
    values = rng.uniform(-limit, limit, size).astype(np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    codes = rng.integers(-127, 128, size).astype(np.int8)
    offset = int(rng.integers(0, 5)) * 16
    steps = rng.uniform(0, limit / 128, (size + offset) // block + 1).astype(np.float32)
    indices = np.sort(rng.choice(size + 1, size // 3, replace=False)).astype(np.uint32)
    ends = []
    for form in (NUMPY, COMPILED):
        sums = np.arange(3 * (size + 1), dtype=np.int64).reshape(3, -1)
        form.fold_bfloat16(sums[0, :size], halves, np.float32(limit), 2.0**32, weight)
        form.fold_int8(sums[1, :size], codes, steps, offset, block, np.float32(limit), 2.0**32, weight)
        form.fold_sparse(sums[2], indices, values[: indices.size], 2.0**32, weight)
        ends.append(sums.tobytes())
    assert ends[0] == ends[1]


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None)
@given(
    code=st.integers(-127, 127),
    step=st.floats(0, float(np.float32(8 / 127)), width=32),
    weight=weights,
    s=st.integers(0, 32),
)
def test_an_int8_is_folded_as_one_float32_product(form, code, step, weight, s):
    sums, steps = np.array([7], np.int64), np.array([step], np.float32)
    form.fold_int8(sums, np.array([code], np.int8), steps, 0, 16, np.float32(8.1), 2.0**s, weight)
    product = np.float32(code) * np.float32(step)
    assert sums[0] == 7 + weight * round(Fraction(float(product)) * 2**s)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [65_535, -65_535])
def test_the_largest_products_are_exact(form, weight):
    sums = np.array([3, -3], np.int64)
    form.fold_bfloat16(sums, np.array([0x4100, 0xC100], np.uint16), np.float32(8), 2.0**32, weight)
    assert sums.tolist() == [3 + weight * 2**35, -3 - weight * 2**35]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_folds_stop_before_the_block_with_a_bad_value(form, at):
    halves, sums = np.full(2 * BLOCK + 9, 0x3F80, np.uint16), np.zeros(2 * BLOCK + 9, np.int64)
    for bad in (0x4101, 0x7F80, 0xFFC0):
        halves[at] = bad
        assert form.fold_bfloat16(sums, halves, np.float32(8), 1.0, 1) == at // BLOCK * BLOCK
    codes, steps = np.ones(sums.size, np.int8), np.ones(600, np.float32)
    codes[at] = -128
    sums[:] = 0
    done = form.fold_int8(sums, codes, steps, 5, 32, np.float32(127), 1.0, 1)
    assert done == max(0, (at + 5) // 32 * 32 - 5)
    assert sums.tolist() == [1] * done + [0] * (sums.size - done)
