"""The Region's shell: looks (gathers events), lets ``region.py`` decide, carries out, in that order.

Owns the zone store, the uplink, the border ledger, the model shelf and the lines to the intakes. Runs in
one event loop, with or without Ray; decides nothing itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from combiners.attempt import Phase
from combiners.events import (
    Abstain,
    AskAgain,
    CloseAtIntakes,
    Drained,
    Event,
    FetchModel,
    Freeze,
    HandedOver,
    Instruction,
    ModelFailed,
    ModelReady,
    OpenAtIntakes,
    PartialSealed,
    Resume,
    Seal,
    SealFailed,
    SendPartial,
    SetTimer,
    StopSending,
    SumsGone,
    Tell,
    Timer,
    TimerFired,
    VoidIntake,
)
from combiners.merging import merge_in_pairs
from combiners.messages import (
    ClientView,
    HandOver,
    IntakePort,
    Model,
    Opening,
    Registration,
    Tick,
    TickReply,
)
from combiners.models import ModelShelf, Share, in_own_memory
from combiners.reception import Reception
from combiners.region import Region
from combiners.residuals import Carried
from combiners.sealing import make_sealed, updates_root
from combiners.sealing_ranges import SumsLost, can_stream, seal_ranges, whole
from combiners.session import Session
from combiners.settings import RegionSettings
from combiners.uplink import Uplink
from combiners.zone import ZoneStore
from hierfl import observe
from hierfl.errors import (
    ConfigError,
    HierFLError,
    InvalidTransition,
    RegionUnreachable,
    ResidencyError,
    StaleEpoch,
    StorageError,
)
from hierfl.failpoints import reach
from hierfl.pki import Kit, RoleName
from hierfl.plan import Plan
from hierfl.receipts import Reason, Receipt
from hierfl.types import AttemptKey, ModelHash, RegionId
from hierfl.wire import hierfl_pb2 as pb

__all__ = ["RegionHost", "RegionSettings"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

SMALL_MODEL_BYTES = 65_536
"""Of frames: such a model goes along with its offer."""


class RegionHost:
    """See the module. Implements ``RegionPort``."""

    def __init__(
        self,
        kit: Kit,
        directory: Path,
        addresses: tuple[str, ...],
        settings: RegionSettings,
        share: Share = in_own_memory,
    ) -> None:
        """
        Args:
            kit: Of a combiner.
            directory: The zone store's.
            addresses: Of the controller, ``host:port``, in order of preference.
            settings: Of this region.
            share: See ``ModelShelf``.
        Raises:
            ConfigError: The kit is not a combiner's.
            StorageError: As ``ZoneStore``.
        """
        if kit.identity.role is not RoleName.COMBINER or kit.ledger is None:
            raise ConfigError("--kit", str(kit.path), f"must be a combiner's kit, it is that of {kit.identity}")
        self.kit, self.settings = kit, settings
        self.name = RegionId(kit.identity.region)
        self.store = ZoneStore(directory, kit.identity.federation, self.name)
        self.region = Region(
            region_epoch=self.store.region_epoch,
            policy=settings.policy,
            released=self.store.released(),
            grace_s=settings.grace_s,
            capacity=settings.capacity,
        )
        self.session = Session(self)
        self.reception = Reception(self)
        self.uplink = Uplink(kit, addresses, self.session)
        self.models = ModelShelf(self.uplink.fetch_model, self.name, self._bases_needed, share)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Ends with the error after which this region cannot go on."""
        self._disk = ThreadPoolExecutor(1, "zone")
        self._kernels = ThreadPoolExecutor(2, "seal")
        self._timers: dict[Timer, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sealing: set[asyncio.Task[None]] = set()
        self._sending: dict[AttemptKey, asyncio.Task[None]] = {}
        self._handed: dict[AttemptKey, dict[str, HandOver]] = {}
        """By incarnation, of each attempt that is frozen."""
        self._waits: dict[AttemptKey, observe.Span] = {}
        self._small_models: dict[ModelHash, tuple[bytes, ...]] = {}
        """Frames of the last bases that go along with their offers."""
        self._settled = asyncio.Event()

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Attach to the controller and watch the intakes."""
        self.spawn(self.uplink.run())
        self.spawn(self.reception.watch())
        self.spawn(self.reception.list_intakes())

    async def drain(self, timeout_s: float) -> None:
        """Seal and send what can be; hand the rest back. Waits for at most ``timeout_s``."""
        self.apply(Drained())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(self._is_busy(attempt.phase) for attempt in self.region.attempts.values()):
                    self._settled.clear()
                    await self._settled.wait()
                await asyncio.gather(*(line.drained() for line in self.reception.lines.values()))

    @staticmethod
    def _is_busy(phase: Phase) -> bool:
        return phase.collects or phase is Phase.UPLINKING

    async def stop(self) -> None:
        """Let go of everything; the store is closed last."""
        for handle in self._timers.values():
            handle.cancel()
        for line in list(self.reception.lines.values()):
            await line.close()
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for span in self._waits.values():
            span.end()
        await self.on_disk(self.store.close)
        self._disk.shutdown()
        self._kernels.shutdown(wait=False)
        if not self.failed.done():
            self.failed.cancel()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``work`` beside everything else; an error of the store, or of ours, ends the region."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._sealing.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        assert error is not None
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            logger.error("the region %s cannot go on: %s", self.name, error, exc_info=error)
            self.failed.set_exception(error)

    async def on_disk(self, function: Callable[..., T], *arguments: Any, **more: Any) -> T:
        """Call the store, from its one thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._disk, lambda: function(*arguments, **more))

    async def apply_between_seals(self, *events: Event) -> None:
        """``apply`` once no seal is being written: its outcome is known before anything ends its attempt."""
        while self._sealing:
            await asyncio.wait(self._sealing)
        self.apply(*events)

    @property
    def is_informed(self) -> bool:
        """Whether the controller has said, since this start, which attempts are open."""
        return self.session.is_informed

    @property
    def is_orphaned(self) -> bool:
        """Whether the controller has been away for long: what is sealed here waits for it."""
        return self.session.is_orphaned

    # ------------------------------------------------------------ decide and carry out

    def apply(self, *events: Event) -> None:
        """Let the state machine take ``events``, and do what it says.

        A report follows when an attempt changes its phase, and else at the heartbeat only: never an event an arrival.
        """
        before = self._phases()
        try:
            instructions = self.region.handle(*events)
        except InvalidTransition as error:
            self._fail(error)  # a bug of ours: a new start begins from what is durable
            raise
        for instruction in instructions:
            self._carry_out(instruction)
        if self._phases() != before:
            self.uplink.progressed()
        self._settled.set()

    def _phases(self) -> dict[AttemptKey, Phase]:
        return {key: attempt.phase for key, attempt in self.region.attempts.items()}

    def _carry_out(self, instruction: Instruction) -> None:  # noqa: PLR0912 - one line a kind of instruction
        match instruction:
            case FetchModel():
                self.spawn(self._fetch(instruction))
            case OpenAtIntakes():
                self._open(instruction)
            case AskAgain():
                self.reception.at_intakes(lambda port: port.ask_again(instruction.key, instruction.clients))
            case CloseAtIntakes():
                self._close(instruction.key, instruction.reason)
            case SetTimer():
                self._set_timer(instruction.timer, instruction.seconds)
            case Freeze():
                self._end_wait(instruction.key)
                self._handed[instruction.key] = {}
                for incarnation in instruction.incarnations:
                    self.spawn(self._freeze(incarnation, instruction.key, instruction.seal_id))
            case Resume():
                self._handed.pop(instruction.key, None)
                self.reception.at_intakes(lambda port: port.resume(instruction.key, instruction.seal_id))
            case VoidIntake():
                logger.error("intake %s handed over what it had not claimed; it is void", instruction.incarnation)
                self.reception.drop(instruction.incarnation)
            case Seal():
                handed = self._handed.pop(instruction.plan.key)
                hand_overs = [handed[incarnation] for incarnation in instruction.entries]
                self._sealing.add(self.spawn(self._seal(instruction, hand_overs)))
            case SendPartial():
                self._send(instruction)
            case StopSending():
                sending = self._sending.pop(instruction.key, None)
                if sending is not None:
                    sending.cancel()
            case Abstain():
                self._end_wait(instruction.key)
                logger.info("%s: this region takes no part: %s", instruction.key, instruction.reason)
                self.spawn(self.session.abstain(instruction.key, instruction.reason))
            case Tell():
                self.spawn(self._tell(instruction.receipts))

    def _send(self, instruction: SendPartial) -> None:
        key = instruction.key
        if key in self._sending:
            return
        task = self._sending[key] = self.spawn(self.session.send(key, instruction.digest))
        task.add_done_callback(lambda task: self._sent(key, task))

    def _sent(self, key: AttemptKey, task: asyncio.Task[None]) -> None:
        if self._sending.get(key) is task:
            del self._sending[key]

    def _open(self, instruction: OpenAtIntakes) -> None:
        offer = pb.Offer.FromString(instruction.offer)
        if instruction.key not in self._waits:
            self._waits[instruction.key] = observe.begin(
                observe.SPAN_CLIENT_WAIT, parent=offer.traceparent, **_attributes(instruction.key), region=self.name
            )
        offer.traceparent = self._waits[instruction.key].traceparent or offer.traceparent
        attempt = self.region.attempts.get(instruction.key)
        model = self._small_models.get(attempt.plan.base.model_hash, ()) if attempt is not None else ()
        opening = Opening(key=instruction.key, offer=offer.SerializeToString(), model=model)
        self.reception.at_intakes(lambda port: port.open(opening))

    def _close(self, key: AttemptKey, reason: Reason) -> None:
        self._end_wait(key)
        self._handed.pop(key, None)
        self.reception.at_intakes(lambda port: port.close(key, reason))

    def _end_wait(self, key: AttemptKey) -> None:
        span = self._waits.pop(key, None)
        if span is not None:
            span.end()

    def _set_timer(self, timer: Timer, seconds: float) -> None:
        known = self._timers.pop(timer, None)
        if known is not None:
            known.cancel()
        self._timers[timer] = asyncio.get_running_loop().call_later(seconds, self._fire, timer)

    def _fire(self, timer: Timer) -> None:
        del self._timers[timer]
        self.apply(TimerFired(timer))

    async def _fetch(self, instruction: FetchModel) -> None:
        base = instruction.plan.base
        try:
            with observe.remote_parent(self._traceparent(instruction.plan.key)):
                model = await self.models.get(base.model_hash, base.layout_hash, base.size_bytes, base.digest)
        except HierFLError as error:
            logger.error("%s: its base model cannot be had: %s", instruction.plan.key, error)
            self.apply(ModelFailed(instruction.plan.key, Reason.STORAGE))
            return
        self._keep_small(model)
        self.apply(ModelReady(instruction.plan.key))

    def _keep_small(self, model: Model) -> None:
        if sum(map(len, model.frames)) <= SMALL_MODEL_BYTES:
            self._small_models[model.model_hash] = tuple(map(bytes, model.frames))
        for old in list(self._small_models)[: -self.settings.capacity]:
            del self._small_models[old]

    def _traceparent(self, key: AttemptKey) -> str:
        attempt = self.region.attempts.get(key)
        return pb.Offer.FromString(attempt.offer).traceparent if attempt is not None else ""

    async def _freeze(self, incarnation: str, key: AttemptKey, seal_id: str) -> None:
        line = self.reception.lines.get(incarnation)
        if line is None:
            return
        try:
            hand_over: HandOver = await line.call(lambda port: port.freeze(key, seal_id))
        except HierFLError:
            return  # the line has said that the intake is lost
        if key in self._handed:
            self._handed[key][incarnation] = hand_over
        self.apply(HandedOver(incarnation=incarnation, key=key, seal_id=seal_id, entries=hand_over.entries))

    async def _seal(self, instruction: Seal, hand_overs: list[HandOver]) -> None:
        """Add up, pass the gate, make durable, tell; a failure is the attempt's, unless the store is not ours."""
        key = instruction.plan.key
        try:
            with (
                observe.remote_parent(self._traceparent(key)),
                observe.span(observe.SPAN_SEAL, **_attributes(key), region=self.name) as span,
            ):
                digest = await self._write_seal(instruction, hand_overs)
                span.set(num_updates=len(instruction.receipts))
        except StaleEpoch:
            raise
        except SumsLost as error:
            logger.warning("%s: goes on collecting: %s", key, error)
            self.reception.lost(error.incarnation)
            self.apply(SumsGone(key, error.incarnation))
            return
        except (HierFLError, StorageError) as error:
            logger.error("%s: the partial could not be sealed: %s", key, error)
            self.apply(SealFailed(key, _reason_of(error)))
            return
        self.reception.deliver(instruction.receipts)
        self.apply(PartialSealed(key, digest))

    async def _write_seal(self, instruction: Seal, hand_overs: list[HandOver]) -> str:
        policy, plan = self.settings.policy, instruction.plan
        reach("region.seal")
        hand_overs = await self._gathered(hand_overs)
        timeout_s, where = self.settings.freeze_s, (policy, self.name, self.store.region_epoch)
        left_over = None
        if can_stream(instruction, hand_overs):
            sealed = await seal_ranges(instruction, hand_overs, *where, timeout_s=timeout_s, in_thread=self._in_thread)
        else:
            hand_overs = [await whole(hand_over, timeout_s) for hand_over in hand_overs]
            carried = await self._carried(plan)
            sealed, left_over = await self._in_thread(lambda: make_sealed(instruction, hand_overs, *where, carried))
        await self.on_disk(
            self.store.write_seal,
            sealed,
            key=plan.key,
            claims=instruction.claims,
            receipts=instruction.receipts,
            sites_needed=policy.sites_needed(plan),
            max_share=policy.max_share,
            updates_root=updates_root(instruction),
            left_over=left_over,
        )
        reach("region.sealed")
        return sealed.digest

    async def _carried(self, plan: Plan) -> Carried | None:
        """What the run's sums left over when they were rounded, once the words that move it have been taken in."""
        if not plan.drop_bits:
            return None
        await self.session.settled(plan.run)
        return await self.on_disk(self.store.residuals.carried, plan)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._kernels, call)

    async def _gathered(self, hand_overs: list[HandOver]) -> list[HandOver]:
        """The sums, here; of many intakes only once these have added them up to a few."""
        few = await merge_in_pairs(hand_overs, self._add_at_an_intake)
        return [
            hand_over
            if hand_over.stored is None
            else replace(hand_over, partial=await hand_over.stored.fetch(), stored=None)
            for hand_over in few
        ]

    async def _add_at_an_intake(self, number: int, hand_overs: Sequence[HandOver]) -> HandOver:
        lines = list(self.reception.lines.values())
        if not lines:
            raise RegionUnreachable("no intake is there to add up what was handed over")
        try:
            return await lines[number % len(lines)].borrow(lambda port: port.add(tuple(hand_overs)))
        except RegionUnreachable as error:
            logger.warning("sums are added elsewhere: %s", error)
            raise

    async def _tell(self, receipts: tuple[Receipt, ...]) -> None:
        try:
            await self.on_disk(self.store.record, receipts)
        except StaleEpoch:
            raise
        except StorageError as error:
            logger.error("%d last words could not be written; their clients will ask: %s", len(receipts), error)
            return
        reach("region.refuse")
        self.reception.deliver(receipts)

    # ------------------------------------------------------------ RegionPort

    async def register(self, name: str, address: str, port: IntakePort) -> Registration:
        return await self.reception.register(name, address, port)

    async def tick(self, incarnation: str, tick: Tick) -> TickReply:
        return await self.reception.tick(incarnation, tick)

    async def clients(self) -> tuple[ClientView, ...]:
        return self.reception.clients()

    def _bases_needed(self) -> set[ModelHash]:
        return {attempt.plan.base.model_hash for attempt in self.region.attempts.values() if attempt.phase.collects}

    async def model(self, model_hash: ModelHash) -> Model | None:
        for attempt in self.region.attempts.values():
            base = attempt.plan.base
            if attempt.phase is Phase.COLLECTING and base.model_hash == model_hash:  # the shelf may have let it go
                return await self.models.get(model_hash, base.layout_hash, base.size_bytes, base.digest)
        return await self.models.find(model_hash)


def _attributes(key: AttemptKey) -> dict[str, str | int]:
    return {"run": key.run, "round": key.round, "attempt": key.attempt, "task": key.task.value}


def _reason_of(error: HierFLError) -> Reason:
    if isinstance(error, StorageError):
        return Reason.STORAGE
    return Reason.POLICY if isinstance(error, ResidencyError) else Reason.INVALID
