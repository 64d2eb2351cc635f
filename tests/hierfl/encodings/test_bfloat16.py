"""bfloat16: rounded to nearest even, within its bound, at the edges too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import group

from hierfl.encodings import get
from hierfl.errors import ValueOutOfRange

ENCODING = get("bfloat16")


def roundtrip(values: np.ndarray, **change: object) -> np.ndarray:
    column = group(values.size, **change)
    wire = ENCODING.encode(column, values, 0)
    ENCODING.check(column, {name: [vector] for name, vector in wire.items()})
    return ENCODING.decode(column, {name: [vector] for name, vector in wire.items()})


@settings(deadline=None)
@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=50))
def test_the_error_is_within_the_bound(numbers):
    values = np.array(numbers, np.float32)
    error = np.abs(roundtrip(values).astype(np.float64) - values)
    assert (error <= np.maximum(2.0**-8 * np.abs(values.astype(np.float64)), 2.0**-134)).all()


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0, 1.0),
        (1 + 2.0**-8, 1.0),  # half way: to even
        (1 + 3 * 2.0**-8, 1 + 2.0**-6),
        (1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-7),
        (-1 - 2.0**-8, -1.0),
        (2.0**-149, 0.0),
        (-0.0, -0.0),
    ],
)
def test_rounding_is_to_nearest_ties_to_even(value, rounded):
    (got,) = roundtrip(np.array([value], np.float32))
    assert (float(got), np.signbit(got)) == (rounded, np.signbit(np.float32(rounded)))


def test_a_value_that_would_be_rounded_above_the_limit_is_cut():
    limit = 7.99
    (got,) = roundtrip(np.array([limit], np.float32), max_abs=limit)
    assert got == np.float32(7.96875)


@pytest.mark.parametrize(("code", "word"), [(0x7F80, "inf"), (0xFF80, "-inf"), (0x7FC0, "nan"), (0x4101, "8.0625")])
def test_what_is_not_finite_or_too_large_is_named(code, word):
    codes = np.array([0, 0x4100, code], np.uint16)
    with pytest.raises(ValueOutOfRange, match=f"vector 'train', value 4 is {word}: must be finite and at most 8"):
        ENCODING.check(group(5), {"train": [np.zeros(2, np.uint16), codes]})
