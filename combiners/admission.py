"""The line in front of an intake: a bounded number of uploads at once, the others wait and hold no buffer.

First come, first served; no time budget runs while somebody waits. A ticket that is not used in time, or
whose upload has ended, makes room for the next.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from combiners.messages import Claim
from hierfl.errors import RoundClosed

__all__ = ["Admitted", "Line"]

TICKET_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """What a ticket lets in: this update and no other."""

    claim: Claim
    length_bytes: int


@dataclass
class _Waiter:
    length_bytes: int
    turn: asyncio.Future[None]


class Line:
    """Room for ``max_uploads`` at once, of ``max_bytes`` in all; one that is larger than that goes alone."""

    def __init__(self, *, max_uploads: int, max_bytes: int, max_waiting: int, ticket_s: float) -> None:
        self._max_uploads, self._max_bytes = max_uploads, max_bytes
        self._max_waiting, self._ticket_s = max_waiting, ticket_s
        self._num_inside, self._bytes_inside = 0, 0
        self._waiting: deque[_Waiter] = deque()
        self._tickets: dict[bytes, tuple[Admitted, asyncio.TimerHandle]] = {}

    @property
    def is_full(self) -> bool:
        """Whether the line itself is too long: come back later."""
        return len(self._waiting) >= self._max_waiting

    async def enter(self, admitted: Admitted) -> bytes:
        """Wait for room; a ticket that is good for ``ticket_s`` seconds. Cancelled, the place is given up."""
        if self._waiting or not self._has_room(admitted.length_bytes):
            await self._wait(admitted.length_bytes)
        else:
            self._take(admitted.length_bytes)
        ticket = secrets.token_bytes(TICKET_BYTES)
        timer = asyncio.get_running_loop().call_later(self._ticket_s, self._expire, ticket)
        self._tickets[ticket] = (admitted, timer)
        return ticket

    @contextmanager
    def upload(self, ticket: bytes) -> Iterator[Admitted]:
        """Use a ticket, once; the room is free again at the end.

        Raises:
            RoundClosed: It is not known: used, or too old.
        """
        admitted, timer = self._tickets.pop(ticket, (None, None))
        if admitted is None or timer is None:
            raise RoundClosed("the ticket of this upload was used already, or is too old; ask to be admitted again")
        timer.cancel()
        try:
            yield admitted
        finally:
            self._give_back(admitted.length_bytes)

    def clear(self) -> None:
        """Forget tickets that were not used: what they were for is over."""
        for ticket in list(self._tickets):
            self._expire(ticket)

    async def _wait(self, length_bytes: int) -> None:
        waiter = _Waiter(length_bytes, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.cancelled():
                self._give_back(length_bytes)  # its turn had just come
            else:
                self._waiting.remove(waiter)
                self._advance()
            raise

    def _has_room(self, length_bytes: int) -> bool:
        if self._num_inside == 0:
            return True
        return self._num_inside < self._max_uploads and self._bytes_inside + length_bytes <= self._max_bytes

    def _take(self, length_bytes: int) -> None:
        self._num_inside += 1
        self._bytes_inside += length_bytes

    def _give_back(self, length_bytes: int) -> None:
        self._num_inside -= 1
        self._bytes_inside -= length_bytes
        self._advance()

    def _advance(self) -> None:
        while self._waiting and self._has_room(self._waiting[0].length_bytes):
            waiter = self._waiting.popleft()
            if not waiter.turn.done():
                self._take(waiter.length_bytes)
                waiter.turn.set_result(None)

    def _expire(self, ticket: bytes) -> None:
        admitted, timer = self._tickets.pop(ticket, (None, None))
        if admitted is not None and timer is not None:
            timer.cancel()
            self._give_back(admitted.length_bytes)
