"""Models as they are sent: whole, from their files, or as a difference to one that the caller has.

A difference is made once for each pair of models, whoever asks for it: where little has changed, it is a small part of
the model; where more has, that is seen early and the model goes whole. Nothing has to be chosen for that.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from itertools import islice
from typing import Generic, TypeVar

from controller.blobs import Blobs
from hierfl.types import ModelHash
from hierfl.wire.delta import outgoing_delta
from hierfl.wire.fetch import MAX_BASES
from hierfl.wire.transfer import Outgoing

__all__ = ["ModelCache"]

MODELS_KEPT = 8
"""Of mapped files, which are no memory of ours."""
DIFFERENCES_KEPT = 4
"""In memory, each 0.3 of a model at most; of pairs without one nothing but that."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Kept(Generic[K, V]):
    """The last few results of what takes long; two that ask for one at once share it."""

    def __init__(self, make: Callable[[K], V], most: int) -> None:
        self._make, self._most = make, most
        self._kept: OrderedDict[K, asyncio.Task[V]] = OrderedDict()

    async def get(self, key: K) -> V:
        """What ``make`` returns, or raises, in a thread; an error is not kept."""
        task = self._kept.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._kept[key] = asyncio.create_task(asyncio.to_thread(self._make, key))
        self._kept.move_to_end(key)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return await asyncio.shield(task)  # one caller who leaves does not end it for the others


class ModelCache:
    """See the module."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._whole: _Kept[ModelHash, Outgoing] = _Kept(blobs.model_transfer, MODELS_KEPT)
        self._differences: _Kept[tuple[ModelHash, ModelHash], Outgoing | None] = _Kept(
            lambda pair: self._difference(*pair), DIFFERENCES_KEPT
        )

    async def get(self, name: str, bases: Iterable[str] = ()) -> Outgoing:
        """A model by its hash, to be sent to somebody who has ``bases``.

        Raises:
            NotFound, StoreDamaged: As ``Blobs.model``.
        """
        model = ModelHash(name)
        whole = await self._whole.get(model)
        for base in map(ModelHash, islice(bases, MAX_BASES)):
            if self._blobs.has_model(base):
                difference = await self._differences.get((base, model))
                if difference is not None:
                    return difference
        return whole

    def _difference(self, base: ModelHash, name: ModelHash) -> Outgoing | None:
        (before_layout, before), (layout, after) = self._blobs.model(base), self._blobs.model(name)
        return outgoing_delta(layout, base, before, after) if before_layout.hash == layout.hash else None
