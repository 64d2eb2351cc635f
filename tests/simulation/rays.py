"""Ray between a region's actors: calls that may run twice, or not at all, or whose answer is lost.

An actor is found by its name: after a restart the same handle reaches its successor, and what an older one was asked
has failed. What is said is frozen, so that nothing is shared; sums are copied.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from combiners.messages import ClientView, HandOver, IntakePort, Model, Opening, Registration, Tick, TickReply
from hierfl.errors import HierFLError, Unreachable
from hierfl.receipts import Receipt
from hierfl.types import AttemptKey, ClientRef, ModelHash
from tests.simulation.loop import Node, SimLoop, current

__all__ = ["Actor", "IntakeHandle", "RayOdds", "Rays", "RegionHandle"]

LATENCY_S = (0.0002, 0.002)
NOTICED_S = (0.01, 0.5)
TWICE_WITHIN_S = 1.0


@dataclass
class RayOdds:
    """How often each thing goes wrong, for one call."""

    lost: float = 0.0
    unanswered: float = 0.0
    twice: float = 0.0


class Actor:
    """A named actor: whichever process has the name now."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.node: Node | None = None
        self.host: Any = None
        self.waiting: set[asyncio.Future[Any]] = set()
        """Of calls that were sent to ``node``."""

    def is_now(self, node: Node | None, host: Any) -> None:
        """Another process has the name; calls of the one before have failed."""
        self.node, self.host = node, host
        waiting, self.waiting = self.waiting, set()
        for future in waiting:
            if not future.done():
                future.set_exception(Unreachable(f"{self.name} is gone"))


class Rays:
    """One region's cluster."""

    def __init__(self, loop: SimLoop) -> None:
        self.loop, self.random = loop, loop.random
        self.odds = RayOdds()
        self.on_call: Callable[[str, Node, Node], None] = lambda method, caller, target: None
        """Told of every call before it is sent."""

    async def call(self, actor: Actor, method: str, *arguments: Any) -> Any:
        """Call a method of an actor, wherever it runs. Raises ``Unreachable`` where that is not known."""
        answer: asyncio.Future[Any] = self.loop.create_future()
        caller, node, host = current(), actor.node, actor.host
        if node is None or not node.is_alive or host is None:
            await asyncio.sleep(self.random.uniform(*NOTICED_S))
            raise Unreachable(f"{actor.name} is not there")
        self.on_call(method, caller, node)
        odds, fate = self.odds, self.random.random()
        if fate >= odds.lost:
            answers = fate >= odds.lost + odds.unanswered
            self._send(caller, node, host, method, arguments, answer if answers else None, self._latency_s())
        if 0 <= fate - odds.lost - odds.unanswered < odds.twice:
            self._send(caller, node, host, method, arguments, None, self.random.uniform(0.0, TWICE_WITHIN_S))
        if fate < odds.lost + odds.unanswered:
            self.loop.call_later(self.random.uniform(*NOTICED_S), _fail, answer, actor.name)
        actor.waiting.add(answer)
        try:
            return await answer
        finally:
            actor.waiting.discard(answer)

    def _latency_s(self) -> float:
        return self.random.uniform(*LATENCY_S)

    def _send(
        self,
        caller: Node,
        node: Node,
        host: Any,
        method: str,
        arguments: tuple[Any, ...],
        answer: asyncio.Future[Any] | None,
        after_s: float,
    ) -> None:
        async def run() -> None:
            try:
                result, error = _copied(await getattr(host, method)(*arguments)), None
            except HierFLError as failed:
                result, error = None, failed
            if answer is not None:
                self.loop.call_later(self._latency_s(), _settle, answer, result, error, context=caller._context.copy())

        def begin() -> None:
            self.loop.create_task(run())

        self.loop.call_later(after_s, begin, context=node._context.copy())


def _fail(answer: asyncio.Future[Any], name: str) -> None:
    if not answer.done():
        answer.set_exception(Unreachable(f"{name} did not answer"))


def _copied(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, HandOver) and value.partial is not None else value


def _settle(answer: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(result)


class RegionHandle:
    """``RegionPort`` of the region's actor, for the intake with this actor's name."""

    def __init__(self, rays: Rays, region: Actor, own: Actor) -> None:
        self._rays, self._region, self._own = rays, region, own

    def _call(self, method: str, *arguments: Any) -> Awaitable[Any]:
        return self._rays.call(self._region, method, *arguments)

    async def register(self, name: str, address: str, port: IntakePort) -> Registration:
        del port  # it is called by its actor's name
        registration: Registration = await self._call("register", name, address, IntakeHandle(self._rays, self._own))
        return registration

    async def tick(self, incarnation: str, tick: Tick) -> TickReply:
        reply: TickReply = await self._call("tick", incarnation, tick)
        return reply

    async def model(self, model_hash: ModelHash) -> Model | None:
        model: Model | None = await self._call("model", model_hash)
        return model

    async def clients(self) -> tuple[ClientView, ...]:
        clients: tuple[ClientView, ...] = await self._call("clients")
        return clients


@dataclass(frozen=True)
class IntakeHandle:
    """``IntakePort`` of an intake's actor, for the Region."""

    rays: Rays
    actor: Actor

    async def _call(self, method: str, *arguments: Any) -> Any:
        return await self.rays.call(self.actor, method, *arguments)

    async def open(self, opening: Opening) -> None:
        await self._call("open", opening)

    async def ask_again(self, key: AttemptKey, clients: tuple[ClientRef, ...]) -> None:
        await self._call("ask_again", key, clients)

    async def freeze(self, key: AttemptKey, seal_id: str) -> HandOver:
        hand_over: HandOver = await self._call("freeze", key, seal_id)
        return hand_over

    async def add(self, hand_overs: tuple[HandOver, ...]) -> HandOver:
        hand_over: HandOver = await self._call("add", hand_overs)
        return hand_over

    async def resume(self, key: AttemptKey, seal_id: str) -> None:
        await self._call("resume", key, seal_id)

    async def close(self, key: AttemptKey, reason: str) -> None:
        await self._call("close", key, reason)

    async def deliver(self, receipts: tuple[Receipt, ...]) -> None:
        await self._call("deliver", receipts)

    async def list_endpoints(self, endpoints: bytes) -> None:
        await self._call("list_endpoints", endpoints)
