"""The hosts as Ray actors: one Region, n Intakes. They carry calls over and decide nothing.

Each actor runs its host on an event loop of its own, in a thread beside Ray's: an actor that Ray restarts
begins anew in ``__init__``, an intake on its port and under a new incarnation, the Region under a new
``region_epoch``. What dies with an actor answers as ``Unreachable``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError

from combiners.host import RegionHost
from combiners.intake import IntakeHost
from combiners.messages import ClientView, HandOver, IntakePort, Model, Opening, Registration, Tick, TickReply
from combiners.settings import IntakeSettings, RegionSettings
from combiners.shard_actor import make_shard
from hierfl import buffers, kernels, observe
from hierfl.aggregation import PartialAggregate
from hierfl.errors import HierFLError, PortInUse, StorageError, StoreLocked, Unreachable
from hierfl.pki import Kit
from hierfl.receipts import Receipt
from hierfl.types import AttemptKey, ClientRef, ModelHash
from hierfl.wire.transfer import Frame

__all__ = ["IntakeActor", "RegionActor", "remote_intake", "remote_region"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

RESTART_PATIENCE_S = 10.0
"""How long a restarted actor waits for the port, or the lock, of the process that it replaces."""
RETRY_S = 0.1
LEAST_STORED_BYTES = 2**20
"""A smaller model is carried by value: finding it in the object store would take longer."""


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="host", daemon=True).start()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end, from a thread without a loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end, from Ray's loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))


def _configure(process: str, directory: Path) -> None:
    """Talk goes to stderr, which Ray carries to the supervisor's. Kernels are compiled while the host starts:
    until they are, sums are made by their NumPy form, with the same bits.
    """
    buffers.keep_freed_memory()
    threading.Thread(target=kernels.warm_up, name="kernels", daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ray").setLevel(logging.WARNING)
    observe.configure(process, directory)


def _restarted() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray's own, inside
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


async def _patiently(make: Callable[[], Awaitable[T]], error: type[Exception]) -> T:
    """``make`` again while what it needs is still held by the actor that this one replaces."""
    until_s = time.monotonic() + (RESTART_PATIENCE_S if _restarted() else 0.0)
    while True:
        try:
            return await make()
        except error:
            if time.monotonic() > until_s:
                raise
            await asyncio.sleep(RETRY_S)


# ---------------------------------------------------------------- the region


class RegionActor:
    """``RegionHost`` in a process of its own."""

    def __init__(self, kit: Path, directory: Path, addresses: tuple[str, ...], settings: RegionSettings) -> None:
        loaded = Kit.load(kit)
        _configure(f"combiner.{loaded.identity.region}", directory)
        self._loop = _Loop()

        async def make() -> RegionHost:
            host = RegionHost(loaded, directory, addresses, settings, _in_store)
            host.start()
            return host

        self._failure: HierFLError | None = None
        try:
            self._host = self._loop.wait(_patiently(make, StoreLocked))
        except HierFLError as error:
            self._failure = error  # told by ``ready``: Ray keeps only the text of what __init__ raises

    async def ready(self) -> None:
        """Raises what kept the Region from starting."""
        if self._failure is not None:
            raise self._failure

    async def register(self, name: str, address: str, intake: Any) -> Registration:
        return await self._loop.run(self._host.register(name, address, _IntakeOverRay(intake)))

    async def tick(self, incarnation: str, tick: Tick) -> TickReply:
        return await self._loop.run(self._host.tick(incarnation, tick))

    async def model(self, model_hash: ModelHash) -> dict[ModelHash | None, Any] | None:
        """Frames, or where they lie: under ``None`` the whole model's, under a base's hash those of the difference."""
        model = await self._loop.run(self._host.model(model_hash))
        if model is None:
            return None
        return {base: _carried(frames) for base, frames in [(None, model.frames), *model.deltas.items()]}

    async def clients(self) -> tuple[ClientView, ...]:
        return await self._loop.run(self._host.clients())

    async def failed(self) -> None:
        """Waits; raises what the region cannot go on after."""
        await self.ready()

        async def wait() -> None:
            await asyncio.shield(self._host.failed)

        await self._loop.run(wait())

    async def drain(self, timeout_s: float) -> None:
        await self._loop.run(self._host.drain(timeout_s))

    async def stop(self) -> None:
        await self._loop.run(self._host.stop())
        observe.shutdown()


class _IntakeOverRay:
    """``IntakePort`` of an intake actor, for the Region."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def open(self, opening: Opening) -> None:
        await _answer(self._handle.open.remote(opening))

    async def ask_again(self, key: AttemptKey, clients: tuple[ClientRef, ...]) -> None:
        await _answer(self._handle.ask_again.remote(key, clients))

    async def freeze(self, key: AttemptKey, seal_id: str) -> HandOver:
        return await self._handed(*self._handle.freeze.options(num_returns=2).remote(key, seal_id))

    async def add(self, hand_overs: tuple[HandOver, ...]) -> HandOver:
        lists = tuple(replace(hand_over, stored=None) for hand_over in hand_overs)
        sums = (one.stored.reference if isinstance(one.stored, _Stored) else one.partial for one in hand_overs)
        return await self._handed(*self._handle.add.options(num_returns=2).remote(lists, *sums))

    async def _handed(self, listed: Any, sums: Any) -> HandOver:
        """The list comes here; the sums stay where they are until somebody adds them."""
        hand_over: HandOver = await _answer(listed)
        if hand_over.ranged is not None or not hand_over.entries:
            return hand_over
        return replace(hand_over, stored=_Stored(hand_over.incarnation, sums))

    async def resume(self, key: AttemptKey, seal_id: str) -> None:
        await _answer(self._handle.resume.remote(key, seal_id))

    async def close(self, key: AttemptKey, reason: str) -> None:
        await _answer(self._handle.close.remote(key, reason))

    async def deliver(self, receipts: tuple[Receipt, ...]) -> None:
        await _answer(self._handle.deliver.remote(receipts))

    async def list_endpoints(self, endpoints: bytes) -> None:
        await _answer(self._handle.list_endpoints.remote(endpoints))


