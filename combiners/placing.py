"""Where the sums of an intake's attempts are, and how much may be in flight beside them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import replace

from combiners.budget import Need, machine_bytes, need_of, shards_needed, share, staging_bytes
from combiners.shard import ShardPort
from combiners.sharding import ShardedSums, Shards
from combiners.sums import OwnSums, Sums
from hierfl import encodings
from hierfl.encodings.ranges import Division
from hierfl.plan import Plan

__all__ = ["MakeShard", "Placing"]

logger = logging.getLogger(__name__)

MakeShard = Callable[[], ShardPort]


class Placing:
    """One intake's; its shards are those of the incarnation."""

    def __init__(
        self,
        pool: Executor,
        make_shard: MakeShard | None,
        on_lost: Callable[[], None],
        *,
        memory_bytes: int,
        actors: int,
        shards: int | None,
    ) -> None:
        """
        Args:
            pool: Where large updates are checked and folded.
            make_shard: Makes a shard; ``None`` where there are none to be had.
            on_lost: Called once a shard has failed, and with it the incarnation.
            memory_bytes, actors, shards: As in ``IntakeSettings``.
        """
        self._pool, self._make_shard, self._on_lost = pool, make_shard, on_lost
        self._is_given = bool(memory_bytes)
        self.memory_bytes = memory_bytes or share(machine_bytes(), actors)
        self._num_shards = shards
        self._shards: Shards | None = None

    def shards_of(self, plan: Plan) -> int:
        """How many processes share the sums of this plan's updates; 0: the intake has them itself."""
        if self._make_shard is None or not Division.can_divide(plan.task.update_encoding):
            return 0
        if self._num_shards is not None:
            return self._num_shards
        return shards_needed(self.memory_bytes, _need(plan))

    def place(self, plan: Plan) -> Sums:
        """Sums for an attempt that opens."""
        count = self.shards_of(plan)
        if not count:
            self._warn(plan)
            return OwnSums(plan, self._pool)
        if self._shards is None:
            assert self._make_shard is not None, "else there are none"
            self._shards = Shards(self._make_shard, self._on_lost)
        return ShardedSums(plan, self._shards, count)

    def _warn(self, plan: Plan) -> None:
        if shards_needed(self.memory_bytes, _need(plan)):
            logger.warning(
                "%s: its sums, and one update, are more than the %d MiB that this intake may use; --memory, --shards",
                plan.key,
                self.memory_bytes // 2**20,
            )

    def staging_bytes(self, plans: Iterable[Plan]) -> int:
        """Bytes of updates that may be in flight beside these open attempts."""
        needs = [replace(_need(plan), shards=self.shards_of(plan)) for plan in plans]
        return staging_bytes(self.memory_bytes, needs, is_given=self._is_given)

    def void(self) -> None:
        """The incarnation is over, and so are its shards."""
        if self._shards is not None:
            self._shards.end()
            self._shards = None


def _need(plan: Plan) -> Need:
    return need_of(plan.task.groups, encodings.length_bytes(plan.task.update_encoding, plan.task.groups))
