"""Models at the Region: fetched from the controller once per hash, checked, and kept for the intakes.

A model that comes as a difference to one that is here is kept whole and as that difference, which goes on to clients
as it came: it is made once, at the controller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence

from combiners.messages import Model
from hierfl import observe
from hierfl.types import ModelHash
from hierfl.wire.delta import Base, Bases
from hierfl.wire.fetch import Fetched
from hierfl.wire.transfer import Expect, Frame, Outgoing

__all__ = ["MAX_MODEL_BYTES", "Fetch", "ModelShelf", "Share", "in_own_memory"]

MODELS_KEPT = 2
"""The newest, and the one before it, which it may come as a difference to; and what open attempts need."""
MAX_MODEL_BYTES = 2**40
"""Bound on a model whose size no plan has said, from the controller that this region's kit vouches for."""

Fetch = Callable[[ModelHash, Expect, Bases], Awaitable[Fetched]]
Share = Callable[[Sequence[bytes]], Awaitable[Sequence[Frame]]]


async def in_own_memory(frames: Sequence[bytes]) -> Sequence[Frame]:
    """For intakes in the same process."""
    return frames


class ModelShelf:
    """The last few models, as frames ready to be sent."""

    def __init__(
        self,
        fetch: Fetch,
        region: str,
        needed: Callable[[], Collection[ModelHash]] = tuple,
        share: Share = in_own_memory,
    ) -> None:
        """
        Args:
            needed: Models that open attempts need, which are kept.
            share: Moves frames to where the intakes can read them too.
        """
        self._fetch, self._region, self._needed, self._share = fetch, region, needed, share
        self._models: dict[ModelHash, asyncio.Task[Model]] = {}
        self._bases: dict[ModelHash, Base] = {}
        """Of the models that are here, the oldest first."""

    def known(self, model_hash: ModelHash) -> bool:
        """Whether the model is here, or on its way."""
        return model_hash in self._models

    async def get(
        self, model_hash: ModelHash, layout_hash: str, max_bytes: int = MAX_MODEL_BYTES, digest: str = ""
    ) -> Model:
        """The model, fetched if need be; several who want it at once share one fetch.

        ``digest``: of its transfer, where a plan or a record that was verified says it.

        Raises:
            HierFLError: The controller refuses, or what came is another model or layout.
        """
        task = self._models.pop(model_hash, None)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            expect = Expect("model", layout_hash, None, max_bytes, vouched=digest)
            task = asyncio.create_task(self._load(model_hash, expect))
        self._models[model_hash] = task  # the newest last
        self._let_go()
        return await asyncio.shield(task)

    def _let_go(self) -> None:
        needed = self._needed()
        for old in list(self._models)[:-MODELS_KEPT]:
            if old not in needed:
                del self._models[old]
                self._bases.pop(old, None)

    async def find(self, model_hash: ModelHash) -> Model | None:
        """The model if it is here or on its way: intakes ask for those of offers that the Region made."""
        task = self._models.get(model_hash)
        return None if task is None else await asyncio.shield(task)

    async def _load(self, model_hash: ModelHash, expect: Expect) -> Model:
        newest_first = reversed(self._bases.items())
        bases = {held: base for held, base in newest_first if base.layout.hash == expect.layout_hash}
        with observe.span(observe.SPAN_MODEL_FETCH, region=self._region) as span:
            fetched = await self._fetch(model_hash, expect, bases)
            span.set(bytes=fetched.incoming.descriptor.length_bytes)
        whole = await self._share(await asyncio.to_thread(tuple, fetched.frames()))
        deltas = {}
        if fetched.base:
            deltas[ModelHash(fetched.base)] = await self._share(tuple(Outgoing.of(fetched.incoming).frames()))
        if model_hash in self._models:
            self._bases[model_hash] = await asyncio.to_thread(Base.of, whole)
        return Model(model_hash=model_hash, frames=whole, deltas=deltas)