class _Stored:
    """Sums in Ray's object store. They are the result of a call of ours, so they outlive the actor that made them."""

    def __init__(self, incarnation: str, reference: Any) -> None:
        self.incarnation, self.reference = incarnation, reference

    async def fetch(self) -> PartialAggregate:
        try:
            partial: PartialAggregate = await self.reference
        except RayError as error:
            raise StorageError(f"the sums of {self.incarnation} cannot be had: {type(error).__name__}") from None
        return partial


class _InStore(tuple[memoryview, ...]):
    """Frames that lie in Ray's object store: every process of a machine reads them there, and none copies them."""

    reference: Any


async def _in_store(frames: Sequence[bytes]) -> Sequence[Frame]:
    """Move frames there; a few go along with each call instead."""
    if sum(map(len, frames)) < LEAST_STORED_BYTES:
        return frames
    return await asyncio.to_thread(_put, frames)


def _put(frames: Sequence[bytes]) -> Sequence[Frame]:
    try:
        reference = ray.put([np.frombuffer(frame, np.uint8) for frame in frames])
        stored = _InStore(map(memoryview, ray.get(reference)))
    except RayError as error:
        logger.warning("a model stays in the Region's memory, the object store does not take it: %s", error)
        return frames
    stored.reference = reference
    return stored


def _carried(frames: Sequence[Frame]) -> Any:
    return frames.reference if isinstance(frames, _InStore) else [bytes(frame) for frame in frames]


async def _fetched(carried: Any) -> Sequence[Frame]:
    """What ``_carried`` stands for, at an intake: for as long as a frame is in use the store keeps it."""
    if isinstance(carried, list):
        return carried
    try:
        return tuple(map(memoryview, await carried))
    except RayError as error:
        raise Unreachable(f"a model is gone with the Region that had it ({type(error).__name__})") from None


# ---------------------------------------------------------------- an intake


