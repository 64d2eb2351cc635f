"""The line in front of an intake: a bounded number of uploads at once, the others wait and hold no buffer.

First come, first served; no time budget runs while somebody waits. A ticket that is not used in time, or
whose upload has ended, makes room for the next. What is kept of a cut upload keeps its place, and whoever comes
back with the same update comes in on that one, past the line.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from combiners.messages import Claim
from hierfl.errors import RoundClosed
from hierfl.types import UpdateKey

__all__ = ["Admitted", "Line"]

TICKET_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """What a ticket lets in: this update and no other."""

    claim: Claim
    length_bytes: int

    @property
    def update(self) -> tuple[UpdateKey, str, int]:
        """Who comes back with this comes back with the same update."""
        return self.claim.key, self.claim.digest, self.length_bytes


@dataclass(eq=False)
class _Place:
    """Room inside; free again once no ticket, no upload and nothing kept is on it."""

    admitted: Admitted
    num_on_it: int = 1
    num_holds: int = 0
    """Of those, how many wait for somebody who may come back."""
    returning: bytes = b""
    """The ticket of who has come back."""


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
        self._tickets: dict[bytes, tuple[Admitted, _Place, asyncio.TimerHandle]] = {}
        self._inside: dict[bytes, _Place] = {}
        self._held: dict[tuple[UpdateKey, str, int], _Place] = {}

    def resize(self, max_bytes: int) -> None:
        """Other bytes in all from now on; who is inside stays."""
        self._max_bytes = max_bytes
        self._advance()

    @property
    def is_full(self) -> bool:
        """Whether the line itself is too long: come back later."""
        return len(self._waiting) >= self._max_waiting

    def has_place(self, admitted: Admitted) -> bool:
        """Whether a place is held for this update."""
        return admitted.update in self._held

    async def enter(self, admitted: Admitted) -> bytes:
        """Wait for room; a ticket that is good for ``ticket_s`` seconds. Cancelled, the place is given up."""
        place = self._held.get(admitted.update)
        if place is not None:
            return self._come_back(admitted, place)
        await self._room(admitted.length_bytes)
        return self._ticket(admitted, _Place(admitted))

    @asynccontextmanager
    async def inside(self, admitted: Admitted) -> AsyncIterator[None]:
        """Wait for room, and have it for as long as the block lasts: for what is here already, without a ticket."""
        await self._room(admitted.length_bytes)
        try:
            yield
        finally:
            self._give_back(admitted.length_bytes)

    async def _room(self, length_bytes: int) -> None:
        if self._waiting or not self._has_room(length_bytes):
            await self._wait(length_bytes)
        else:
            self._take(length_bytes)

    def _come_back(self, admitted: Admitted, place: _Place) -> bytes:
        place.num_on_it += 1
        self._expire(place.returning)  # one at a time: an answer that was lost is not asked for again
        place.returning = self._ticket(admitted, place)
        return place.returning

    def _ticket(self, admitted: Admitted, place: _Place) -> bytes:
        ticket = secrets.token_bytes(TICKET_BYTES)
        timer = asyncio.get_running_loop().call_later(self._ticket_s, self._expire, ticket)
        self._tickets[ticket] = (admitted, place, timer)
        return ticket

    @contextmanager
    def upload(self, ticket: bytes) -> Iterator[Admitted]:
        """Use a ticket, once; the room is free again at the end.

        Raises:
            RoundClosed: It is not known: used, or too old.
        """
        if ticket not in self._tickets:
            raise RoundClosed("the ticket of this upload was used already, or is too old; ask to be admitted again")
        admitted, place, timer = self._tickets.pop(ticket)
        timer.cancel()
        self._inside[ticket] = place
        try:
            yield admitted
        finally:
            self._leave(self._inside.pop(ticket))

    def hold(self, ticket: bytes) -> Callable[[], None]:
        """Hold the place of an upload that is inside beyond its end, for who may come back with the same update;
        what it returns lets go, and is called once."""
        place = self._inside[ticket]
        place.num_on_it += 1
        place.num_holds += 1
        self._held[place.admitted.update] = place

        def let_go() -> None:
            place.num_holds -= 1
            if not place.num_holds and self._held.get(place.admitted.update) is place:
                del self._held[place.admitted.update]
            self._leave(place)

        return let_go

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

    def _leave(self, place: _Place) -> None:
        place.num_on_it -= 1
        if not place.num_on_it:
            self._give_back(place.admitted.length_bytes)

    def _advance(self) -> None:
        while self._waiting and self._has_room(self._waiting[0].length_bytes):
            waiter = self._waiting.popleft()
            if not waiter.turn.done():
                self._take(waiter.length_bytes)
                waiter.turn.set_result(None)

    def _expire(self, ticket: bytes) -> None:
        if ticket in self._tickets:
            _, place, timer = self._tickets.pop(ticket)
            timer.cancel()
            self._leave(place)
