"""Models at the Region: fetched from the controller once per hash, checked, and kept for the intakes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from combiners.messages import Model
from hierfl import observe
from hierfl.types import ModelHash
from hierfl.wire.transfer import Expect, Incoming, Outgoing

__all__ = ["MAX_MODEL_BYTES", "ModelShelf"]

MODELS_KEPT = 3
"""The bases of open rounds and the model that was committed last."""
MAX_MODEL_BYTES = 2**40
"""Bound on a model whose size no plan has said, from the controller that this region's kit vouches for."""


class ModelShelf:
    """The last few models in memory, as frames ready to be sent."""

    def __init__(self, fetch: Callable[[ModelHash, Expect], Awaitable[Incoming]], region: str) -> None:
        self._fetch, self._region = fetch, region
        self._models: dict[ModelHash, asyncio.Task[Model]] = {}

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
        for old in list(self._models)[:-MODELS_KEPT]:
            del self._models[old]
        return await asyncio.shield(task)

    async def find(self, model_hash: ModelHash) -> Model | None:
        """The model if it is here or on its way: intakes ask for those of offers that the Region made."""
        task = self._models.get(model_hash)
        return None if task is None else await asyncio.shield(task)

    async def _load(self, model_hash: ModelHash, expect: Expect) -> Model:
        with observe.span(observe.SPAN_MODEL_FETCH, region=self._region) as span:
            incoming = await self._fetch(model_hash, expect)
            span.set(bytes=incoming.descriptor.length_bytes)
        return Model(model_hash=model_hash, frames=tuple(Outgoing.of(incoming).frames()))
