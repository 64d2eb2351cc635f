"""A whole combiner in one event loop, without Ray: for tests, and for reading how the parts meet.

The same hosts, real gRPC and certificates, the real store; only that Region and Intakes call each other
directly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

from combiners.host import RegionHost
from combiners.intake import IntakeHost
from combiners.settings import IntakeSettings, RegionSettings
from combiners.shard import Shard, Share
from hierfl.errors import HierFLError, Unreachable
from hierfl.pki import Kit
from hierfl.types import AttemptKey, Int64Array

__all__ = ["LocalCombiner", "LocalShard"]

T = TypeVar("T")

DRAIN_S = 5.0


class LocalShard:
    """``ShardPort`` of a shard in this process."""

    def __init__(self) -> None:
        self.shard = Shard()
        self._ended: Future[None] = Future()

    def open(self, key: AttemptKey, share: Share) -> Future[None]:
        return self._call(lambda: self.shard.open(key, share))

    def put(self, key: AttemptKey, upload: int, vector: str, offset: int, values: np.ndarray) -> Future[None]:
        return self._call(lambda: self.shard.put(key, upload, vector, offset, values))

    def check(self, key: AttemptKey, upload: int, sizes: Mapping[str, int]) -> Future[None]:
        return self._call(lambda: self.shard.check(key, upload, sizes))

    def commit(self, key: AttemptKey, upload: int, weight: int) -> Future[None]:
        return self._call(lambda: self.shard.commit(key, upload, weight))

    def drop(self, key: AttemptKey, upload: int) -> Future[None]:
        return self._call(lambda: self.shard.drop(key, upload))

    def freeze(self, key: AttemptKey, seal_id: str) -> Future[tuple[int, int]]:
        return self._call(lambda: self.shard.freeze(key, seal_id))

    def block(self, key: AttemptKey, seal_id: str, group: str, start: int, stop: int) -> Future[Int64Array]:
        return self._call(lambda: self.shard.block(key, seal_id, group, start, stop))

    def close(self, key: AttemptKey) -> Future[None]:
        return self._call(lambda: self.shard.close(key))

    def ended(self) -> Future[None]:
        return self._ended

    def end(self) -> None:
        if not self._ended.done():
            self._ended.set_exception(Unreachable("the shard has ended"))

    def _call(self, call: Callable[[], T]) -> Future[T]:
        answer: Future[T] = Future()
        try:
            if self._ended.done():
                raise Unreachable("the shard has ended")
            answer.set_result(call())
        except HierFLError as error:
            answer.set_exception(error)
        return answer


class LocalCombiner:
    """Async context manager; ``addresses`` are the intakes', in order.

    Leaving it drains; ``kill`` leaves as a crash would, but for what the operating system frees.
    """

    def __init__(
        self,
        kit: Kit,
        directory: Path,
        controllers: str | tuple[str, ...],
        *,
        intakes: int = 1,
        listen: str = "127.0.0.1:0",
        region: RegionSettings | None = None,
        intake: IntakeSettings | None = None,
    ) -> None:
        self._kit, self._directory = kit, directory
        self._controllers = (controllers,) if isinstance(controllers, str) else controllers
        self._num_intakes, self._listen = intakes, listen
        self._region_settings = region or RegionSettings()
        self._intake_settings = intake or IntakeSettings()
        self.intakes: list[IntakeHost] = []
        self.shards: list[LocalShard] = []
        """All that were ever made."""
        self._is_dead = False

    @property
    def addresses(self) -> tuple[str, ...]:
        """``host:port`` of each intake."""
        return tuple(intake.address for intake in self.intakes)

    async def __aenter__(self) -> LocalCombiner:
        self.region = RegionHost(self._kit, self._directory, self._controllers, self._region_settings)
        self.region.start()
        try:
            for _ in range(self._num_intakes):
                await self.add_intake()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_dead:
            return
        for intake in self.intakes:
            await intake.stop_admitting()
        await self.region.drain(DRAIN_S)
        await self._end()

    async def kill(self) -> None:
        """Stop without draining: nothing is sealed, nobody is told."""
        self._is_dead = True
        await self._end()

    async def restart_intake(self, number: int) -> None:
        """Stop one intake as a crash would, and start it again on its port."""
        dead = self.intakes[number]
        await dead.stop(grace_s=0)
        self.intakes[number] = await self._make_intake(dead.desk.name, dead.address)

    async def add_intake(self) -> IntakeHost:
        """One intake more; clients learn of it by the endpoint list."""
        self.intakes.append(await self._make_intake(f"intake-{len(self.intakes)}", self._listen))
        return self.intakes[-1]

    async def kill_intake(self, number: int) -> None:
        """Stop one intake as a crash would: it does not say so, and the Region finds it silent."""
        await self.intakes[number].stop(grace_s=0)

    async def _make_intake(self, name: str, listen: str) -> IntakeHost:
        intake = IntakeHost(name, self._kit, self.region, self._intake_settings, self._make_shard)
        await intake.start(listen)
        return intake

    def _make_shard(self) -> LocalShard:
        self.shards.append(LocalShard())
        return self.shards[-1]

    async def _end(self) -> None:
        await asyncio.gather(*(intake.stop(grace_s=0) for intake in self.intakes))
        await self.region.stop()
