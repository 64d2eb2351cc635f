"""User code runs in turn, in its own thread, and nobody waits for it who was told to stop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from hierfl.client.worker import Worker


async def test_work_is_done_one_after_the_other_in_order() -> None:
    worker, order, gate = Worker(), [], threading.Event()

    def first() -> str:
        gate.wait(10)
        order.append("first")
        return "a"

    def second() -> str:
        order.append("second")
        return "b"

    started = asyncio.Event()
    tasks = [asyncio.create_task(worker.run(first, started.set)), asyncio.create_task(worker.run(second))]
    await started.wait()
    assert order == []
    gate.set()
    assert await asyncio.gather(*tasks) == ["a", "b"]
    assert order == ["first", "second"]
    worker.close()


async def test_what_is_raised_is_raised_where_it_is_waited_for() -> None:
    worker = Worker()

    def fail() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        await worker.run(fail)
    assert await worker.run(lambda: 1) == 1  # the thread lives on
    worker.close()


async def test_cancelled_before_its_turn_it_is_never_called() -> None:
    worker, gate, called = Worker(), threading.Event(), []
    blocking = asyncio.create_task(worker.run(lambda: gate.wait(10)))
    waiting = asyncio.create_task(worker.run(lambda: called.append(1)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.set()
    await blocking
    assert await worker.run(lambda: 2) == 2
    assert called == []
    worker.close()


async def test_several_threads_work_at_once_where_asked() -> None:
    worker = Worker(2)
    barrier = threading.Barrier(2, timeout=10)
    await asyncio.gather(worker.run(barrier.wait), worker.run(barrier.wait))
    worker.close()
