"""A partial packed piece by piece is, byte for byte, the one that is packed whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hierfl.columns import ColumnGroup, GroupKind, Weighting
from hierfl.errors import LayoutMismatch, ValueOutOfRange
from hierfl.wire.packed import outgoing_blocks, outgoing_partial
from hierfl.wire.piecewise import PackedPartial, Packer, pieces

LAYOUT = 64 * "a"


def groups_of(num_values: int) -> tuple[ColumnGroup, ...]:
    def group(name: str, count: int, kind: GroupKind = GroupKind.FIXED) -> ColumnGroup:
        return ColumnGroup(name=name, kind=kind, s=16, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=count)

    return group("train", num_values), group("empty", 0), group("wide", 3000, GroupKind.WIDE), group("mean", 5)


def sums_of(groups: tuple[ColumnGroup, ...], seed: int, most: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sums = {group.name: rng.integers(-most, most, group.shape) for group in groups}
    sums["wide"][0] = np.where(sums["wide"][1] < 0, -1, 0)  # small numbers in 128 bits
    return sums


@settings(deadline=None, max_examples=30)
@given(num_values=st.integers(0, 400_000), step=st.integers(1, 300_000), bits=st.integers(1, 20), seed=st.integers(0))
def test_pieces_pack_to_the_bytes_of_the_whole(num_values, step, bits, seed):
    groups = groups_of(num_values)
    sums = sums_of(groups, seed, 2**bits)
    packer = Packer(groups)
    for group, start, stop in pieces(groups, step):
        packer.add(group, sums[group.name][..., start:stop])
    partial = PackedPartial(groups, packer.finish(), 1000, 2, 2, {})
    partial.check_bounds(1000)
    whole = outgoing_partial(LAYOUT, groups, sums, b"{}")
    made = outgoing_blocks(LAYOUT, partial.packed.blocks, partial.take_words, b"{}")
    assert made.digest == whole.digest
    assert list(made.frames()) == list(whole.frames())


def test_sums_beyond_their_weight_and_a_weight_beyond_its_share_are_refused():
    groups = groups_of(5000)
    packer = Packer(groups)
    for group, start, stop in pieces(groups, 2048):
        packer.add(group, sums_of(groups, 1, 2**40)[group.name][..., start:stop])
    partial = PackedPartial(groups, packer.finish(), 4, 2, 2, {})
    with pytest.raises(ValueOutOfRange, match="'train' has a sum above"):
        partial.check_bounds(4)
    with pytest.raises(ValueOutOfRange, match="above its share"):
        partial.check_bounds(3)


def test_pieces_that_are_missing_are_noticed():
    groups = groups_of(5000)
    packer = Packer(groups)
    packer.add(groups[0], np.zeros(1024, np.int64))
    with pytest.raises(LayoutMismatch):
        packer.finish()
