"""One attempt at one intake: its accumulator, what is in it, and the freeze that hands it over.

Accumulator, list and incarnation live and die together. An update is in the accumulator exactly when it is
in ``folded``; one whose claim was granted and that is not there yet is in ``folding``, which a freeze waits for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Executor

from combiners.checks import expect_update
from combiners.messages import Claim, HandOver, Opening
from hierfl import observe
from hierfl.aggregation import Accumulator
from hierfl.encodings import Received
from hierfl.plan import Plan
from hierfl.types import ClientRef

__all__ = ["Folding"]

INLINE_VALUES = 16_384
"""A smaller update is folded on the event loop, in less time than a thread, or a span, would cost."""


class Folding:
    """See the module."""

    def __init__(self, opening: Opening, plan: Plan) -> None:
        self.opening, self.plan = opening, plan
        self.expect = expect_update(plan)
        self.opened_s = time.monotonic()
        self.folding: dict[ClientRef, Claim] = {}
        self.folded: dict[ClientRef, Claim] = {}
        self.answered: set[ClientRef] = set()
        """Clients that have their receipt, or have said no: they have nothing to do here until asked again."""
        self.is_closed = False
        self._accumulator: Accumulator | None = None
        """Made by the first fold, in its thread: writing its memory takes as long as a fold."""
        self._is_small = sum(group.num_values for group in plan.task.groups) < INLINE_VALUES
        self._one_at_a_time = asyncio.Lock()
        self._changed = asyncio.Event()
        self._by_client: dict[ClientRef, asyncio.Lock] = {}
        self._hand_over: HandOver | None = None

    @property
    def is_frozen(self) -> bool:
        """Whether what is folded has been handed over: nothing is added until the seal is resumed or over."""
        return self._hand_over is not None

    def _new_accumulator(self) -> Accumulator:
        return Accumulator(self.plan.task.groups, self.plan.task.update_encoding)

    def lock_of(self, client: ClientRef) -> asyncio.Lock:
        """Held while one update of ``client`` is claimed and folded: two sessions of it never race."""
        return self._by_client.setdefault(client, asyncio.Lock())

    async def change(self, timeout_s: float) -> None:
        """Wait until something has changed here, or ``timeout_s`` have passed."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def grant(self, claim: Claim) -> bool:
        """The Region granted ``claim``; whether it comes in time to be folded before a hand-over."""
        if self.is_closed or self.is_frozen:
            return False
        self.folding[claim.key.client] = claim
        return True

    async def fold(
        self,
        claim: Claim,
        chunks: Received,
        metrics: Mapping[str, int],
        pool: Executor,
    ) -> None:
        """Fold a granted update. Whatever happens, it is in ``folding`` no more afterwards."""
        client, key = claim.key.client, claim.key.attempt
        try:
            if self._is_small:
                self._fold(chunks, claim.weight, metrics)
            else:
                async with self._one_at_a_time:
                    with observe.span(observe.SPAN_FOLD, run=key.run, round=key.round, attempt=key.attempt):
                        loop = asyncio.get_running_loop()
                        await loop.run_in_executor(pool, self._fold, chunks, claim.weight, metrics)
            self.folded[client] = claim
        finally:
            self.folding.pop(client, None)
            self._notify()

    def _fold(self, chunks: Received, weight: int, metrics: Mapping[str, int]) -> None:
        if self._accumulator is None:
            self._accumulator = self._new_accumulator()
        self._accumulator.fold(chunks, weight, metrics)

    async def hand_over(self, incarnation: str, seal_id: str) -> HandOver:
        """Finish what is granted and hand over. The same seal gets the same answer again."""
        while self.folding:
            await self._changed.wait()
        if self._hand_over is None or self._hand_over.seal_id != seal_id:
            if self._hand_over is not None:
                self.resume()
            sites = {client.site for client in self.folded}
            self._hand_over = HandOver(
                incarnation=incarnation,
                key=self.opening.key,
                seal_id=seal_id,
                entries=tuple(self.folded.values()),
                partial=self._accumulator.partial(len(sites)) if self._accumulator and self.folded else None,
            )
        return self._hand_over

    def resume(self) -> None:
        """The seal came to nothing: go on from what was handed over."""
        if self._hand_over is not None:
            self._accumulator = None
            if self._hand_over.partial is not None:
                self._accumulator = self._new_accumulator()
                self._accumulator.add(self._hand_over.partial)
            self._hand_over = None
        self._notify()

    def close(self) -> None:
        self.is_closed = True
        self._notify()
