"""Rounded partials: what is left over is never lost, and never more than the stated bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hierfl import kernels, packing
from hierfl.aggregation import Accumulator, ColumnGroup, GroupKind, PartialAggregate, Weighting
from hierfl.errors import ConfigError, RequirementUnknown, ValueOutOfRange
from hierfl.feedback import restored, round_off
from hierfl.packing import PackedSums
from hierfl.rounding import (
    MAX_DROP_BITS,
    drop_bits_of,
    encoding_name,
    error_of_a_sum,
    largest_sum,
    require_room,
    rounded_groups,
)

kernels.warm_up()  # the forms are compared in test_kernels_rounding

SIZE = 1500
GROUPS = (
    ColumnGroup(name="train", kind=GroupKind.FIXED, s=32, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=SIZE),
    ColumnGroup(name="mean", kind=GroupKind.WIDE, s=32, max_abs=2.0**20, weighting=Weighting.WEIGHT, num_values=7),
    ColumnGroup(name="seen", kind=GroupKind.COUNT, s=0, max_abs=100.0, weighting=Weighting.NONE, num_values=5),
    ColumnGroup(name="own", kind=GroupKind.FIXED, s=32, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=3),
)
TRAIN = GROUPS[0]


def partial_of(seed: int, weight: int, bits: int = 63) -> PartialAggregate:
    """Sums of any size that ``weight`` allows, some of them as large as can be."""
    random = np.random.default_rng(seed)
    sums = {group.name: np.zeros(group.shape, np.int64) for group in GROUPS}
    bound = min(TRAIN.max_q * weight, 2**bits - 1)
    sums["train"][:] = random.integers(-bound, bound, SIZE, endpoint=True)
    sums["train"][:4] = (bound, -bound, 0, bound // 2)
    sums["mean"][1] = random.integers(0, 1000, 7)
    sums["own"][:] = random.integers(0, 1000, 3)
    sums["seen"][:] = random.integers(0, 100, 5)
    return PartialAggregate(GROUPS, sums, weight, 1, 1, {"num_examples": weight})


def packed(left_over: dict[str, np.ndarray]) -> PackedSums:
    blocks = packing.measure(rounded_groups(GROUPS), left_over)
    return PackedSums(blocks, [piece.copy() for piece in packing.pack(blocks, left_over, 4096)])


@settings(max_examples=40, deadline=None)
@given(
    rounds=st.lists(st.tuples(st.integers(0, 2**32), st.integers(1, 65_535)), min_size=1, max_size=6),
    drop_bits=st.integers(1, MAX_DROP_BITS),
    bits=st.sampled_from([12, 34, 50, 63]),
)
def test_all_that_was_released_and_what_is_left_over_are_all_that_was_summed(rounds, drop_bits, bits):
    summed, released, carried = [0] * SIZE, [0] * SIZE, None
    for seed, weight in rounds:
        exact = partial_of(seed, weight, bits)
        before = exact.sums["train"].copy()
        made = round_off(exact, drop_bits, carried)
        assert np.array_equal(exact.sums["train"], before), "what was handed over stays as it is"
        summed = [a + b for a, b in zip(summed, exact.sums["train"].tolist(), strict=True)]
        quotients, left_over = made.partial.sums["train"], made.left_over["train"]
        released = [a + b * 2**drop_bits for a, b in zip(released, quotients.tolist(), strict=True)]
        assert [a + b for a, b in zip(released, left_over.tolist(), strict=True)] == summed
        assert int(np.abs(left_over).max()) <= 2 ** (drop_bits - 1), "however many rounds went before"
        assert int(np.abs(quotients).max()) <= largest_sum(TRAIN, weight, drop_bits)
        carried = packed(made.left_over)


def test_only_trained_fixed_point_sums_are_rounded():
    exact = partial_of(1, 10)
    made = round_off(exact, 20, None)
    assert set(made.left_over) == {"train"}
    for name in ("mean", "seen", "own"):
        assert made.partial.sums[name] is exact.sums[name]
    counts = ("weight", "num_sites", "num_updates", "metrics", "groups")
    assert all(getattr(made.partial, name) == getattr(exact, name) for name in counts)


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=4), drop_bits=st.integers(1, MAX_DROP_BITS))
def test_the_total_of_rounded_regions_is_within_half_a_step_each_of_the_exact_one(weights, drop_bits):
    exact, rounded = Accumulator(GROUPS), Accumulator(GROUPS)
    for seed, weight in enumerate(weights):
        one = partial_of(seed, weight, 50)
        exact.add(one)
        rounded.add(round_off(one, drop_bits, None).partial)
    total = restored(rounded.partial(len(weights)), drop_bits, len(weights))
    wanted = exact.partial(len(weights))
    off = np.abs(total.sums["train"] - wanted.sums["train"])
    assert int(off.max()) <= len(weights) * 2 ** (drop_bits - 1)
    assert float(off.max()) * 2.0**-TRAIN.s <= len(weights) * error_of_a_sum(TRAIN, drop_bits)
    assert np.array_equal(total.sums["mean"], wanted.sums["mean"])
    assert total.weight == wanted.weight


def test_the_largest_sum_with_the_largest_residual_is_within_its_bound_and_reaches_it():
    drop_bits, weight = 20, 3
    exact = partial_of(0, weight)
    carried = packed({"train": np.full(SIZE, 2 ** (drop_bits - 1), np.int64)})
    quotients = round_off(exact, drop_bits, carried).partial.sums["train"]
    bound = largest_sum(TRAIN, weight, drop_bits)
    assert bound == TRAIN.max_q * weight // 2**drop_bits + 1
    assert int(quotients.max()) <= bound
    odd = ColumnGroup(name="train", kind=GroupKind.FIXED, s=0, max_abs=3.0, weighting=Weighting.ONE, num_values=1)
    top = PartialAggregate((odd,), {"train": np.array([3])}, 1, 1, 1)
    half = packing.measure((odd,), {"train": np.array([1])})
    made = round_off(top, 1, PackedSums(half, list(packing.pack(half, {"train": np.array([1])}, 4096))))
    assert made.partial.sums["train"].tolist() == [2] == [largest_sum(odd, 1, 1)]


def test_sums_that_could_overflow_by_rounding_are_refused_not_wrapped():
    third = (2**63 - 1) // 3 // 512 * 512  # a float64, whole
    full = ColumnGroup(name="train", kind=GroupKind.FIXED, s=0, max_abs=third, weighting=Weighting.WEIGHT, num_values=1)
    assert 3 * full.max_q <= 2**63 - 1 < 3 * full.max_q + 2**32
    top = PartialAggregate((full,), {"train": np.array([3 * full.max_q])}, 3, 1, 1)
    with pytest.raises(ValueOutOfRange, match="no room to round 32 bits"):
        round_off(top, 32, None)
    with pytest.raises(ValueOutOfRange, match="could exceed 64 bits"):
        restored(top, 32, 1)
    with pytest.raises(ConfigError, match=r"partials\.drop_bits.*no room in 64 bits"):
        require_room((full,), 3, 1, 32)
    require_room((full,), 3, 1, 0)
    with pytest.raises(ConfigError, match="no sums that can be rounded"):
        require_room(GROUPS[1:], 1, 1, 8)


def test_a_form_is_named_in_one_way_and_others_are_not_known():
    for drop_bits in range(MAX_DROP_BITS + 1):
        assert drop_bits_of(encoding_name(drop_bits)) == drop_bits
    assert (encoding_name(0), encoding_name(20)) == ("packed", "rounded-20")
    for unknown in ("rounded-0", "rounded-33", "rounded-020", "rounded-", "rounded", "20", "packed/2", "rounded-٣"):
        with pytest.raises(RequirementUnknown, match="upgrade"):
            drop_bits_of(unknown)
