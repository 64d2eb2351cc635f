"""An event loop with its own clock, for many processes in one thread. The same seed gives the same history.

Every task and callback belongs to a ``Node``, a process of the simulation: the one in whose context it was made.
Within a node callbacks run in the order in which they became due, as on asyncio's own loop; between nodes a seeded
draw says who goes next. Time passes only when nobody has anything to do. Executors run their functions on the loop,
a little later. A node that is frozen keeps what becomes due for when it thaws; one that is dead runs nothing more,
not even what its code would do while it ends.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import random
import sqlite3
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

__all__ = ["NODE", "Killed", "Node", "SimLoop", "Stuck", "current"]

T = TypeVar("T")

NODE: contextvars.ContextVar[Node] = contextvars.ContextVar("simulated_node")

EXECUTOR_S = 0.002
"""Longest time that a function waits for its thread."""
SLOW_S = 0.5
"""The same, where threads are slow."""
KEEP_TASKS = 256
"""Of a node, before those that are done are forgotten."""


class Killed(BaseException):
    """The process died in the middle of a function: what unwinds from here on touches nothing."""


class Stuck(AssertionError):
    """Something that must happen did not."""


class Node:
    """One process of the simulation."""

    def __init__(self, loop: SimLoop, name: str) -> None:
        self.loop, self.name = loop, name
        self.is_alive, self.is_frozen = True, False
        self.ready: deque[asyncio.Handle] = deque()
        self.tasks: list[asyncio.Task[Any]] = []
        self.files: list[sqlite3.Connection] = []
        """Databases that it has open: the operating system closes them when it dies."""
        self.is_listed = False
        """Whether it is among the loop's ready nodes."""
        self.dies_after: int | None = None
        """So many more steps that touch a disk; then it dies in the middle of one."""
        self.freezes_after: int | None = None
        """So many more such steps; then it is told of to ``loop.on_freezing``, which freezes it before its next one."""
        self.on_death: Callable[[], None] = _nobody
        self._context = contextvars.copy_context()
        self._context.run(NODE.set, self)

    @property
    def runs(self) -> bool:
        return self.is_alive and not self.is_frozen

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function as this process."""
        return self._context.copy().run(function, *arguments)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine as this process."""
        return self.call(self.loop.create_task, work)

    def kill(self) -> None:
        """End it as SIGKILL would."""
        self.is_alive = False
        self.on_death, told = _nobody, self.on_death
        self.ready.clear()
        for file in self.files:
            file.close()
        self.files.clear()
        told()

    def freeze(self) -> None:
        self.is_frozen = True

    def thaw(self) -> None:
        self.is_frozen = False
        self.loop.list_ready(self)

    def die(self) -> None:
        """It dies in the middle of what it does."""
        self.is_alive = False
        self.loop.on_killed(self)
        raise Killed

    def touch_disk(self) -> None:
        """One step at a disk begins, or has ended: the process may die here."""
        if not self.is_alive:
            raise Killed
        if self.freezes_after is not None:
            self.freezes_after -= 1
            if self.freezes_after < 0:
                self.freezes_after = None
                self.loop.on_freezing(self)
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                self.die()


def _nobody() -> None:
    """Nobody waits for its end."""


def current() -> Node:
    """The process that is running."""
    return NODE.get()


