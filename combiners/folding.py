"""One attempt at one intake: its sums, what is in them, and the freeze that hands them over.

Sums, list and incarnation live and die together. An update is in the sums exactly when it is
in ``folded``; one whose claim was granted and that is not there yet is in ``folding``, which a freeze waits for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from combiners.messages import Claim, HandOver, Opening
from combiners.sums import Sums
from hierfl import observe
from hierfl.plan import Plan
from hierfl.types import ClientRef
from hierfl.wire.transfer import Incoming

__all__ = ["Folding"]


class Folding:
    """See the module."""

    def __init__(self, opening: Opening, plan: Plan, sums: Sums) -> None:
        self.opening, self.plan, self.sums = opening, plan, sums
        self.opened_s = time.monotonic()
        self.folding: dict[ClientRef, Claim] = {}
        self.folded: dict[ClientRef, Claim] = {}
        self.answered: set[ClientRef] = set()
        """Clients that have their receipt, or have said no: they have nothing to do here until asked again."""
        self.is_closed = False
        self._one_at_a_time, self._one_hand_over = asyncio.Lock(), asyncio.Lock()
        self._changed = asyncio.Event()
        self._by_client: dict[ClientRef, asyncio.Lock] = {}
        self._hand_over: HandOver | None = None

    @property
    def is_frozen(self) -> bool:
        """Whether what is folded has been handed over: nothing is added until the seal is resumed or over."""
        return self._hand_over is not None

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

    async def fold(self, claim: Claim, incoming: Incoming, metrics: Mapping[str, int]) -> None:
        """Fold a granted update. Whatever happens, it is in ``folding`` no more afterwards."""
        client, key = claim.key.client, claim.key.attempt
        try:
            if self.sums.is_instant:
                await self.sums.fold(incoming, claim.weight, metrics)
            else:
                async with self._one_at_a_time:
                    with observe.span(observe.SPAN_FOLD, run=key.run, round=key.round, attempt=key.attempt):
                        await self.sums.fold(incoming, claim.weight, metrics)
            self.folded[client] = claim
        finally:
            self.folding.pop(client, None)
            self._notify()

    async def hand_over(self, incarnation: str, seal_id: str) -> HandOver:
        """Finish what is granted and hand over. The same seal gets the same answer again."""
        async with self._one_hand_over:
            while self.folding:
                await self._changed.wait()
            if self._hand_over is None or self._hand_over.seal_id != seal_id:
                if self._hand_over is not None:
                    self.resume()
                entries = tuple(self.folded.values())
                listed = HandOver(incarnation=incarnation, key=self.opening.key, seal_id=seal_id, entries=entries)
                self._hand_over = listed  # from here on nothing is granted
                self._hand_over = await self.sums.hand_over(listed)
            return self._hand_over

    def resume(self) -> None:
        """The seal came to nothing: go on from what was handed over."""
        if self._hand_over is not None:
            self.sums.resume(self._hand_over)
            self._hand_over = None
        self._notify()

    def close(self) -> None:
        self.is_closed = True
        self.sums.close()
        self._notify()
