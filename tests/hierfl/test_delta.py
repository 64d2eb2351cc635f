"""Differences between models: what is applied gives the model's bits, whatever they are; strangers get nowhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hierfl import delta, packing
from hierfl.errors import ValueOutOfRange
from hierfl.packing import PackedSums
from hierfl.types import Float32Array, Int64Array

Vectors = dict[str, Float32Array]


def packed(rows: dict[str, Int64Array], sizes: dict[str, int], piece_words: int = 1000) -> PackedSums:
    groups = delta.groups_of(delta.num_changed(rows), sizes)
    blocks = packing.measure(groups, rows)
    return PackedSums(blocks, [piece.copy() for piece in packing.pack(blocks, rows, piece_words)])


def floats(bits: np.ndarray) -> Float32Array:
    return bits.astype(np.uint32).view(np.float32)


def sizes_of(vectors: Vectors) -> dict[str, int]:
    return {name: vector.size for name, vector in vectors.items()}


def bits_of(vectors: Vectors) -> dict[str, bytes]:
    return {name: vector.tobytes() for name, vector in vectors.items()}


SIZES = (1, 7, 1024, 5000, delta.PIECE + 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SIZES), st.floats(0, 1), st.integers(1, 3000))
def test_any_bits_become_any_other_bits(seed, size, share, piece_words):
    """NaNs of every payload, both zeros, infinities and subnormals are among them."""
    rng = np.random.default_rng(seed)
    base = {"train": floats(rng.integers(0, 2**32, size)), "mean": floats(rng.integers(0, 2**32, 5))}
    model = {name: vector.copy() for name, vector in base.items()}
    where = rng.random(size) < share
    model["train"][where] = floats(rng.integers(0, 2**32, int(where.sum())))
    rows = delta.changes(base, model, size + 5)
    assert rows is not None
    assert delta.num_changed(rows).keys() <= {"train"}
    got = {name: vector.copy() for name, vector in base.items()}
    delta.apply(packed(rows, sizes_of(base), piece_words), got)
    assert bits_of(got) == bits_of(model)


def test_signs_of_zero_and_payloads_of_nan_are_changes_and_equal_nans_are_none():
    base = {"train": floats(np.array([0, 0x7FC00000, 0x7FC00000, 0x80000000]))}
    model = {"train": floats(np.array([0x80000000, 0x7FC00000, 0x7FC00001, 0x80000000]))}
    rows = delta.changes(base, model, 4)
    assert rows is not None
    assert rows["train.gap"].tolist() == [1, 2]
    assert rows["train.step"].tolist() == [-(2**31), 1]


def test_the_example_of_the_protocol():
    base = {"train": np.array([0.25, -1, 0, 0.5, 7.5], np.float32)}
    rows = delta.changes(base, {"train": np.array([0.25, -1.5, 0, -0.5, 7.5], np.float32)}, 2)
    assert rows is not None
    assert rows["train.gap"].tolist() == [2, 2]
    assert rows["train.step"].tolist() == [4194304, -2147483648]


def test_more_changes_than_asked_for_are_no_difference():
    base, model = {"train": np.zeros(8, np.float32)}, {"train": np.ones(8, np.float32)}
    assert delta.changes(base, model, 7) is None
    assert delta.changes(base, model, 8) is not None


def test_few_changes_take_few_bytes_and_neighbours_need_no_gaps():
    rng = np.random.default_rng(3)
    base = {"train": rng.standard_normal(400_000).astype(np.float32)}
    model = {"train": base["train"].copy()}
    model["train"][rng.choice(400_000, 4000, replace=False)] += np.float32(1e-3)
    rows = delta.changes(base, model, 100_000)
    assert rows is not None
    assert packed(rows, sizes_of(base)).blocks.num_words * 8 < 0.02 * base["train"].nbytes
    model["train"][: 2 * packing.BLOCK] += 1
    rows = delta.changes(base, model, 100_000)
    assert rows is not None
    assert packed(rows, sizes_of(base)).blocks.widths[0] == 0, "gaps of 1"


@pytest.mark.parametrize(
    ("gaps", "steps"),
    [
        ([1, 0], [1, 1]),
        ([3, -1], [1, 1]),
        ([2**40], [1]),
        ([-(2**63)], [1]),
        ([2**63 - 1, 2**63 - 1], [1, 1]),
        ([5, 6], [1, 1]),
        ([11], [1]),
        ([1], [2**31]),
        ([1], [-(2**31) - 1]),
        ([1], [2**63 - 1]),
    ],
)
def test_a_strangers_rows_change_nothing_outside_of_the_vector(gaps, steps):
    """Of a vector of 10 values between two that are not to be touched."""
    memory = np.zeros(30, np.float32)
    rows = {"train.gap": np.array(gaps, np.int64), "train.step": np.array(steps, np.int64)}
    with pytest.raises(ValueOutOfRange):
        delta.apply(packed(rows, {"train": 10}), {"train": memory[10:20]})
    assert not memory[:10].any()
    assert not memory[20:].any()
