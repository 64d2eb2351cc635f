"""A shard as a Ray actor, and the port to it. It is its intake's: Ray ends it when the intake's process ends.

Pieces travel as arguments of calls, which Ray puts into its object store beside its pickle; the shard copies them out,
so that the store holds what is on its way and no more. A shard is never restarted: its sums would not come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from combiners.shard import Shard, ShardPort, Share
from hierfl import buffers, kernels_encodings
from hierfl.errors import HierFLError, Unreachable
from hierfl.types import AttemptKey, Int64Array

__all__ = ["ShardActor", "make_shard"]


class ShardActor:
    """``Shard`` in a process of its own. One thread: a call runs to its end, but ``ended``."""

    def __init__(self) -> None:
        buffers.keep_freed_memory()
        kernels_encodings.warm_up()
        self._shard = Shard()

    async def open(self, key: AttemptKey, share: Share) -> None:
        self._shard.open(key, share)

    async def put(self, key: AttemptKey, upload: int, vector: str, offset: int, values: np.ndarray) -> None:
        self._shard.put(key, upload, vector, offset, values)

    async def check(self, key: AttemptKey, upload: int, sizes: Mapping[str, int]) -> None:
        self._shard.check(key, upload, sizes)

    async def commit(self, key: AttemptKey, upload: int, weight: int) -> None:
        self._shard.commit(key, upload, weight)

    async def drop(self, key: AttemptKey, upload: int) -> None:
        self._shard.drop(key, upload)

    async def freeze(self, key: AttemptKey, seal_id: str) -> tuple[int, int]:
        return self._shard.freeze(key, seal_id)

    async def block(self, key: AttemptKey, seal_id: str, group: str, start: int, stop: int) -> Int64Array:
        return self._shard.block(key, seal_id, group, start, stop)

    async def close(self, key: AttemptKey) -> None:
        self._shard.close(key)

    async def ended(self) -> None:
        await asyncio.Event().wait()


class _ShardOverRay:
    """``ShardPort`` of a shard actor; the Region gets it with a hand-over."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def open(self, key: AttemptKey, share: Share) -> Future[None]:
        return _answer(self._handle.open.remote(key, share))

    def put(self, key: AttemptKey, upload: int, vector: str, offset: int, values: np.ndarray) -> Future[None]:
        return _answer(self._handle.put.remote(key, upload, vector, offset, values))

    def check(self, key: AttemptKey, upload: int, sizes: Mapping[str, int]) -> Future[None]:
        return _answer(self._handle.check.remote(key, upload, dict(sizes)))

    def commit(self, key: AttemptKey, upload: int, weight: int) -> Future[None]:
        return _answer(self._handle.commit.remote(key, upload, weight))

    def drop(self, key: AttemptKey, upload: int) -> Future[None]:
        return _answer(self._handle.drop.remote(key, upload))

    def freeze(self, key: AttemptKey, seal_id: str) -> Future[tuple[int, int]]:
        return _answer(self._handle.freeze.remote(key, seal_id))

    def block(self, key: AttemptKey, seal_id: str, group: str, start: int, stop: int) -> Future[Int64Array]:
        return _answer(self._handle.block.remote(key, seal_id, group, start, stop))

    def close(self, key: AttemptKey) -> Future[None]:
        return _answer(self._handle.close.remote(key))

    def ended(self) -> Future[None]:
        return _answer(self._handle.ended.remote())

    def end(self) -> None:
        ray.kill(self._handle)


def make_shard() -> ShardPort:
    """A new shard, on whichever machine of the cluster has the fewest: each has memory of its own."""
    actor = ray.remote(ShardActor).options(num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")
    return _ShardOverRay(actor.remote())


def _answer(reference: Any) -> Future[Any]:
    """What a shard answers, its errors as they were raised; one that is gone, or that Ray fails, is unreachable."""
    answer: Future[Any] = Future()

    def take(found: Future[Any]) -> None:
        error = found.exception()
        if error is None:
            answer.set_result(found.result())
        else:
            answer.set_exception(_translated(error))

    reference.future().add_done_callback(take)
    return answer


def _translated(error: BaseException) -> HierFLError:
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    if isinstance(cause, HierFLError):
        return cause
    what = "is gone" if isinstance(error, RayActorError) else f"failed: {error}"
    return Unreachable(f"a shard {what}")
