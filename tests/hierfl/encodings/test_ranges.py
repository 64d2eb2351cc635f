"""Updates cut into ranges: what their owners fold is, side by side, what one would fold, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import CHOICES, chosen, group, values

from hierfl import encodings
from hierfl.aggregation import Accumulator
from hierfl.columns import GroupKind
from hierfl.encodings.ranges import Division
from hierfl.errors import ValueOutOfRange

every_encoding = pytest.mark.parametrize("choice", CHOICES)


def groups_of(num_values: int) -> tuple:
    few = {"s": 8, "max_abs": 1e6}
    return (
        group(num_values),
        group(7, "mean", **few),
        group(1500, "wide", kind=GroupKind.WIDE, s=16, max_abs=2.0**30),
    )


@every_encoding
@settings(deadline=None, max_examples=25)
@given(
    num_values=st.integers(1, 9000), owners=st.integers(1, 5), chunk=st.integers(1, 5000), seed=st.integers(0, 2**32)
)
def test_owners_fold_side_by_side_what_one_would_fold(choice, num_values, owners, chunk, seed):
    encoding, groups = chosen(choice), groups_of(num_values)
    vectors = {one.name: values(one.num_values, seed + n) for n, one in enumerate(groups)}
    wire = encodings.encode_update(encoding, groups, vectors, seed)
    whole = Accumulator(groups, encoding)
    whole.fold({name: [vector] for name, vector in wire.items()}, 3)

    division = Division(encoding, groups, owners)
    got: list[dict[str, list[np.ndarray]]] = [{name: [] for name in wire} for _ in range(owners)]
    splitter = division.splitter()
    for name, vector in wire.items():
        for start in range(0, vector.size, chunk):
            for part in splitter.split(name, vector[start : start + chunk]):
                assert part.offset == sum(piece.size for piece in got[part.owner][part.vector])
                got[part.owner][part.vector].append(part.values)
    assert splitter.given == [{name: sum(map(len, pieces)) for name, pieces in mine.items()} for mine in got]
    sums: dict[str, list[np.ndarray]] = {one.name: [] for one in groups}
    for owner in range(owners):
        for one in division.groups_of(owner):
            mine = np.zeros(one.shape, np.int64)
            if one.num_values:
                form = encodings.encoding_of(encoding, one)
                form.check(one, got[owner])
                assert form.fold(mine, one, got[owner], one.multiplier(3))
            sums[one.name].append(mine)
    expected = whole.partial(1).sums
    for one in groups:
        assert np.array_equal(np.concatenate(sums[one.name], axis=-1), expected[one.name])


@settings(deadline=None)
@given(num_values=st.integers(0, 200_000), owners=st.integers(1, 9), part=st.tuples(st.integers(0), st.integers(0)))
def test_ranges_are_whole_blocks_and_every_value_has_one_owner(num_values, owners, part):
    encoding, one = chosen("int8"), group(num_values)
    starts = Division(replace(encoding, block=4096), (one,), owners).starts["train"]
    assert starts[0] == 0
    assert starts[-1] == num_values
    assert list(starts) == sorted(starts)
    assert all(start % 4096 == 0 or start == num_values for start in starts)
    start, stop = sorted(min(end, num_values) for end in part)
    found = list(Division(encoding, (one,), owners).pieces("train", start, stop))
    assert sum(last - first for _, first, last in found) == stop - start
    assert [owner for owner, _, _ in found] == sorted({owner for owner, _, _ in found})


def test_indices_out_of_order_are_refused_before_anything_is_sent_by_them():
    encoding, one = chosen("topk"), group(5000)
    for indices in ([3, 3], [5000], [10, 9]):
        splitter = Division(encoding, (one,), 2).splitter()
        with pytest.raises(ValueOutOfRange, match="above the one before it"):
            splitter.split("train.index", np.array(indices, np.uint32))
    splitter = Division(encoding, (one,), 2).splitter()
    splitter.split("train.index", np.array([4], np.uint32))
    with pytest.raises(ValueOutOfRange, match="value 1 is 4"):
        splitter.split("train.index", np.array([4], np.uint32))


def test_an_encoding_that_cannot_be_cut_says_so():
    class Whole:
        """Registered by somebody who did not think of shards."""

    assert not Division.can_divide(Whole())  # type: ignore[arg-type]  # stands for one
    assert all(Division.can_divide(chosen(choice)) for choice in CHOICES)
