"""An intake's line to its Region: everything that waits goes in one call, the next as soon as that returns.

An incarnation is what the Region knows this intake by. Where the Region holds it void, everything under
it is gone: the intake is told to begin anew, under another.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from combiners.messages import Claim, ClaimAnswer, Connection, IntakePort, RegionPort, Registration, Report, Tick
from hierfl.errors import HierFLError, Unreachable
from hierfl.types import UpdateKey

__all__ = ["RegionLink"]

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""Longest time between two ticks."""
RETRY_S = 0.2
"""Pause before a Region that did not answer is called again; Ray restarts it in about a second."""
COALESCE_S = 0.003
"""What comes within so long goes along: a call costs as much as ten clients' claims."""
MAX_BATCH = 4096

T = TypeVar("T")
Waiting = deque[tuple[T, "asyncio.Future[ClaimAnswer]"]]

VOID = "the intake has begun anew and holds this update no more; hand it in again"


class RegionLink:
    """See the module. One loop, one call at a time."""

    def __init__(
        self,
        region: RegionPort,
        *,
        on_registered: Callable[[Registration], None],
        on_void: Callable[[], None],
        on_answer: Callable[[ClaimAnswer], ClaimAnswer],
        traffic: Callable[[], tuple[int, int]],
        is_last: Callable[[Claim], bool] = lambda claim: False,
    ) -> None:
        """
        Args:
            region: The Region.
            on_registered: A new incarnation begins, with these attempts open.
            on_void: The incarnation is over; nothing of it counts.
            on_answer: Sees each answer to a claim before its waiter does, and may turn it.
            traffic: Payload bytes (in, out) since the incarnation began.
            is_last: Whether no other claim is to be waited for, so that this one goes at once.
        """
        self._region = region
        self._on_registered, self._on_void, self._on_answer = on_registered, on_void, on_answer
        self._traffic, self._is_last = traffic, is_last
        self._connections: list[Connection] = []
        self._reports: list[Report] = []
        self._claims: Waiting[Claim] = deque()
        self._asks: Waiting[UpdateKey] = deque()
        self._numbers = itertools.count(1)
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.incarnation = ""
        self._is_over = False

    def connection(self, connection: Connection) -> None:
        self._connections.append(connection)
        self._wake.set()

    def report(self, report: Report) -> None:
        self._reports.append(report)
        self._wake.set()

    async def claim(self, claim: Claim) -> ClaimAnswer:
        """The Region's answer. Raises ``Unreachable`` where the incarnation ended first."""
        return await self._queue(self._claims, claim)

    async def ask(self, key: UpdateKey) -> ClaimAnswer:
        """What the Region knows of an update. Raises as ``claim`` does."""
        return await self._queue(self._asks, key)

    def begin_anew(self) -> None:
        """What this incarnation held is lost: end it, and register under another, which voids it at the Region."""
        self._is_over = True
        self._wake.set()

    async def settled(self) -> None:
        """Wait until the answers to the call in flight, if any, have come."""
        await self._idle.wait()

    def _queue(self, queue: Waiting[T], item: T) -> asyncio.Future[ClaimAnswer]:
        answer: asyncio.Future[ClaimAnswer] = asyncio.get_running_loop().create_future()
        queue.append((item, answer))
        self._wake.set()
        return answer

    async def run(self, name: str, address: str, port: IntakePort) -> None:
        """Register and tick, for as long as this intake lives; anew whenever the Region says so."""
        while True:
            registration = await self._register(name, address, port)
            self.incarnation, self._is_over = registration.incarnation, False
            self._on_registered(registration)
            try:
                await self._tick_until_void()
            finally:
                self._drop()
                self._on_void()
            if self._is_over:
                await asyncio.sleep(RETRY_S)  # what was lost may be lost again at once

    async def _register(self, name: str, address: str, port: IntakePort) -> Registration:
        said = False
        while True:
            try:
                return await self._region.register(name, address, port)
            except HierFLError as error:
                if not said:
                    logger.warning("%s waits for its region: %s", name, error)
                said = True
                await asyncio.sleep(RETRY_S)

    async def _tick_until_void(self) -> None:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            else:
                if not (self._claims and self._is_last(self._claims[-1][0])):
                    await asyncio.sleep(COALESCE_S)
            if self._is_over:
                return
            self._wake.clear()
            self._idle.clear()
            try:
                if not await self._tick():
                    return
            finally:
                self._idle.set()

    async def _tick(self) -> bool:
        """One call with what waits; it is sent again until it is answered. Whether the incarnation lives on."""
        claims = [self._claims.popleft() for _ in range(min(len(self._claims), MAX_BATCH))]
        asks = [self._asks.popleft() for _ in range(min(len(self._asks), MAX_BATCH))]
        connections, self._connections = self._connections, []
        reports, self._reports = self._reports, []
        if self._claims or self._asks:
            self._wake.set()
        bytes_in, bytes_out = self._traffic()
        tick = Tick(
            number=next(self._numbers),
            connections=tuple(connections),
            reports=tuple(reports),
            claims=tuple(claim for claim, _ in claims),
            asks=tuple(key for key, _ in asks),
            bytes_in=bytes_in,
            bytes_out=bytes_out,
        )
        said = False
        try:
            while True:
                try:
                    reply = await self._region.tick(self.incarnation, tick)
                    break
                except HierFLError as error:
                    logger.log(logging.DEBUG if said else logging.WARNING, "the region is told again: %s", error)
                    said = True
                    await asyncio.sleep(RETRY_S)
            if reply.known:
                for (_, waiter), answer in zip(claims, reply.answers, strict=True):
                    _resolve(waiter, self._on_answer(answer))
                for (_, waiter), told in zip(asks, reply.told, strict=True):
                    _resolve(waiter, told)
            return reply.known
        finally:
            for _, waiter in (*claims, *asks):
                _fail(waiter)

    def _drop(self) -> None:
        """Nothing that waits under an incarnation outlives it."""
        for _, waiter in (*self._claims, *self._asks):
            _fail(waiter)
        self._claims.clear()
        self._asks.clear()
        self._connections.clear()
        self._reports.clear()


def _resolve(waiter: asyncio.Future[ClaimAnswer], answer: ClaimAnswer) -> None:
    if not waiter.done():
        waiter.set_result(answer)


def _fail(waiter: asyncio.Future[ClaimAnswer]) -> None:
    if not waiter.done():
        waiter.set_exception(Unreachable(VOID))