class SimLoop(asyncio.AbstractEventLoop):
    """See the module."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.num_steps = 0
        self.errors: list[str] = []
        """What would have been logged as an error of asyncio's."""
        self.on_killed: Callable[[Node], None] = lambda node: None
        """Told of a node that died at a disk, before its function unwinds."""
        self.on_freezing: Callable[[Node], None] = Node.freeze
        self.on_failpoint: Callable[[str], None] = lambda point: None
        """Told of every failpoint that is reached (``hierfl/failpoints.py``)."""
        self.slow_threads = 0.0
        """How often a function waits long for its thread."""
        self._ready: list[Node] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self._executor_free_at: dict[int, float] = {}
        self.world = Node(self, "world")
        self._nodes = [self.world]
        """Whoever makes the history: faults, operators, the network."""

    def nodes(self) -> list[Node]:
        """All that there ever were and are alive."""
        return [node for node in self._nodes if node.is_alive]

    def node(self, name: str) -> Node:
        node = Node(self, name)
        self._nodes.append(node)
        return node

    # ---------------------------------------------------------------- running

    def run(self, work: Coroutine[Any, Any, T], most_steps: int = 2_000_000) -> T:
        """Run until ``work``, the world's, has ended."""
        asyncio._set_running_loop(self)
        try:
            task = self.world.spawn(work)
            while not task.done():
                self._step()
                if self.num_steps > most_steps:
                    raise Stuck(f"no end after {most_steps} steps, at {self.now_s:.3f} s")
            return task.result()
        finally:
            asyncio._set_running_loop(None)

    def _step(self) -> None:
        ready = self._ready
        while not ready:
            self._advance()
        index = int(self.random.random() * len(ready)) if len(ready) > 1 else 0
        node = ready[index]
        if node.runs and node.ready:
            handle = node.ready.popleft()
            if not handle._cancelled:
                self.num_steps += 1
                handle._run()
        if not node.runs or not node.ready:
            ready[index] = ready[-1]
            ready.pop()
            node.is_listed = False

    def _advance(self) -> None:
        """To the next moment at which something is due; all that is due then is ready."""
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not timers:
            raise Stuck(f"everybody waits for ever, at {self.now_s:.3f} s")
        self.now_s = max(self.now_s, timers[0][0])
        while timers and timers[0][0] <= self.now_s:
            _, _, handle = heapq.heappop(timers)
            handle._scheduled = False
            if not handle._cancelled:
                self._enqueue(handle)

    def _enqueue(self, handle: asyncio.Handle) -> None:
        node = handle._context.get(NODE, self.world)
        if node.is_alive:
            node.ready.append(handle)
            if not node.is_listed:
                self.list_ready(node)

    def list_ready(self, node: Node) -> None:
        if node.ready and node.runs and not node.is_listed:
            node.is_listed = True
            self._ready.append(node)

    def end(self) -> None:
        """The history is over: close what is left of its coroutines, whose code touches nothing any more."""
        for node in self._nodes:
            node.kill()
        asyncio._set_running_loop(self)
        try:
            for task in [task for node in self._nodes for task in node.tasks if not task.done()]:
                task._log_destroy_pending = False
                with suppress(BaseException):  # they are ended, not asked
                    task.get_coro().close()
        finally:
            asyncio._set_running_loop(None)

    # ---------------------------------------------------------------- asyncio's side

    def time(self) -> float:
        return self.now_s

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._enqueue(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        handle._scheduled = True
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Found cancelled when it is due."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: contextvars.Context | None = None
    ) -> asyncio.Task[T]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        node = (contextvars.copy_context() if context is None else context).get(NODE, self.world)
        node.tasks.append(task)
        if len(node.tasks) > KEEP_TASKS:
            node.tasks = [task for task in node.tasks if not task.done()]
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> Awaitable[T]:
        """The executor's functions one after the other, each on the loop, a little later."""
        result: asyncio.Future[T] = self.create_future()
        key = id(executor) if executor is not None else id(NODE.get(self.world))
        wait_s = EXECUTOR_S * self.random.random()
        if self.slow_threads and self.random.random() < self.slow_threads:
            wait_s = SLOW_S * self.random.random()
        start = max(self.now_s + wait_s, self._executor_free_at.get(key, 0.0))
        self._executor_free_at[key] = start
        self.call_at(start, _work, result, func, args)
        return result

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def get_task_factory(self) -> None:
        return None

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, Killed):
            self.errors.append(f"{context.get('message')}: {error!r}")


def _work(result: asyncio.Future[Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if result.done():
        return
    try:
        value = function(*arguments)
    except Killed:
        return  # nobody is there to be told
    except BaseException as error:  # noqa: BLE001  it is raised where the result is waited for
        if not result.done():
            result.set_exception(error)
    else:
        if not result.done():
            result.set_result(value)
