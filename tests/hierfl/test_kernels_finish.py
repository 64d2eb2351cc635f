"""Finishing kernels: compiled and NumPy forms against each other and against exact arithmetic, bit for bit."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hierfl import kernels_finish
from hierfl.kernels_finish import NUMPY

COMPILED = kernels_finish.compiled()
FORMS = [pytest.param(NUMPY, id="numpy")] + ([pytest.param(COMPILED, id="numba")] if COMPILED else [])

int64s = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40).map(lambda values: np.array(values, np.int64))


@pytest.mark.parametrize("form", FORMS)
@given(sums=int64s, divisor=st.integers(1, 2**40), s=st.integers(0, 32))
def test_a_mean_is_one_division_of_the_nearest_float64(form, sums, divisor, s):
    means = np.empty(sums.size)
    assert form.mean(sums, float(divisor), 2.0**-s, means) == sums.size
    expected = [float(Fraction(float(value)) / divisor) * 2.0**-s for value in sums.tolist()]
    assert means.tolist() == expected


@pytest.mark.parametrize("form", FORMS)
@given(
    rows=st.lists(st.tuples(st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-1e30, 1e30)), max_size=40),
)
def test_a_move_is_rounded_once_to_float64_and_once_to_float32(form, rows):
    params, step = np.array([row[0] for row in rows], np.float32), np.array([row[1] for row in rows])
    moved = np.empty(params.size, np.float32)
    assert form.move(params, step, moved) == -1
    assert moved.tolist() == [
        float(np.float32(float(value) + change)) for value, change in zip(params, step, strict=True)
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_the_first_value_that_is_not_finite_is_named(form, bad):
    params, step = np.zeros(100, np.float32), np.zeros(100)
    step[[41, 77]] = bad
    assert form.move(params, step, np.empty(100, np.float32)) == 41
    assert form.move(params[:41], step[:41], np.empty(41, np.float32)) == -1


@given(seed=st.integers(0, 2**32), divisor=st.integers(1, 2**27))
def test_both_forms_give_the_same_bits(seed, divisor):
    if COMPILED is None:
        pytest.skip("numba is not installed")
    random = np.random.default_rng(seed)
    sums, params = random.integers(-(2**62), 2**62, 3000), random.standard_normal(3000, np.float32)
    ends = []
    for form in (NUMPY, COMPILED):
        means, moved, followed = np.empty(3000), np.empty(3000, np.float32), np.empty(3000, np.float32)
        form.mean(sums, float(divisor), 2.0**-32, means)
        form.move(params, 0.3 * means, moved)
        assert form.follow(params, sums, float(divisor), 2.0**-32, 0.3, followed) == -1
        assert followed.tobytes() == moved.tobytes()
        ends.append((means.tobytes(), moved.tobytes()))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("form", FORMS)
def test_following_names_the_first_value_that_is_not_finite(form):
    params, sums = np.full(50, 3e38, np.float32), np.zeros(50, np.int64)
    sums[[20, 33]] = 2**62
    moved = np.empty(50, np.float32)
    assert form.follow(params, sums, 1.0, 1.0, 1e20, moved) == 20
