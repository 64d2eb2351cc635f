"""The rounding kernel: compiled and NumPy forms against exact arithmetic, integer by integer."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hierfl import kernels_rounding
from hierfl.kernels_rounding import NUMPY

COMPILED = kernels_rounding.compiled()
FORMS = [pytest.param(NUMPY, id="numpy")] + ([pytest.param(COMPILED, id="numba")] if COMPILED else [])


@pytest.mark.parametrize("form", FORMS)
@given(
    values=st.lists(st.integers(-(2**62), 2**62) | st.integers(-40, 40), max_size=40),
    drop_bits=st.integers(1, 32) | st.just(1),
)
def test_a_quotient_is_rounded_half_to_even_and_what_is_left_over_makes_it_whole(form, values, drop_bits):
    array = np.array(values, np.int64)
    quotients, left_over = np.empty_like(array), np.empty_like(array)
    assert form.split(array, drop_bits, quotients, left_over) == array.size
    assert quotients.tolist() == [round(Fraction(value, 2**drop_bits)) for value in values]
    assert (quotients * 2**drop_bits + left_over).tolist() == values
    assert all(abs(rest) <= 2 ** (drop_bits - 1) for rest in left_over.tolist())


@pytest.mark.parametrize("form", FORMS)
def test_it_may_write_over_what_it_reads_up_to_the_ends_of_its_range(form):
    most = 2**63 - 1 - 2**31
    values, left_over = np.array([most, -most, 2**31, 3 * 2**31, -(2**31)], np.int64), np.empty(5, np.int64)
    form.split(values, 32, values, left_over)
    assert values.tolist() == [2**31 - 1, 1 - 2**31, 0, 2, 0]
    assert left_over.tolist() == [2**31 - 1, 1 - 2**31, 2**31, -(2**31), -(2**31)]