class IntakeActor:
    """``IntakeHost`` in a process of its own, serving on its port from ``__init__`` on."""

    def __init__(
        self,
        name: str,
        kit: Path,
        directory: Path,
        listen: str,
        advertise: str,
        region: str,
        settings: IntakeSettings,
    ) -> None:
        """``region``: name of the Region's actor; a handle among the arguments would not outlive a restart."""
        loaded = Kit.load(kit)
        _configure(f"combiner.{loaded.identity.region}.{name}", directory)
        self._loop = _Loop()
        port = _RegionOverRay(ray.get_actor(region), ray.get_runtime_context().current_actor)

        async def make() -> IntakeHost:
            host = IntakeHost(name, loaded, port, settings, make_shard)
            try:
                await host.start(listen, advertise)
            except PortInUse:
                await host.stop(0)
                raise
            host.failed.add_done_callback(_end_process)
            return host

        self._failure: HierFLError | None = None
        try:
            self._host = self._loop.wait(_patiently(make, PortInUse))
        except HierFLError as error:
            self._failure = error
            if _restarted():
                os._exit(1)  # Ray tries again

    async def ready(self) -> None:
        """Raises what kept the intake from starting."""
        if self._failure is not None:
            raise self._failure

    async def open(self, opening: Opening) -> None:
        await self._loop.run(self._host.open(opening))

    async def ask_again(self, key: AttemptKey, clients: tuple[ClientRef, ...]) -> None:
        await self._loop.run(self._host.ask_again(key, clients))

    async def freeze(self, key: AttemptKey, seal_id: str) -> tuple[HandOver, PartialAggregate | None]:
        return _parted(await self._loop.run(self._host.freeze(key, seal_id)))

    async def add(
        self, lists: tuple[HandOver, ...], *sums: PartialAggregate
    ) -> tuple[HandOver, PartialAggregate | None]:
        whole = tuple(replace(listed, partial=partial) for listed, partial in zip(lists, sums, strict=True))
        return _parted(await self._loop.run(self._host.add(whole)))

    async def resume(self, key: AttemptKey, seal_id: str) -> None:
        await self._loop.run(self._host.resume(key, seal_id))

    async def close(self, key: AttemptKey, reason: str) -> None:
        await self._loop.run(self._host.close(key, reason))

    async def deliver(self, receipts: tuple[Receipt, ...]) -> None:
        await self._loop.run(self._host.deliver(receipts))

    async def list_endpoints(self, endpoints: bytes) -> None:
        await self._loop.run(self._host.list_endpoints(endpoints))

    async def stop_admitting(self) -> None:
        await self._loop.run(self._host.stop_admitting())

    async def stop(self) -> None:
        await self._loop.run(self._host.stop())
        observe.shutdown()


def _parted(hand_over: HandOver) -> tuple[HandOver, PartialAggregate | None]:
    """Two results, so that whoever calls can take the list and leave the sums in the object store."""
    return replace(hand_over, partial=None), hand_over.partial


class _RegionOverRay:
    """``RegionPort`` of the region actor, for an intake."""

    def __init__(self, handle: Any, own_handle: Any) -> None:
        self._handle, self._own_handle = handle, own_handle

    async def register(self, name: str, address: str, port: IntakePort) -> Registration:
        del port  # the Region calls this actor by its handle
        registration: Registration = await _answer(self._handle.register.remote(name, address, self._own_handle))
        return registration

    async def tick(self, incarnation: str, tick: Tick) -> TickReply:
        reply: TickReply = await _answer(self._handle.tick.remote(incarnation, tick))
        return reply

    async def model(self, model_hash: ModelHash) -> Model | None:
        carried: dict[ModelHash | None, Any] | None = await _answer(self._handle.model.remote(model_hash))
        if carried is None:
            return None
        frames = {base: await _fetched(one) for base, one in carried.items()}
        whole = frames.pop(None)
        return Model(model_hash=model_hash, frames=whole, deltas={base: one for base, one in frames.items() if base})

    async def clients(self) -> tuple[ClientView, ...]:
        clients: tuple[ClientView, ...] = await _answer(self._handle.clients.remote())
        return clients


async def _answer(reference: Any) -> Any:
    """What an actor answers; one that is gone, or on its way back, is unreachable."""
    try:
        return await reference
    except RayActorError as error:
        raise Unreachable(f"an actor of this region is gone or restarting ({type(error).__name__})") from None


def _end_process(failed: asyncio.Future[None]) -> None:
    """An intake that cannot go on ends its process: Ray starts it anew, under a new incarnation."""
    if not failed.cancelled() and failed.exception() is not None:
        logging.getLogger(__name__).error("the intake starts anew: %s", failed.exception(), exc_info=failed.exception())
        os._exit(1)


def remote_region(**options: Any) -> Any:
    """The actor class of the Region, to be made with ``.remote(...)``."""
    return ray.remote(RegionActor).options(num_cpus=0, max_restarts=-1, max_task_retries=0, **options)


def remote_intake(**options: Any) -> Any:
    """The actor class of an intake."""
    return ray.remote(IntakeActor).options(num_cpus=0, max_restarts=-1, max_task_retries=0, **options)
