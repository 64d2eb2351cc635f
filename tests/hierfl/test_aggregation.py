"""Sums: any grouping, order and split has the same bits; nothing wraps; what does not fit changes nothing."""

from __future__ import annotations

import pickle
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hierfl import documents, kernels, limbs
from hierfl.aggregation import (
    MAX_WEIGHT,
    Accumulator,
    ColumnGroup,
    GroupKind,
    PartialAggregate,
    Weighting,
    check_values,
    choose_scale,
)
from hierfl.errors import ConfigError, InvalidTransition, LayoutMismatch, ValueOutOfRange

SIZE = 5
DEFAULT_TOTAL = 2**27


def group(name: str = "train", **change: object) -> ColumnGroup:
    options = {"kind": GroupKind.FIXED, "s": 32, "max_abs": 8, "weighting": Weighting.WEIGHT, "num_values": SIZE}
    return ColumnGroup(name=name, **(options | change))


GROUPS = (
    group(),
    group("mean", kind=GroupKind.WIDE, max_abs=2**20),
    group("votes", kind=GroupKind.COUNT, s=0, max_abs=100, weighting=Weighting.NONE),
    group("control", weighting=Weighting.ONE),
)


class ClientUpdate(NamedTuple):
    vectors: dict[str, np.ndarray]
    weight: int
    loss: int


