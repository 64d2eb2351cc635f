"""The running sum of an attempt: exactly the partials that are counted in the end, whatever was added before."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from controller.rows import AnswerRow
from controller.summing import RunningSum
from hierfl import packing
from hierfl.aggregation import ColumnGroup, GroupKind, Weighting
from hierfl.errors import StoreDamaged
from hierfl.packing import PackedSums
from hierfl.records import PartialHead
from hierfl.types import ModelHash, RegionId, RunId, TaskKind

GROUPS = (
    ColumnGroup(name="t", kind=GroupKind.FIXED, s=0, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=2000),
    ColumnGroup(name="m", kind=GroupKind.WIDE, s=0, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=5),
)
NAMES = ("ap", "eu", "us")


def packed_of(region: str) -> PackedSums:
    value = NAMES.index(region) + 1
    sums = {"t": np.arange(2000) % 8 * value, "m": np.full((2, 5), -value)}
    blocks = packing.measure(GROUPS, sums)
    return PackedSums(blocks, [piece.copy() for piece in packing.pack(blocks, sums, 2000)])


def answer_of(region: str) -> AnswerRow:
    head = PartialHead(
        region=RegionId(region),
        run=RunId("r"),
        base_model_hash=ModelHash("b"),
        task_hash="t",
        groups=GROUPS,
        weight=10,
        num_sites=3,
        num_updates=4,
        metrics={"num_examples": 5},
        region_epoch=1,
        seal_id="s",
    )
    return AnswerRow(
        run=RunId("r"),
        task=TaskKind.TRAIN,
        round=1,
        attempt=1,
        region=RegionId(region),
        received_unix_ns=1,
        digest=region,
        head=head,
        blob=region,
    )


class Shelf:
    """Stored partials, which remembers what was read."""

    def __init__(self) -> None:
        self.read_names: list[str] = []

    def read(self, name: str, groups: tuple[ColumnGroup, ...]) -> PackedSums:
        assert groups == GROUPS
        self.read_names.append(name)
        return packed_of(name)


def expected(*regions: str):
    return RunningSum(GROUPS).total([answer_of(region) for region in regions], Shelf().read)


async def test_what_came_in_memory_is_not_read_again():
    running, shelf = RunningSum(GROUPS), Shelf()
    running.begin(answer_of("eu"), packed_of("eu"))
    running.begin(answer_of("us"), packed_of("us"))
    total = await asyncio.to_thread(running.total, [answer_of("eu"), answer_of("us")], shelf.read)
    assert shelf.read_names == []
    assert total == expected("us", "eu")
    assert (total.weight, total.num_sites, total.num_updates, dict(total.metrics)) == (20, 6, 8, {"num_examples": 10})


async def test_what_came_before_a_restart_is_read_from_its_blob():
    running, shelf = RunningSum(GROUPS), Shelf()
    running.begin(answer_of("eu"), packed_of("eu"))
    total = await asyncio.to_thread(running.total, [answer_of(name) for name in NAMES], shelf.read)
    assert shelf.read_names == ["ap", "us"]
    assert total == expected(*NAMES)


async def test_a_partial_that_is_not_counted_is_not_in_the_sum():
    running, shelf = RunningSum(GROUPS), Shelf()
    for name in NAMES:
        running.begin(answer_of(name), packed_of(name))
    total = await asyncio.to_thread(running.total, [answer_of("ap"), answer_of("us")], shelf.read)
    assert shelf.read_names == ["ap", "us"]
    assert total == expected("ap", "us")


async def test_a_merge_that_is_done_again_has_the_same_sum():
    running, shelf = RunningSum(GROUPS), Shelf()
    running.begin(answer_of("eu"), packed_of("eu"))
    for _ in range(2):
        assert running.total([answer_of("eu")], shelf.read) == expected("eu")
    assert shelf.read_names == ["eu"], "from memory, then from its blob"


async def test_a_blob_that_cannot_be_read_leaves_the_sum_as_new():
    running, shelf = RunningSum(GROUPS), Shelf()
    running.begin(answer_of("eu"), packed_of("eu"))

    def damaged(name: str, groups: tuple[ColumnGroup, ...]) -> PackedSums:
        raise StoreDamaged(name)

    with pytest.raises(StoreDamaged):
        running.total([answer_of("eu"), answer_of("us")], damaged)
    assert running.total([answer_of("eu"), answer_of("us")], shelf.read) == expected("eu", "us")


def test_an_abstention_is_no_partial():
    abstention = AnswerRow(
        run=RunId("r"),
        task=TaskKind.TRAIN,
        round=1,
        attempt=1,
        region=RegionId("eu"),
        received_unix_ns=1,
        code="policy",
    )
    with pytest.raises(StoreDamaged, match="no partial"):
        RunningSum(GROUPS).total([abstention], Shelf().read)
