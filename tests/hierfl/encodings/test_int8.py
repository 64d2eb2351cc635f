"""int8 in blocks: its bound, no bias, and what a stranger may not send."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import group

from hierfl.encodings import get
from hierfl.errors import ValueOutOfRange

BLOCK = 16


def roundtrip(values: np.ndarray, rounding: str, seed: int = 0) -> np.ndarray:
    encoding, column = get("int8", {"block": BLOCK, "rounding": rounding}), group(values.size)
    wire = {name: [vector] for name, vector in encoding.encode(column, values, seed).items()}
    encoding.check(column, wire)
    return encoding.decode(column, wire)


def steps_of(values: np.ndarray) -> np.ndarray:
    """Per value its block's largest magnitude over 127."""
    padded = np.zeros(-(-values.size // BLOCK) * BLOCK)
    padded[: values.size] = np.abs(values)
    return np.repeat(padded.reshape(-1, BLOCK).max(axis=1) / 127, BLOCK)[: values.size]


@pytest.mark.parametrize(("rounding", "share"), [("nearest", 0.5), ("stochastic", 1.0)])
@settings(deadline=None)
@given(numbers=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=100), seed=st.integers(0, 2**63 - 1))
def test_the_error_is_within_the_bound(rounding, share, numbers, seed):
    values = np.array(numbers, np.float32)
    error = np.abs(roundtrip(values, rounding, seed).astype(np.float64) - values)
    assert (error <= np.maximum((share + 2.0**-16) * steps_of(values), 2.0**-119)).all()


def test_stochastic_rounding_is_unbiased_and_nearest_is_not():
    values = np.array([1.0, 0.3, -0.2001, 0.003, 0.9999, -1e-4, 0, 0.5], np.float32)
    num_seeds, step = 4_000, 1 / 127
    mean = np.mean([roundtrip(values, "stochastic", seed) for seed in range(num_seeds)], axis=0, dtype=np.float64)
    assert np.abs(mean - values).max() < 5 * 0.5 * step / np.sqrt(num_seeds)  # five standard deviations at most
    assert np.abs(roundtrip(values, "nearest") - values).max() > 0.2 * step


def test_seeds_draw_differently_and_a_block_does_not_depend_on_the_vectors_end():
    values = np.linspace(-1, 1, 40, dtype=np.float32)
    assert roundtrip(values, "stochastic", 1).tobytes() != roundtrip(values, "stochastic", 2).tobytes()
    assert roundtrip(values, "nearest")[:32].tobytes() == roundtrip(values[:32], "nearest").tobytes()


def test_large_vectors_are_encoded_in_parts_with_the_same_bits():
    values = np.random.default_rng(0).standard_normal(2**18 + 100, np.float32)
    whole, last = roundtrip(values, "nearest"), roundtrip(values[2**18 :], "nearest")
    assert whole[2**18 :].tobytes() == last.tobytes()


@pytest.mark.parametrize("max_abs", [8.0, 7.3, 1e-3, 2.0**20 + 0.1])
def test_values_at_the_limit_stay_within_it(max_abs):
    column, encoding = group(BLOCK, max_abs=max_abs, s=10), get("int8", {"block": BLOCK})
    values = np.full(BLOCK, column.limit, np.float32)
    wire = {name: [vector] for name, vector in encoding.encode(column, values, 0).items()}
    encoding.check(column, wire)
    assert (encoding.decode(column, wire) <= column.limit).all()


@pytest.mark.parametrize("step", [np.nan, np.inf, -1e-9, -np.inf, 0.063, 3e38])
def test_a_step_that_could_leave_the_range_is_named(step):
    received = {"train.scale": [np.array([0, step], np.float32)], "train": [np.zeros(20, np.int8)]}
    encoding = get("int8", {"block": BLOCK})
    with pytest.raises(ValueOutOfRange, match=r"vector 'train\.scale', value 1 is .*: must be finite, not negative"):
        encoding.check(group(20), received)
    assert not encoding.fold(np.zeros(20, np.int64), group(20), received, 1)


def test_the_code_of_minus_128_is_named_and_what_was_folded_before_it_taken_out():
    codes = np.ones(100, np.int8)
    codes[70] = -128
    received = {"train.scale": [np.full(7, 0.5, np.float32) / 8], "train": [codes[:33], codes[33:]]}
    encoding, sums = get("int8", {"block": BLOCK}), np.arange(100)
    with pytest.raises(ValueOutOfRange, match="vector 'train', value 70 is -128: must be from -127 to 127"):
        encoding.check(group(100), received)
    assert not encoding.fold(sums, group(100), received, 5)
    assert sums.tolist() == list(range(100))
