"""What many intakes handed over is added up in pairs, to the same bits and the same accounts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from combiners.merging import MOST_AT_REGION, added, checked_sums, merge_in_pairs
from combiners.messages import Claim, HandOver
from hierfl.aggregation import Accumulator, ColumnGroup, GroupKind, Weighting
from hierfl.errors import RegionUnreachable, ValueOutOfRange
from hierfl.types import AttemptKey, ClientId, ClientRef, RegionId, RunId, SiteId, TaskKind, UpdateKey

KEY = AttemptKey(RunId("run-1"), TaskKind.TRAIN, 1, 1)
GROUPS = (ColumnGroup(name="train", kind=GroupKind.FIXED, s=32, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=5),)


def hand_over(number: int, clients: int) -> HandOver:
    """Of an intake that folded so many updates."""
    accumulator, entries = Accumulator(GROUPS), []
    for client in range(clients):
        ref = ClientRef(RegionId("eu"), SiteId(f"site-{number}-{client // 2}"), ClientId(f"client-{client}"))
        weight = 1 + (number + client) % 7
        values = np.full(5, 0.25 * number - 0.5 * client, np.float32)
        accumulator.fold({"train": [np.clip(values, -8, 8)]}, weight, {"num_examples": weight})
        entries.append(Claim(key=UpdateKey(KEY, ref), digest=f"sha256:{number}", weight=weight, signature=b""))
    return HandOver(
        incarnation=f"1.{number}",
        key=KEY,
        seal_id="1-1",
        entries=tuple(entries),
        partial=accumulator.partial(len({one.key.client.site for one in entries})) if entries else None,
    )


async def add(number: int, pair: Sequence[HandOver]) -> HandOver:
    del number
    await asyncio.sleep(0)
    return added(pair)


@given(sizes=st.lists(st.integers(0, 4), max_size=14))
def test_a_tree_has_the_claims_and_the_bits_of_one_sum(sizes):
    handed = [hand_over(number, clients) for number, clients in enumerate(sizes)]
    few = asyncio.run(merge_in_pairs(handed, add))
    assert len(few) <= MOST_AT_REGION
    assert sorted(str(one.key) for part in few for one in part.entries) == sorted(
        str(one.key) for part in handed for one in part.entries
    )
    if any(sizes):
        once, tree = added(handed).partial, added(few).partial
        assert once is not None
        assert tree is not None
        assert np.array_equal(once.sums["train"], tree.sums["train"])
        assert (once.weight, once.num_sites, once.num_updates) == (tree.weight, tree.num_sites, tree.num_updates)
        assert once.metrics == tree.metrics


async def test_where_nobody_adds_the_region_gets_all_and_nothing_is_lost():
    handed = [hand_over(number, 2) for number in range(7)]

    async def gone(number: int, pair: Sequence[HandOver]) -> HandOver:
        raise RegionUnreachable("it died")

    assert await merge_in_pairs(handed, gone) == handed


async def test_a_pair_whose_intake_died_is_added_in_the_next_turn():
    handed = [hand_over(number, 1) for number in range(12)]
    calls = 0

    async def first_dies(number: int, pair: Sequence[HandOver]) -> HandOver:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RegionUnreachable("it died")
        return added(pair)

    few = await merge_in_pairs(handed, first_dies)
    assert len(few) <= MOST_AT_REGION
    assert len([entry for one in few for entry in one.entries]) == 12


def test_sums_that_are_not_of_their_claims_are_refused_before_they_are_added():
    right, wrong = hand_over(1, 2), replace(hand_over(2, 2), entries=hand_over(2, 1).entries)
    assert checked_sums(right) is right.partial
    with pytest.raises(ValueOutOfRange, match=r"1\.2 handed over"):
        added([right, wrong])
