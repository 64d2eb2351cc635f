"""One controller's time as the leader: the store under its one epoch, and the lease kept up.

It ends for good with the first write that the store refuses for another leader's sake, or does not answer: what became
of that write is known only under a new epoch, which nothing of this tenure can still change.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from controller.rows import AnswerRow, AttemptRow, ModelRow, RegionRow, RoundRow, Row, RunRow
from controller.store import Store
from hierfl.errors import HierFLError, NotTheLeader, StaleEpoch, StorageError, StoreUnreachable
from hierfl.types import AttemptKey, RunId, TaskKind

__all__ = ["Tenure"]

logger = logging.getLogger(__name__)

RENEWALS = 3
"""In the time of one lease."""
RETRY_S = 0.25


class Tenure:
    """See the module. A ``Store``, for the leader of its epoch."""

    def __init__(self, store: Store, *, name: str) -> None:
        """Take the lead; what others are told of it is ``name``. Blocks.

        Raises:
            NotTheLeader: Another controller has it.
            StorageError: As ``Store.lead``.
        """
        self._store, self.store_id, self.lease_s = store, store.store_id, store.lease_s
        self.epoch = store.lead(name=name)
        self.ended: HierFLError | None = None
        """Why it ended."""
        self._over = asyncio.Event()

    async def kept_up(self) -> HierFLError:
        """Renew the lease for as long as that works; returns why the tenure ended."""
        keeping = asyncio.create_task(self._keep_up())
        try:
            await self._over.wait()
        finally:
            keeping.cancel()
        assert self.ended is not None, "it is set with the event"
        return self.ended

    async def _keep_up(self) -> None:
        clock, lease_s = asyncio.get_running_loop().time, self.lease_s
        if lease_s is None:
            return
        held_until = clock() + lease_s
        while self.ended is None:
            await asyncio.sleep(lease_s / RENEWALS)
            began = clock()
            while (error := await self._renew()) is not None:
                if clock() >= held_until or not isinstance(error, StoreUnreachable):
                    self._end(error)
                    return
                logger.warning("the lease is not renewed: %s", error)
                await asyncio.sleep(RETRY_S)
                began = clock()
            held_until = began + lease_s

    async def _renew(self) -> HierFLError | None:
        """One try; None where it worked. A thread waits for it: a store that is frozen stops nothing else here."""
        epoch = self.epoch
        try:
            await asyncio.to_thread(self._store.renew, epoch)
        except StaleEpoch as error:
            return error if epoch == self.epoch else None  # our own next epoch came between
        except StorageError as error:
            return error
        return None

    def _end(self, error: HierFLError) -> None:
        if self.ended is None:
            self.ended = error
            self._over.set()

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """What is asked of the store in here may end the tenure; after its end nothing is asked any more.

        Raises:
            NotTheLeader: It has ended, or ends here because another controller leads.
            StorageError: As the store.
        """
        if self.ended is not None:
            raise NotTheLeader("this controller has stepped down")
        try:
            yield
        except (StaleEpoch, NotTheLeader) as error:
            self._end(error)
            raise NotTheLeader("this controller has been replaced") from error
        except StoreUnreachable as error:
            self._end(error)
            raise

    # -------------------------------------------------------------- Store

    def lead(self, at_least: int = 0, *, name: str = "", under: int | None = None) -> int:
        """The epoch of this tenure, raised above ``at_least`` where it is not."""
        del name, under
        if self.epoch <= at_least:
            with self._ending():
                self.epoch = self._store.lead(at_least, under=self.epoch)
        return self.epoch

    def renew(self, epoch: int) -> None:
        with self._ending():
            self._store.renew(epoch)

    def write(self, epoch: int, *rows: Row) -> None:
        with self._ending():
            self._store.write(epoch, *rows)

    def runs(self) -> list[RunRow]:
        with self._ending():
            return self._store.runs()

    def attempts(self, run: RunId, task: TaskKind, round_number: int) -> list[AttemptRow]:
        with self._ending():
            return self._store.attempts(run, task, round_number)

    def answers(self, key: AttemptKey) -> list[AnswerRow]:
        with self._ending():
            return self._store.answers(key)

    def rounds(self, run: RunId) -> list[RoundRow]:
        with self._ending():
            return self._store.rounds(run)

    def models(self, run: RunId) -> list[ModelRow]:
        with self._ending():
            return self._store.models(run)

    def model(self, run: RunId, version: int) -> ModelRow | None:
        with self._ending():
            return self._store.model(run, version)

    def regions(self) -> list[RegionRow]:
        with self._ending():
            return self._store.regions()

    def close(self) -> None:
        """Nothing: the store outlives a tenure."""
