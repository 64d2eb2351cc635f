"""Fetched models, shared by the clients of a process; and the app's own model, made once a run to compare.

Only what has the hash that a signed plan names is kept, so it does not matter who sent it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np

from hierfl.client.app import App
from hierfl.client.params import call_init, check_app_model
from hierfl.client.work import failing_with
from hierfl.errors import WireError
from hierfl.layout import Layout
from hierfl.plan import Plan
from hierfl.types import Float32Array, ModelHash
from hierfl.wire import transfer
from hierfl.wire.delta import Base, Bases
from hierfl.wire.fetch import Fetched, Fetcher
from hierfl.wire.models import check_model

__all__ = ["FetchedModel", "ModelCache", "OwnModels"]

KEEP_MODELS = 2
"""Of rounds: a slow client may still work on the one before."""
KEEP_RUNS = 16


@dataclass(frozen=True)
class FetchedModel:
    """A model as the run has it: flat float32 vectors, not to be changed."""

    layout: Layout
    vectors: Mapping[str, Float32Array]


class ModelCache:
    """The newest models by their hash. Clients that want the same one at once fetch it once."""

    def __init__(self) -> None:
        self._models: dict[ModelHash, FetchedModel] = {}
        self._locks: dict[ModelHash, asyncio.Lock] = {}
        self._fetchers: WeakValueDictionary[ModelHash, Fetcher] = WeakValueDictionary()

    def fetcher(self, model_hash: ModelHash) -> Fetcher:
        """What has come of a model so far: one for all who want it, for as long as one of them holds it."""
        fetcher = self._fetchers.get(model_hash)
        if fetcher is None:
            fetcher = self._fetchers[model_hash] = Fetcher(keeps_frames=False)
        return fetcher

    def known(self, plan: Plan) -> FetchedModel | None:
        """The model that the plan starts from, if it is here."""
        return self._models.get(plan.base.model_hash)

    def take(self, plan: Plan, frames: Sequence[bytes]) -> None:
        """Keep a small model that came along with its offer; one that is not the plan's is fetched later.

        It is checked on the event loop, in less time than a thread would cost.
        """
        wanted = plan.base.model_hash
        if not frames or wanted in self._models:
            return
        incoming = transfer.Incoming(_expected(plan), keeps_frames=False)
        with suppress(WireError):
            for frame in frames:
                incoming.feed(frame)
            incoming.close()
            if incoming.digest != plan.base.digest:
                check_model(incoming, wanted)
            self._models[wanted] = _taken(Fetched(incoming))
            self._locks.setdefault(wanted, asyncio.Lock())
        self._forget_oldest(KEEP_MODELS)

    async def get(self, plan: Plan, fetch: Callable[[str, transfer.Expect, Bases], Awaitable[Fetched]]) -> FetchedModel:
        """The model that the plan starts from; whole, or as a difference to one that is here.

        Raises:
            HierFLError: It could not be fetched, or is another.
        """
        wanted = plan.base.model_hash
        async with self._locks.setdefault(wanted, asyncio.Lock()):
            if wanted not in self._models:
                self._forget_oldest(KEEP_MODELS - 1)
                fetched = await fetch(wanted, _expected(plan), self._bases(plan.base.layout_hash))
                self._models[wanted] = await asyncio.to_thread(_taken, fetched)
            model = self._models[wanted] = self._models.pop(wanted)  # the newest last
        self._forget_oldest(KEEP_MODELS)
        return model

    def _bases(self, layout_hash: str) -> dict[ModelHash, Base]:
        """The models that are here, the newest first."""
        newest_first = reversed(self._models.items())
        return {held: _base(model) for held, model in newest_first if model.layout.hash == layout_hash}

    def _forget_oldest(self, keep: int) -> None:
        for old in list(self._models)[:-keep]:
            del self._models[old]
            if not self._locks[old].locked():
                del self._locks[old]


def _expected(plan: Plan) -> transfer.Expect:
    base = plan.base
    return transfer.Expect("model", base.layout_hash, None, base.size_bytes, vouched=base.digest)


def _base(model: FetchedModel) -> Base:
    return Base(model.layout, lambda: {name: [vector] for name, vector in model.vectors.items()})


def _taken(fetched: Fetched) -> FetchedModel:
    vectors = fetched.vectors()
    for vector in vectors.values():
        vector.flags.writeable = False
    return FetchedModel(fetched.layout, vectors)


class OwnModels:
    """The app's ``init``, called once a run and compared with its layout; keeps the local tensors it gave."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], Mapping[str, np.ndarray]] = {}

    def local_of(self, app: App, plan: Plan, layout: Layout) -> Mapping[str, np.ndarray]:
        """A run's local tensors before its first round; on a thread where user code may run.

        Raises:
            TaskFailed: The app's model is not the run's.
        """
        key = (plan.run, plan.base.layout_hash)
        if key not in self._first:
            with failing_with("layout_mismatch"):
                made = call_init(app, plan.task.config, plan.seed)
                self._first[key] = check_app_model(layout, made)
            for old in list(self._first)[:-KEEP_RUNS]:
                del self._first[old]
        return self._first[key]
