"""The Region's line to each of its intakes: calls go one after the other, and a call that fails is the end.

An intake that does not answer in time, or that dies under a call, is void: whatever it holds is not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from combiners.messages import IntakePort
from hierfl.errors import RegionUnreachable

__all__ = ["IntakeLine"]

T = TypeVar("T")


class IntakeLine:
    """One incarnation of an intake, as the Region holds it."""

    def __init__(
        self,
        name: str,
        incarnation: str,
        address: str,
        port: IntakePort,
        *,
        timeout_s: float,
        on_lost: Callable[[str], None],
    ) -> None:
        """
        Args:
            address: As clients reach it, or empty.
            timeout_s: Of each call.
            on_lost: Gets the incarnation, once, when a call to it failed or took longer.
        """
        self.name, self.incarnation, self.address = name, incarnation, address
        self.bytes_in = self.bytes_out = 0
        self.heard_at_s = time.monotonic()
        self.newest_tick = 0
        """Its number; what has a lower one was overtaken, and its answer is missed by nobody."""
        self._port, self._timeout_s, self._on_lost = port, timeout_s, on_lost
        self._calls: asyncio.Queue[tuple[Callable[[IntakePort], Awaitable[Any]], asyncio.Future[Any]]] = asyncio.Queue()
        self._worker = asyncio.create_task(self._work())

    def call(self, call: Callable[[IntakePort], Awaitable[Any]]) -> asyncio.Future[Any]:
        """Queue a call; its result, or ``RegionUnreachable`` where the intake was lost."""
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        result.add_done_callback(_seen)
        self._calls.put_nowait((call, result))
        return result

    async def borrow(self, call: Callable[[IntakePort], Awaitable[T]]) -> T:
        """Have the intake do what another could do as well: out of the order, and where it fails nothing is lost.

        Raises:
            RegionUnreachable: It did not do it.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call(self._port)
        except Exception as error:  # noqa: BLE001 - whatever it was, another does it
            raise RegionUnreachable(f"{self.name} did not do it: {error}") from None

    async def close(self) -> None:
        """Let go of the intake; calls that wait fail."""
        self._worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._worker

    async def drained(self) -> None:
        """Wait until every call queued so far has been answered."""
        await self._calls.join()

    async def _work(self) -> None:
        try:
            while True:
                call, result = await self._calls.get()
                try:
                    async with asyncio.timeout(self._timeout_s):
                        answer = await call(self._port)
                except Exception as error:  # noqa: BLE001 - whatever an intake dies of, only it is lost
                    self._fail(result, error)
                    self._on_lost(self.incarnation)
                    return
                finally:
                    self._calls.task_done()
                if not result.done():
                    result.set_result(answer)
        finally:
            while not self._calls.empty():
                self._fail(self._calls.get_nowait()[1], None)
                self._calls.task_done()

    def _fail(self, result: asyncio.Future[Any], error: BaseException | None) -> None:
        if not result.done():
            result.set_exception(RegionUnreachable(f"{self.name} is gone" + (f": {error}" if error else "")))


def _seen(result: asyncio.Future[Any]) -> None:
    """Nobody has to ask for a result."""
    if not result.cancelled():
        result.exception()
