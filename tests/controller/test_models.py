"""Models as they are sent: a difference where the caller has a model that little has changed from, else whole."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from controller.blobs import Blobs
from controller.models import ModelCache
from hierfl.errors import NotFound
from hierfl.layout import Layout
from hierfl.wire.delta import DELTA
from hierfl.wire.fetch import MAX_BASES

LAYOUT = Layout.of({"w": np.zeros(4000, np.float32)})


@pytest.fixture
def blobs(tmp_path) -> Blobs:
    return Blobs(tmp_path / "blobs")


def put(blobs: Blobs, changed: int = 0, layout: Layout = LAYOUT) -> str:
    vector = np.ones(4000, np.float32)
    vector[:changed] += 1
    return blobs.put_model(layout, {"train": vector})


async def encoding(models: ModelCache, name: str, *bases: str) -> str:
    return (await models.get(name, bases)).descriptor.encoding


async def test_a_difference_goes_to_who_has_a_model_that_little_changed_from(blobs):
    models, base, near, far = ModelCache(blobs), put(blobs), put(blobs, 1000), put(blobs, 1001)
    assert await encoding(models, near, base) == DELTA
    assert await encoding(models, far, base) == "float32", "more than a quarter has changed"
    assert await encoding(models, far, base, near) == DELTA, "but not from this one"
    assert await encoding(models, near) == "float32"


async def test_a_base_that_is_unknown_pruned_or_of_another_layout_is_no_base(blobs, tmp_path):
    other = put(blobs, layout=Layout.of({"v": np.zeros(4000, np.float32)}))
    base, name = put(blobs), put(blobs, 10)
    for bad in ("f" * 64, "", "../layouts", "é", other):
        assert await encoding(ModelCache(blobs), name, bad) == "float32"
    (tmp_path / "blobs" / "models" / base).unlink()
    assert await encoding(ModelCache(blobs), name, base) == "float32"
    with pytest.raises(NotFound):
        await ModelCache(blobs).get("f" * 64, [name])


async def test_only_the_first_few_bases_are_looked_at(blobs):
    base, name = put(blobs), put(blobs, 10)
    assert await encoding(ModelCache(blobs), name, *["f" * 64] * (MAX_BASES - 1), base) == DELTA
    assert await encoding(ModelCache(blobs), name, *["f" * 64] * MAX_BASES, base) == "float32"


async def test_a_difference_is_made_once_however_many_ask_for_it(blobs):
    models, base, name = ModelCache(blobs), put(blobs), put(blobs, 10)
    found = await asyncio.gather(*(models.get(name, [base]) for _ in range(20)))
    assert len({id(outgoing) for outgoing in found}) == 1
    assert await models.get(name, [base]) is found[0]
