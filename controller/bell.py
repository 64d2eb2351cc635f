"""What wakes a run's loop, and tells those who follow the run that something is different."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

__all__ = ["Bell"]


class Bell:
    """Rung at every change. One loop sleeps by it; any number of followers each hold an event that it sets."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wake = asyncio.Event()
        self._followers: set[asyncio.Event] = set()

    def ring(self) -> None:
        """Wake the loop and all followers."""
        self._wake.set()
        self.tell()

    def tell(self) -> None:
        """Wake the followers: what the loop did is there to see."""
        for follower in self._followers:
            follower.set()

    def hush(self) -> None:
        """The loop looks now; what rings from here on wakes it again."""
        self._wake.clear()

    async def sleep_until(self, at: float) -> None:
        """Until the next ring, or ``at`` on the clock (infinity: for as long as it takes)."""
        seconds = at - self._clock()
        with suppress(TimeoutError):  # then time alone changed what a decision sees
            async with asyncio.timeout(None if seconds == float("inf") else max(seconds, 0.0)):
                await self._wake.wait()

    def follow(self) -> asyncio.Event:
        """An event that is set at every change, until ``unfollow``."""
        changed = asyncio.Event()
        self._followers.add(changed)
        return changed

    def unfollow(self, changed: asyncio.Event) -> None:
        self._followers.discard(changed)
