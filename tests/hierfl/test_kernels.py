"""Kernels: compiled and NumPy forms against Python's integers, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hierfl import kernels
from hierfl.kernels import BLOCK, NUMPY

COMPILED = kernels.compiled()
FORMS = [pytest.param(NUMPY, id="numpy")] + ([pytest.param(COMPILED, id="numba")] if COMPILED else [])

values_within_8 = st.lists(st.floats(-8, 8, width=32), max_size=40).map(lambda v: np.array(v, np.float32))
weights = st.integers(-65_535, 65_535)


def exact(value: np.float32, s: int) -> int:
    return round(Fraction(float(value)) * 2**s)  # rounds half to even, as rint does


def test_numba_is_there_in_this_environment():
    assert COMPILED is not None


@pytest.mark.parametrize("form", FORMS)
@given(values=values_within_8, weight=weights, s=st.integers(0, 32))
def test_fixed_fold_is_the_exact_sum(form, values, weight, s):
    sums = np.arange(values.size, dtype=np.int64) - 3
    assert form.fold_fixed(sums, values, np.float32(8), 2.0**s, weight) == values.size
    assert sums.tolist() == [i - 3 + weight * exact(value, s) for i, value in enumerate(values)]


@pytest.mark.parametrize("form", FORMS)
@given(
    rows=st.lists(
        st.tuples(st.floats(-(2.0**30), 2.0**30, width=32), st.integers(-(2**100), 2**100)), min_size=1, max_size=20
    ),
    weight=weights,
)
def test_wide_fold_is_the_exact_sum_in_128_bits(form, rows, weight):
    values = np.array([value for value, _ in rows], np.float32)
    high = np.array([start >> 64 for _, start in rows], np.int64)
    low = np.array([start & (2**64 - 1) for _, start in rows], np.uint64)
    assert form.fold_wide(high, low, values, np.float32(2**30), 2.0**32, weight) == values.size
    sums = [(int(upper) << 64) + int(lower) for upper, lower in zip(high, low, strict=True)]
    assert sums == [start + weight * exact(value, 32) for value, (_, start) in zip(values, rows, strict=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 8.000001, -9.0])
@pytest.mark.parametrize("at", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_folds_stop_before_the_block_with_a_bad_value(form, bad, at):
    values = np.full(2 * BLOCK + 9, 0.5, np.float32)
    values[at] = bad
    assert form.first_out_of_range(values, np.float32(8)) == at
    sums, low = np.zeros(values.size, np.int64), np.zeros(values.size, np.uint64)
    done = form.fold_fixed(sums, values, np.float32(8), 2.0, 3)
    assert done == at // BLOCK * BLOCK
    assert sums.tolist() == [3] * done + [0] * (values.size - done)
    assert form.fold_wide(np.zeros_like(sums), low, values, np.float32(8), 2.0, 3) == done
    assert low.tolist() == sums.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_values_at_the_limit_and_empty_arrays_are_in_range(form):
    limit = np.float32(8)
    assert form.first_out_of_range(np.array([8, -8, 0, -0.0, 1e-45], np.float32), limit) == -1
    assert form.first_out_of_range(np.empty(0, np.float32), limit) == -1
    assert form.fold_fixed(np.empty(0, np.int64), np.empty(0, np.float32), limit, 1.0, 1) == 0


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), size=st.integers(0, 3 * BLOCK), weight=weights, scale=st.integers(0, 32))
def test_both_forms_give_the_same_bits(seed, size, weight, scale):
    if COMPILED is None:
        pytest.skip("numba is not installed")
    random = np.random.default_rng(seed)
    values = (random.random(size, np.float32) - np.float32(0.5)) * np.float32(16)
    ends = []
    for form in (NUMPY, COMPILED):
        sums, high, low = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.uint64)
        form.fold_fixed(sums, values, np.float32(8), 2.0**scale, weight)
        form.fold_wide(high, low, values, np.float32(8), 2.0**scale, weight)
        ends.append((sums.tobytes(), high.tobytes(), low.tobytes()))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [65_535, -65_535, 1])
@pytest.mark.parametrize("limit", [8.0, 8.001, 2.0**14], ids=["in-float64", "just-not", "in-integers"])
def test_the_largest_products_are_exact(form, weight, limit):
    most = np.float32(limit)
    values, sums = np.array([most, -most, 2.0**-33, 3 * 2.0**-33], np.float32), np.array([3, -3, 0, 0], np.int64)
    assert form.fold_fixed(sums, values, most, 2.0**32, weight) == 4
    q = int(Fraction(float(most)) * 2**32)
    assert sums.tolist() == [3 + weight * q, -3 - weight * q, 0, 2 * weight]


@pytest.mark.parametrize("form", FORMS)
def test_read_only_unaligned_values_from_a_message_are_taken(form):
    message = b"\1" + np.arange(5, dtype=np.float32).tobytes()
    values = np.frombuffer(message, np.float32, offset=1)
    assert not values.flags.writeable
    assert not values.flags.aligned
    sums = np.zeros(5, np.int64)
    assert form.fold_fixed(sums, values, np.float32(8), 1.0, 2) == 5
    assert sums.tolist() == [0, 2, 4, 6, 8]


def test_importing_the_core_does_not_import_numba():
    code = "import sys, hierfl.aggregation, hierfl.strategies; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_numba_warm_up_says_so_and_numpy_goes_on():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from hierfl import kernels\n"
        "assert kernels.warm_up() is False and kernels.active() is kernels.NUMPY"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_warm_up_works_where_nothing_can_be_cached(tmp_path):
    code = (
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from hierfl import kernels\n"
        "assert kernels.warm_up() is True and kernels.active() is not kernels.NUMPY"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