def vector(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return st.lists(elements, min_size=SIZE, max_size=SIZE).map(lambda values: np.array(values, np.float32))


updates = st.builds(
    ClientUpdate,
    st.fixed_dictionaries(
        {
            "train": vector(st.floats(-8, 8, width=32)),
            "mean": vector(st.floats(-(2.0**20), 2.0**20, width=32)),
            "votes": vector(st.integers(-100, 100)),
            "control": vector(st.floats(-8, 8, width=32)),
        }
    ),
    st.integers(1, MAX_WEIGHT),
    st.integers(-(2**40), 2**40),
)


def fold_all(cohort: list[ClientUpdate], cut: int = SIZE) -> PartialAggregate:
    sums = Accumulator(GROUPS)
    for update in cohort:
        chunks = {name: [values[:cut], values[cut:]] for name, values in update.vectors.items()}
        sums.fold(chunks, update.weight, {"loss": update.loss})
    return sums.partial(len(cohort))


def exact_int(partial: PartialAggregate, name: str, index: int) -> int:
    sums = partial.sums[name]
    if sums.ndim == 2:
        return (int(sums[0, index]) << 64) + (int(sums[1, index]) & (2**64 - 1))
    return int(sums[index])


@pytest.fixture(params=["numpy", "numba"], autouse=True)
def both_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    form = kernels.NUMPY if request.param == "numpy" else kernels.compiled()
    assert form is not None, "numba is part of the test environment"
    monkeypatch.setattr(kernels.FORM, "in_use", form)


# --- the algebra


@given(cohort=st.lists(updates, min_size=1, max_size=8), data=st.data())
def test_any_grouping_order_and_split_of_clients_has_the_same_bits(cohort, data):
    flat = fold_all(cohort)
    shuffled = data.draw(st.permutations(cohort))
    regions: list[list[ClientUpdate]] = [[] for _ in range(data.draw(st.integers(1, 4)))]
    for update in shuffled:
        regions[data.draw(st.integers(0, len(regions) - 1))].append(update)
    total = PartialAggregate.empty(GROUPS)
    for region in regions:
        total += fold_all(region, cut=data.draw(st.integers(0, SIZE)))
    assert total == flat
    for name, mean in flat.finish().items():
        assert total.finish()[name].tobytes() == mean.tobytes()


@given(cohort=st.lists(updates, min_size=1, max_size=5))
def test_sums_and_means_are_those_of_exact_integers(cohort):
    partial = fold_all(cohort)
    weight = sum(update.weight for update in cohort)
    finished = partial.finish()
    for group in GROUPS:
        for index in range(SIZE):
            exact = sum(
                group.multiplier(update.weight) * round(Fraction(float(update.vectors[group.name][index])) * 2**group.s)
                for update in cohort
            )
            assert exact_int(partial, group.name, index) == exact
            divisor = {"weight": weight, "one": len(cohort), "none": 1}[group.weighting]
            assert finished[group.name][index] == float(exact) / divisor / 2.0**group.s
    assert partial.metrics == {"loss": sum(update.loss for update in cohort)}
    assert (partial.weight, partial.num_updates, partial.num_sites) == (weight, len(cohort), len(cohort))


@given(one=st.lists(updates, max_size=3), two=st.lists(updates, max_size=3), three=st.lists(updates, max_size=3))
def test_partials_are_a_commutative_monoid(one, two, three):
    a, b, c = fold_all(one), fold_all(two), fold_all(three)
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert PartialAggregate.empty(GROUPS) + a == replace(a, metrics=a.metrics)


def test_error_of_a_mean_is_at_most_half_a_step():
    sums = Accumulator((group(),))
    value = np.float32(0.1234567)
    sums.fold({"train": [np.full(SIZE, value)]}, 3)
    assert abs(sums.partial(1).finish()["train"][0] - float(value)) <= 2.0**-33


def test_partials_differ_when_a_bit_or_a_count_does():
    partial = fold_all([])
    sums = {name: array.copy() for name, array in partial.sums.items()}
    sums["mean"][1, 0] = 1
    assert partial != replace(partial, sums=sums)
    assert partial != replace(partial, num_updates=1, weight=1)
    assert partial != "a partial"


def test_partials_survive_pickling():
    partial = fold_all([ClientUpdate({g.name: np.ones(SIZE, np.float32) for g in GROUPS}, 2, 3)])
    assert pickle.loads(pickle.dumps(partial)) == partial


def test_an_evaluation_has_metrics_and_no_groups():
    sums = Accumulator(())
    sums.fold({}, 5, {"loss": 7})
    sums.fold({}, 6, {"loss": 1, "right": 2})
    total = sums.partial(2)
    assert (total.finish(), total.metrics, total.weight) == ({}, {"loss": 8, "right": 2}, 11)


def test_a_sum_over_nobody_has_no_mean():
    with pytest.raises(ValueOutOfRange, match="no update"):
        PartialAggregate.empty(GROUPS).finish()


# --- nothing wraps


def full_group(total_weight: int) -> ColumnGroup:
    return group(max_abs=(2**63 - 1) // (total_weight << 32), num_values=1)


def test_a_fold_without_room_is_refused_and_changes_nothing():
    tight = full_group(2**16)
    sums = Accumulator((tight,))
    top = {"train": [np.array([tight.limit], np.float32)]}
    sums.fold(top, 2**16 - 1)
    sums.fold(top, 1)
    with pytest.raises(ValueOutOfRange, match=r"'train'.*64 bits"):
        sums.fold(top, MAX_WEIGHT)
    partial = sums.partial(1)
    assert partial.weight == 2**16
    assert exact_int(partial, "train", 0) == 2**16 * round(Fraction(float(tight.limit)) * 2**32) < 2**63


def test_adding_partials_that_could_overflow_is_refused():
    tight = full_group(2**16)
    half = PartialAggregate((tight,), {"train": np.array([-(2**62)])}, 40_000, 1, 1)
    assert (half + PartialAggregate.empty((tight,))).sums["train"].tolist() == [-(2**62)]
    with pytest.raises(ValueOutOfRange, match="64 bits"):
        half + half


def test_groups_without_weights_count_updates_against_their_room():
    tight = group(max_abs=2**29, weighting=Weighting.ONE, num_values=1)
    sums = Accumulator((tight,))
    for _ in range(3):
        sums.fold({"train": [np.zeros(1, np.float32)]}, MAX_WEIGHT)
    with pytest.raises(ValueOutOfRange, match="64 bits"):
        sums.fold({"train": [np.zeros(1, np.float32)]}, 1)


@pytest.mark.parametrize(("name", "index"), [("train", 0), ("votes", 1), ("control", 4)])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_above_what_the_weight_can_make_are_refused_naming_the_group(name, index, sign):
    partial = fold_all([ClientUpdate({g.name: np.zeros(SIZE, np.float32) for g in GROUPS}, 10, 0)])
    bound = {"train": 10 * 8 * 2**32, "votes": 100, "control": 8 * 2**32}[name]
    partial.sums[name][index] = sign * bound
    partial.check_bounds(10)
    partial.sums[name][index] += sign
    with pytest.raises(ValueOutOfRange, match=f"'{name}'"):
        partial.check_bounds(10)
    with pytest.raises(ValueOutOfRange, match=f"'{name}'"):
        partial + PartialAggregate.empty(GROUPS)


@pytest.mark.parametrize("total", [10 * 2**52 + 1, -10 * 2**52 - 1, 2**64, -(2**127), 2**127 - 1])
def test_wide_sums_above_their_bound_are_refused(total):
    partial = fold_all([ClientUpdate({g.name: np.zeros(SIZE, np.float32) for g in GROUPS}, 10, 0)])
    low = total & (2**64 - 1)
    partial.sums["mean"][:, 3] = (total >> 64, low - 2**64 if low >= 2**63 else low)
    assert exact_int(partial, "mean", 3) == total
    with pytest.raises(ValueOutOfRange, match="'mean'"):
        partial.check_bounds(10)


def test_a_partial_above_its_regions_share_is_refused():
    with pytest.raises(ValueOutOfRange, match="share"):
        PartialAggregate((), {}, 11, 1, 1).check_bounds(10)


@pytest.mark.parametrize("counts", [(-1, 0, 0), (1, 0, 0), (0, 0, 1), (1, 2, 1), (MAX_WEIGHT + 1, 1, 1), (5, -1, 1)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueOutOfRange, match="cannot have weight"):
        PartialAggregate((), {}, *counts)


def test_sums_of_another_form_are_refused():
    with pytest.raises(LayoutMismatch, match="int64"):
        PartialAggregate((group(),), {"train": np.zeros(SIZE)}, 0, 0, 0)
    with pytest.raises(LayoutMismatch, match=r"\(2, 5\)"):
        PartialAggregate((GROUPS[1],), {"mean": np.zeros(SIZE, np.int64)}, 0, 0, 0)
    with pytest.raises(LayoutMismatch, match="other"):
        PartialAggregate((group(),), {"other": np.zeros(SIZE, np.int64)}, 0, 0, 0)
    with pytest.raises(LayoutMismatch, match="column groups"):
        PartialAggregate.empty((group(),)) + PartialAggregate.empty((group(s=31),))


def test_metric_sums_beyond_64_bits_are_refused_and_change_nothing():
    sums = Accumulator(())
    sums.fold({}, 1, {"loss": 2**63 - 1})
    with pytest.raises(ValueOutOfRange, match="'loss'"):
        sums.fold({}, 1, {"loss": 1})
    assert sums.partial(1).metrics == {"loss": 2**63 - 1}


# --- one update, wholly or not at all


def good() -> dict[str, list[np.ndarray]]:
    return {g.name: [np.ones(2, np.float32), np.ones(SIZE - 2, np.float32)] for g in GROUPS}


@pytest.mark.parametrize("name", ["train", "mean", "control"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, np.float32(2**21)])
def test_an_update_with_a_bad_value_is_refused_by_name_and_leaves_no_trace(name, bad):
    sums, twin = Accumulator(GROUPS), Accumulator(GROUPS)
    for each in (sums, twin):
        each.fold(good(), 7, {"loss": 1})
    vectors = good()
    vectors[name][1][1] = bad
    with pytest.raises(ValueOutOfRange, match=f"'{name}', value 3 is"):
        sums.fold(vectors, 9, {"loss": 5})
    assert sums.partial(1) == twin.partial(1)


def test_a_bad_value_far_into_a_large_update_leaves_no_trace():
    large = (group(num_values=50_000), group("mean", kind=GroupKind.WIDE, max_abs=2**20, num_values=50_000))
    sums = Accumulator(large)
    chunks = list(np.full(50_000, -0.3, np.float32).reshape(5, -1))
    bad = [chunk.copy() for chunk in chunks]
    bad[4][9_999] = np.nan
    with pytest.raises(ValueOutOfRange, match="'mean', value 49999 is nan"):
        sums.fold({"train": chunks, "mean": bad}, MAX_WEIGHT)
    assert sums.partial(0) == PartialAggregate.empty(large)


def test_a_fraction_in_a_count_is_refused():
    vectors = good()
    vectors["votes"][1][0] = 0.5
    sums = Accumulator(GROUPS)
    with pytest.raises(ValueOutOfRange, match=r"'votes', value 2 is 0.5: must be a whole number"):
        sums.fold(vectors, 1)
    assert sums.partial(0) == PartialAggregate.empty(GROUPS)


@pytest.mark.parametrize("weight", [0, -1, MAX_WEIGHT + 1])
def test_weights_out_of_range_are_refused(weight):
    with pytest.raises(ValueOutOfRange, match="weight"):
        Accumulator(GROUPS).fold(good(), weight)


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [np.ones(SIZE + 1, np.float32)],
        [np.ones(SIZE, np.float64)],
        [np.ones((1, SIZE), np.float32)],
        [np.ones(2 * SIZE, np.float32)[::2]],
    ],
)
def test_vectors_of_another_form_are_refused(chunks):
    with pytest.raises(LayoutMismatch, match="'train'"):
        Accumulator(GROUPS).fold(good() | {"train": chunks}, 1)


def test_missing_and_unknown_vectors_are_refused():
    vectors = good()
    del vectors["mean"]
    with pytest.raises(LayoutMismatch):
        Accumulator(GROUPS).fold(vectors, 1)
    with pytest.raises(LayoutMismatch):
        Accumulator(GROUPS).fold(good() | {"more": []}, 1)


def test_an_accumulator_adds_partials_of_intakes_and_hands_over_once():
    sums = Accumulator(GROUPS)
    sums.fold(good(), 7)
    other = Accumulator(GROUPS)
    other.fold(good(), 5)
    other.add(sums.partial(1))
    assert other.nbytes == 8 * SIZE * 5
    both = other.partial(1)  # one site, on two intakes
    assert (both.weight, both.num_updates, both.num_sites, both.nbytes) == (12, 2, 1, other.nbytes)
    assert both.finish()["train"].tolist() == [1.0] * SIZE
    for late in (lambda: other.fold(good(), 1), lambda: other.add(both), lambda: other.partial(1)):
        with pytest.raises(InvalidTransition, match="handed over"):
            late()


def test_empty_chunks_and_empty_groups_are_legal():
    nothing = group(num_values=0)
    sums = Accumulator((nothing,))
    sums.fold({"train": []}, 1)
    sums.fold({"train": [np.empty(0, np.float32)]}, 1)
    total = sums.partial(1) + PartialAggregate.empty((nothing,))
    total.check_bounds(2)
    assert total.finish()["train"].shape == (0,)


# --- caps and scales


@pytest.mark.parametrize(
    ("max_abs", "total", "s"),
    [(8, DEFAULT_TOTAL, 32), (8, 2**28 - 1, 32), (8, 2**28, 31), (0.1, 2**33, 32), (64, 2**29 - 1, 28)],
)
def test_scale_is_32_or_what_the_caps_allow(max_abs, total, s):
    assert choose_scale(max_abs, total) == s
    group(max_abs=max_abs, s=s).require_room(total, 1)


def test_caps_that_leave_too_few_bits_are_refused_naming_what_to_lower():
    words = r"arithmetic.max_abs = 1024 .*lower it to 255.999, or arithmetic.total_weight to 33554431"
    with pytest.raises(ConfigError, match=words):
        choose_scale(1024, 2**27)
    assert choose_scale(255.999, 2**27) == 28
    assert choose_scale(1024, 33_554_431) == 28


def test_wide_and_count_groups_need_no_lower_caps():
    assert choose_scale(2**20, 2**40, GroupKind.WIDE) == 32
    assert choose_scale(2**40, 2**40, GroupKind.WIDE) == 22
    assert choose_scale(100, 2**40, GroupKind.COUNT) == 0


@pytest.mark.parametrize("max_abs", [0.1, 1 / 3, 8, 16_777_217, 2**53 - 1, 1e-40])
def test_the_float32_limit_is_the_largest_value_within_max_abs(max_abs):
    limit = group(max_abs=max_abs, s=0).limit
    assert float(limit) <= max_abs < float(np.nextafter(limit, np.float32(np.inf)))
    assert group(max_abs=max_abs, s=0).max_q >= round(Fraction(float(limit)))


@pytest.mark.parametrize(
    "change",
    [
        {"max_abs": 0},
        {"max_abs": float("nan")},
        {"max_abs": float("inf")},
        {"max_abs": 2**31},
        {"s": -1},
        {"s": 33},
        {"num_values": -1},
        {"kind": GroupKind.COUNT},
    ],
)
def test_groups_that_cannot_be_are_refused(change):
    with pytest.raises(ConfigError, match=r"arithmetic\.train"):
        group(**change)


def test_groups_are_documents():
    assert group(max_abs=8) == group(max_abs=8.0)
    read = documents.decode(documents.encode(GROUPS), tuple[ColumnGroup, ...], "groups")
    assert read == GROUPS
    assert documents.encode(read) == documents.encode(GROUPS)
    assert GROUPS[0].max_q == 2**35  # asked for, and still no part of the document
    assert documents.encode(read) == documents.encode(GROUPS)


def test_values_are_checked_by_one_function_at_both_ends():
    check_values(group(), np.array([8, -8], np.float32))
    with pytest.raises(ValueOutOfRange, match=r"vector 'train', value 101 is -9.0: must be finite and at most 8 "):
        check_values(group(), np.array([0, -9], np.float32), offset=100)


# --- 128 bits


@given(st.lists(st.integers(-(2**126), 2**126 - 1), min_size=1, max_size=8))
def test_wide_sums_become_float64_rounded_as_said(numbers):
    low = [number & (2**64 - 1) for number in numbers]
    array = np.array([[n >> 64 for n in numbers], [v - 2**64 if v >= 2**63 else v for v in low]], np.int64)
    for number, value in zip(numbers, limbs.as_float64(array), strict=True):
        if abs(number) < 2**85:
            assert value == float(number)
        assert abs(Fraction(float(value)) - number) <= Fraction(abs(number), 2**51)
    largest = max(map(abs, numbers))
    assert limbs.within(array, largest)
    assert largest == 0 or not limbs.within(array, largest - 1)
    doubled = array.copy()
    limbs.add_into(doubled, array)
    assert [(int(h) << 64) + (int(v) & (2**64 - 1)) for h, v in doubled.T] == [2 * number for number in numbers]
