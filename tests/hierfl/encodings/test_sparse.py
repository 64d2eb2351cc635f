"""Top-k and random-k: what is sent, what is left out, and that feedback loses nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import chosen, group, values

from hierfl.client.residuals import encode_with_feedback
from hierfl.encodings import decode_update, get
from hierfl.errors import ConfigError, ValueOutOfRange

SPARSE = ["topk", "randomk"]


def decoded(encoding, column, vector, seed=0):
    wire = encoding.encode(column, vector, seed)
    return encoding.decode(column, {name: [part] for name, part in wire.items()})


@settings(deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_topk_leaves_out_at_most_its_share_of_the_squares(size, seed):
    encoding, column, vector = chosen("topk"), group(size), values(size, seed)
    left = (vector - decoded(encoding, column, vector)).astype(np.float64)
    share = 1 - encoding.k(column) / size
    assert (left**2).sum() <= share * (vector.astype(np.float64) ** 2).sum() * (1 + 1e-12)


def test_topk_sends_the_largest_and_of_equal_ones_the_first():
    encoding = get("topk", {"fraction": 0.5})
    wire = encoding.encode(group(8), np.array([1, -3, 2, 1, 3, 1, -1, 0], np.float32), 0)
    assert wire["train.index"].tolist() == [0, 1, 2, 4]
    assert wire["train"].tolist() == [1, -3, 2, 3]


def test_randomk_leaves_out_its_share_of_the_squares_on_average():
    size, num_seeds = 50, 3_000
    encoding, column, vector = get("randomk", {"fraction": 0.2}), group(size), values(size, 3)
    squares = vector.astype(np.float64) ** 2
    left = [squares[decoded(encoding, column, vector, seed) == 0].sum() for seed in range(num_seeds)]
    spread = np.std(left) / np.sqrt(num_seeds)
    assert abs(np.mean(left) - 0.8 * squares.sum()) < 5 * spread


def test_randomk_chooses_every_entry_alike_and_others_with_another_seed():
    encoding, column, vector = get("randomk", {"fraction": 0.2}), group(20), np.ones(20, np.float32)
    times = sum(decoded(encoding, column, vector, seed) for seed in range(2_000))
    assert np.abs(times - 400).max() < 5 * np.sqrt(2_000 * 0.2 * 0.8)


@pytest.mark.parametrize(
    ("num_values", "fraction", "k"), [(1, 0.01, 1), (100, 0.01, 1), (101, 0.01, 2), (7, 0.5, 4), (0, 0.5, 0)]
)
def test_k_is_fixed_by_the_plan(num_values, fraction, k):
    assert get("topk", {"fraction": fraction}).k(group(num_values)) == k


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize(
    ("indices", "bad"), [([0, 0, 5], 1), ([3, 2, 5], 1), ([0, 5, 10], 2), ([0, 1, 2**32 - 1], 2), ([4, 4, 4], 1)]
)
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_indices_that_do_not_increase_or_leave_the_vector_are_named_across_chunks_too(name, indices, bad, cut):
    encoding, column = get(name, {"fraction": 0.3}), group(10)
    whole, ones = np.array(indices, np.uint32), np.ones(3, np.float32)
    received = {"train.index": [whole[:cut], whole[cut:]], "train": [ones[:cut], ones[cut:]]}
    rule = "must be above the one before it, and below 10"
    with pytest.raises(ValueOutOfRange, match=rf"vector 'train\.index', value {bad} is {indices[bad]}: {rule}"):
        encoding.check(column, received)
    sums = np.zeros(10, np.int64)
    assert not encoding.fold(sums, column, received, 1)
    assert not sums.any()


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -8.5])
def test_a_value_that_is_not_finite_or_too_large_is_named(name, bad):
    received = {"train.index": [np.arange(3, dtype=np.uint32)], "train": [np.array([1, bad, 1], np.float32)]}
    with pytest.raises(ValueOutOfRange, match="vector 'train', value 1 is"):
        get(name, {"fraction": 0.3}).check(group(10), received)


@pytest.mark.parametrize("name", SPARSE)
def test_a_vector_that_32_bits_cannot_index_is_refused_when_the_job_is_submitted(name):
    with pytest.raises(ConfigError, match=rf"updates\.encoding = '{name}' has 32-bit indices"):
        get(name).wire_vectors(group(2**32 + 1))
    assert get(name).wire_vectors(group(2**32))[0].num_values == 42_949_673


@pytest.mark.parametrize("name", SPARSE)
@settings(deadline=None)
@given(size=st.integers(1, 100), seed=st.integers(0, 2**20), rounds=st.integers(1, 12))
def test_with_feedback_what_is_sent_and_what_is_left_add_up_to_all_there_was(name, size, seed, rounds):
    """In steps of 2**-10, so that float32 adds them exactly."""
    encoding, groups = get(name, {"fraction": 0.25}), (group(size),)
    rng = np.random.default_rng(seed)
    given_, sent, residual = np.zeros(size), np.zeros(size), {}
    for number in range(rounds):
        delta = rng.integers(-1024, 1024, size).astype(np.float32) / np.float32(1024)
        wire, residual = encode_with_feedback(encoding, groups, {"train": delta}, number, residual)
        given_ += delta
        sent += decode_update(encoding, groups, {n: [part] for n, part in wire.items()})["train"]
    assert (sent + residual["train"] == given_).all()


def test_what_is_above_the_limit_waits_with_the_rest():
    encoding, groups = get("topk", {"fraction": 0.5}), (group(2),)
    residual = {"train": np.array([7, 0.5], np.float32)}
    wire, left = encode_with_feedback(encoding, groups, {"train": np.array([4, 0], np.float32)}, 0, residual)
    assert (wire["train.index"].tolist(), wire["train"].tolist()) == ([0], [8])
    assert left["train"].tolist() == [3, 0.5]


def test_an_update_that_carries_no_residual_adds_none_and_leaves_none():
    encoding, groups = get("topk", {"fraction": 0.5}), (group(2),)
    wire, left = encode_with_feedback(encoding, groups, {"train": np.array([4, 1], np.float32)}, 0, None)
    assert (wire["train"].tolist(), left) == ([4], None)
