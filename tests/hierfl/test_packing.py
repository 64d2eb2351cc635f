"""Packed sums: exact, found in pieces of any length, and near their entropy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hierfl import kernels, packing
from hierfl.aggregation import Accumulator, ColumnGroup, GroupKind, Weighting
from hierfl.errors import LayoutMismatch, ValueOutOfRange
from hierfl.packing import Blocks, PackedSums, WordReader, columns_of

kernels.warm_up()  # the forms are compared in test_kernels_packing

SIZES = st.sampled_from([0, 1, 15, 16, 17, 1023, 1024, 1025, 3000, 40_000])


def group(name: str, kind: GroupKind, num_values: int) -> ColumnGroup:
    return ColumnGroup(name=name, kind=kind, s=0, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=num_values)


@st.composite
def grouped_sums(draw: st.DrawFn) -> tuple[tuple[ColumnGroup, ...], dict[str, np.ndarray]]:
    """Up to three groups of any kind and size, with sums of any magnitude."""
    kinds = draw(st.lists(st.tuples(st.sampled_from(list(GroupKind)), SIZES), max_size=3))
    groups = tuple(group(f"g{index}", kind, size) for index, (kind, size) in enumerate(kinds))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    sums = {}
    for one in groups:
        values = random.integers(-(2**63), 2**63 - 1, one.shape, endpoint=True) >> draw(st.integers(0, 63))
        values.reshape(-1)[: values.size // 5] = draw(st.sampled_from([0, -1, 2**63 - 1, -(2**63)]))
        sums[one.name] = values
    return groups, sums


def zeros(groups: tuple[ColumnGroup, ...]) -> dict[str, np.ndarray]:
    return {one.name: np.zeros(one.shape, np.int64) for one in groups}


@settings(max_examples=60, deadline=None)
@given(made=grouped_sums(), piece_words=st.sampled_from([1, 1000, 4096, 131_072]))
def test_unpacking_is_the_inverse_of_packing_however_the_words_were_cut(made, piece_words):
    groups, sums = made
    blocks = packing.measure(groups, sums)
    pieces = [piece.copy() for piece in packing.pack(blocks, sums, max(piece_words, 1024))]
    words = np.concatenate([np.empty(0, np.uint64), *pieces])
    assert words.size == blocks.num_words <= packing.max_words(blocks.columns)
    if piece_words == 1 and words.size > 5000:
        piece_words = 999
    again = [words[start : start + piece_words] for start in range(0, words.size, piece_words)]
    for packed in (PackedSums(blocks, pieces), PackedSums(blocks, again)):
        found = zeros(groups)
        packed.add_into(found)
        for name, expected in sums.items():
            assert np.array_equal(found[name], expected)


def test_pieces_are_full_but_the_last():
    groups = (group("a", GroupKind.FIXED, 300_000), group("b", GroupKind.WIDE, 70_001))
    random = np.random.default_rng(3)
    sums = {one.name: random.integers(-(2**40), 2**40, one.shape) for one in groups}
    blocks = packing.measure(groups, sums)
    sizes = [piece.size for piece in packing.pack(blocks, sums, 131_072)]
    assert sizes[:-1] == [131_072] * (len(sizes) - 1)
    assert sum(sizes) == blocks.num_words


def test_a_reader_gives_out_each_block_once_as_soon_as_its_words_are_there():
    groups = (group("a", GroupKind.FIXED, 5000), group("b", GroupKind.FIXED, 100))
    sums = {"a": np.arange(5000) << 20, "b": np.arange(100)}
    blocks = packing.measure(groups, sums)
    (words,) = packing.pack(blocks, sums, 131_072)
    reader, seen, given_out = WordReader(blocks), 0, []
    for word in range(words.size):
        for span in reader.feed(words[word : word + 1]):
            given_out += range(span.first, span.first + span.count)
            seen = word + 1
            assert blocks.start(span.first + span.count) == seen
    assert given_out == list(range(len(blocks.widths)))


def test_a_last_block_has_the_words_that_its_values_reach():
    groups = (group("a", GroupKind.FIXED, 3),)
    blocks = packing.measure(groups, {"a": np.array([0, 2**36 - 1, 5])})
    assert (blocks.widths.tolist(), blocks.num_words) == ([36], 16)
    assert packing.measure(groups, {"a": np.full(3, -9)}).num_words == 0


def test_tables_that_do_not_fit_their_groups_are_refused():
    columns = columns_of([group("a", GroupKind.FIXED, 2000)])
    with pytest.raises(LayoutMismatch, match="3 blocks, their groups 2"):
        Blocks(columns, np.zeros(3, np.int64), np.zeros(3, np.uint8))
    with pytest.raises(ValueOutOfRange, match="65 bits wide"):
        Blocks(columns, np.zeros(2, np.int64), np.array([1, 65], np.uint8))


@settings(max_examples=60, deadline=None)
@given(made=grouped_sums(), least=st.integers(-(2**63), 2**63 - 1), most=st.integers(-(2**63), 2**63 - 1))
def test_blocks_that_are_not_in_doubt_hold_no_value_out_of_bounds(made, least, most):
    groups, sums = made
    blocks = packing.measure(groups, sums)
    for column in blocks.columns:
        values = column.values(sums[column.group.name])
        beyond = blocks.beyond(column, least, most)
        assert beyond.size == column.num_blocks
        for number in np.flatnonzero(~beyond):
            block = values[number * 1024 : number * 1024 + 1024]
            assert least <= int(block.min())
            assert int(block.max()) <= most


def test_bounds_that_hold_every_int64_leave_no_doubt_and_empty_ones_leave_all():
    groups = (group("a", GroupKind.FIXED, 2048),)
    blocks = packing.measure(groups, {"a": np.repeat([-(2**63), 2**63 - 1], 1024)})
    assert blocks.beyond(blocks.columns[0], -(2**63), 2**63 - 1).tolist() == [False, False]
    assert blocks.beyond(blocks.columns[0], 0, -1).tolist() == [True, True]


def test_adding_packed_partials_is_adding_partials():
    groups = (group("a", GroupKind.FIXED, 70_000), group("b", GroupKind.WIDE, 1500))
    random, partials = np.random.default_rng(5), []
    for _ in range(3):
        one = Accumulator(groups)
        one.fold({g.name: [random.integers(-8, 8, g.num_values).astype(np.float32)] for g in groups}, 65_535)
        partials.append(one.partial(1))
    total, packed = Accumulator(groups), Accumulator(groups)
    for partial in partials:
        total.add(partial)
        blocks = packing.measure(groups, partial.sums)
        words = [piece.copy() for piece in packing.pack(blocks, partial.sums, 2000)]
        packed.add_packed(PackedSums(blocks, words), partial.weight, partial.num_updates, partial.metrics)
    assert total.partial(3) == packed.partial(3)
    with pytest.raises(LayoutMismatch):
        Accumulator(groups[:1]).add_packed(PackedSums(blocks, words), 1, 1, {})


@settings(max_examples=40, deadline=None)
@given(weight=st.integers(1, 2**24), kind=st.sampled_from(list(GroupKind)), size=SIZES, s=st.integers(0, 1))
def test_no_sum_within_the_caps_takes_more_than_the_caps_allow(weight, kind, size, s):
    one = ColumnGroup(
        name="a",
        kind=kind,
        s=0 if kind is GroupKind.COUNT else 32 * s,
        max_abs=8.0,
        weighting=Weighting.WEIGHT,
        num_values=size,
    )
    bound = one.max_q * weight
    values = [bound if index % 2 else -bound for index in range(size)]
    sums = np.array([value & (2**64 - 1) for value in values], np.uint64).view(np.int64)
    if kind is GroupKind.WIDE:
        sums = np.stack([np.array([value >> 64 for value in values], np.int64), sums])
    blocks = packing.measure([one], {"a": sums})
    assert 8 * blocks.num_words + 9 * blocks.widths.size <= packing.most_bytes([one], weight)
