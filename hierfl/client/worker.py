"""Where user code runs: a few threads, one by default, so that the clients of a process train in turn.

The threads are daemons: user code cannot be interrupted, and a client that was told to stop does not
wait for an epoch to end. What such a thread would have made is made again, from the same seed.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Worker"]

T = TypeVar("T")


class Worker:
    """Runs functions one after the other on ``threads`` threads, in the order that they come."""

    def __init__(self, threads: int = 1) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"app-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    async def run(self, function: Callable[[], T], started: Callable[[], None] = lambda: None) -> T:
        """The function's result. Cancelled before its turn, it is never called; after, it ends unheard.

        ``started`` is called, on the loop, when its turn comes.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        context = contextvars.copy_context()  # the trace that it belongs to

        def job() -> None:
            if result.cancelled():
                return
            _on_loop(loop, started)
            try:
                value = context.run(function)
            except BaseException as error:  # noqa: BLE001  it is raised where the result is waited for
                _on_loop(loop, _settle, result, None, error)
            else:
                _on_loop(loop, _settle, result, value, None)

        self._jobs.put(job)
        return await result

    def close(self) -> None:
        """Let the threads end once they are idle."""
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _settle(result: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if result.done():
        return
    if error is None:
        result.set_result(value)
    else:
        result.set_exception(error)


def _on_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    """Call on the loop, if it still runs: the process may have stopped while user code was at work."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return
