"""One client of one site: offers in, updates out, each held on disk until its last word.

Each work is answered by one task, whatever number of attempts and repeated offers it takes: train once,
or find the update held; hand it in; the receipts that follow come on the link.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from hierfl import observe
from hierfl.client.courier import Courier
from hierfl.client.folder import ClientFolder
from hierfl.client.held import Held, Work
from hierfl.client.intakes import Intakes
from hierfl.client.link import Link, checked
from hierfl.client.making import Maker
from hierfl.client.offers import accept, decline_code
from hierfl.client.receiptlog import HELD_TOO_LONG, UNKNOWN_THERE, receipt_of
from hierfl.client.site import Site, round_of
from hierfl.client.work import TaskFailed
from hierfl.errors import (
    HierFLError,
    RoundClosed,
    StaleEpoch,
    StorageError,
    StoreDamaged,
    WireError,
)
from hierfl.failpoints import reach
from hierfl.pki import Kit
from hierfl.plan import Plan
from hierfl.receipts import Reason, Receipt, ReceiptState
from hierfl.types import AttemptKey, RunId
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import transfer
from hierfl.wire.convert import key_from_proto

__all__ = ["Session"]

_FINAL_REASONS = frozenset({Reason.INVALID, Reason.DIGEST_CONFLICT, Reason.RUN_CANCELLED, Reason.RUN_FAILED})
"""Not counted, and no later attempt at the same work can change that."""
_RUN_OVER = frozenset({Reason.RUN_CANCELLED, Reason.RUN_FAILED})

SYNC_AFTER_S = 1.0
"""Last words that come within so long of each other reach the disk together."""


class _Stage(Enum):
    """Of an answer. Only user code at work cannot be called back."""

    WAITING = "waiting"  # for the model, or for its turn
    WORKING = "working"
    HANDING_IN = "handing in"


@dataclass(eq=False)
class _Answer:
    """Work being answered. ``plan`` is of the newest attempt; ``withdrawn`` once that attempt is over."""

    plan: Plan
    stage: _Stage = _Stage.WAITING
    withdrawn: bool = False
    asked_again: bool = False
    """The same offer came once more: what was handed in meanwhile may have been lost."""
    task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """User code begins: it cannot be called back."""
        self.stage = _Stage.WORKING


class Session:
    """See the module. One certificate, one folder, one link."""

    def __init__(self, kit: Kit, site: Site, directory: Path) -> None:
        """Open the client's folder.

        Raises:
            StoreLocked: Another process runs this client from there.
            StorageError, ConfigError: The folder, or the kit, cannot be used.
        """
        self.site = site
        self.client = checked(kit).identity.client_ref
        app = site.policy.app
        self.folder = ClientFolder(directory, self.client)
        intakes = Intakes(kit, self.folder.path / "endpoints", self.say)
        apps = [(app.name, app.version)]
        along = site.takes_models_along
        self.link = Link(kit, apps, intakes, self.say, dialling=site.dialling, takes_models_along=along)
        self.courier = Courier(self.link, self.say)
        self.updates = self.folder.updates
        self._answers: dict[Work, _Answer] = {}
        self._newest_round: dict[RunId, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._maker = Maker(site, self.folder, self.link, self.courier, self.say, self._on_receipt)
        self._syncing: asyncio.Task[None] | None = None
        self._is_asking = False
        """Whether the combiner is being asked what became of what is held."""
        self._drop_expired()
        if len(self.updates):
            self.say(f"{len(self.updates)} update(s) held from before; handed in when asked")

    def say(self, text: str) -> None:
        """One line for the site's administrator."""
        self.site.say(f"{self.client.site}/{self.client.client}: {text}")

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async for event in self.link.events():
                self._on_event(event)
        finally:
            for task in list(self._tasks):
                task.cancel()
            self.folder.close()

    async def stop(self) -> None:
        """Tell the combiner not to wait for what is still being worked on: once, and soon."""
        for answer in list(self._answers.values()):
            if answer.stage is not _Stage.HANDING_IN and not answer.withdrawn and self.link.is_up:
                try:
                    async with asyncio.timeout(1.0):
                        await self.link.decline(answer.plan.key, "stopping")
                except (HierFLError, TimeoutError):
                    return

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start what may wait for the link: nothing that the link's own events wait for does."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ---------------------------------------------------------------- events

    def _on_event(self, event: pb.FollowResponse) -> None:
        for receipt in event.receipts:
            self._on_message("receipt", receipt)
        kind = event.WhichOneof("event")
        if kind is not None:
            self._on_message(kind, getattr(event, kind), event.model)

    def _on_message(self, kind: str, message: Any, model: Sequence[bytes] = ()) -> None:
        try:
            if kind == "welcome":
                self._spawn(self._ask_for_receipts())
            elif kind == "offer":
                self._on_offer(message, model)
            elif kind == "receipt":
                self._on_receipt(self.link.receipt(message))
            elif kind == "withdrawal":
                self._on_withdrawal(key_from_proto(message.key), message.reason)
        except (WireError, StorageError) as error:
            self.say(f"a message of the combiner ({kind}) was not taken up: {error}")

    async def _ask_for_receipts(self) -> None:
        """Last words may have been said while this client was away: asked until it is answered, by one at a time. A
        call can be lost while the stream that began with the welcome lives on.
        """
        if self._is_asking or not self._without_last_word():
            return
        self._is_asking = True
        try:
            what = "what became of the updates held here is not known yet"
            for receipt in await self.courier.patiently(lambda: self.link.receipts(self._without_last_word()), what):
                self._on_receipt(receipt)
        except HierFLError as error:
            self.say(f"{what}: {error}")
        finally:
            self._is_asking = False

    def _without_last_word(self) -> list[AttemptKey]:
        return [held.key for held in self.updates if not held.state.is_last_word]

    def _on_offer(self, offer: pb.Offer, model: Sequence[bytes]) -> None:
        try:
            plan = accept(offer, self.link.kit, self.site.policy, self.folder.leader_epoch, datetime.now(UTC))
            self.folder.raise_epoch(offer.leader_epoch)
        except StaleEpoch as error:
            self.say(f"an offer was left unanswered: {error}")
        except HierFLError as error:
            code = decline_code(error)
            self.say(f"declined an offer ({code}): {error}")
            self._spawn(self._decline(key_from_proto(offer.key), code))
        else:
            self._forget_earlier(plan)
            self.site.models.take(plan, model)
            self._take_up(plan, offer.traceparent)

    def _take_up(self, plan: Plan, traceparent: str) -> None:
        work = Work.of(plan)
        answer = self._answers.get(work)
        if answer is not None and answer.plan.attempt >= plan.attempt and not answer.withdrawn:
            answer.asked_again = True
            return
        if answer is not None and answer.stage is not _Stage.HANDING_IN:
            answer.plan, answer.withdrawn = plan, False  # what is being made answers the new attempt
            return
        if answer is not None:
            self._call_back(work, answer)
        answer = self._answers[work] = _Answer(plan)
        self.link.is_idle.clear()
        answer.task = self._spawn(self._run_answer(work, answer, traceparent))

    def _on_receipt(self, receipt: Receipt) -> None:
        held = self.updates.find_key(receipt.key.attempt)
        state = receipt.state
        if held is None or state is held.state or (receipt.digest and receipt.digest != held.digest):
            return
        if held.state is ReceiptState.SEALED and not state.is_last_word:
            return  # overtaken on its way
        if state.is_last_word:
            reach("client.receipt")
        if words := _words_of(receipt):
            self.say(f"{round_of(held.key)}: {words}")
        if state is ReceiptState.COMMITTED:  # first, so that a crash in between asks for this receipt again
            self.folder.residuals.advance(held.work.run, self.updates.residual(held.work))
        if state.is_last_word:
            self._log(held, state, version=receipt.version, reason=receipt.reason)
        if state is ReceiptState.COMMITTED or receipt.reason in _FINAL_REASONS:
            self.updates.drop(held.work)
        else:
            self.updates.mark(held, state)  # one not counted may yet answer another attempt
        if receipt.reason in _RUN_OVER:
            self.folder.residuals.drop(held.work.run)
        if state.is_last_word:
            self._maker.heard_last_word()
            self.site.on_round_over(self.client, held.key)

    def _log(self, held: Held, state: ReceiptState, *, version: int = 0, reason: str = "") -> None:
        """Note what became of an update, before it is dropped."""
        self.folder.receipts.append(receipt_of(held, state, version=version, reason=reason))
        reach("client.logged")
        if self._syncing is None:
            self._syncing = self._spawn(self._sync_log())

    async def _sync_log(self) -> None:
        await asyncio.sleep(SYNC_AFTER_S)
        self._syncing = None
        try:
            await asyncio.to_thread(self.folder.receipts.sync)
        except StorageError as error:
            self.say(f"the last words on updates are not safe from a crash of this machine: {error}")

    def _on_withdrawal(self, key: AttemptKey, reason: str) -> None:
        for work, answer in list(self._answers.items()):
            if answer.plan.key == key and not answer.withdrawn:
                answer.withdrawn = True
                self.say(f"{round_of(key)}: this attempt is over ({reason or 'closed'})")
                if answer.stage is not _Stage.WORKING:
                    self._call_back(work, answer)

    def _call_back(self, work: Work, answer: _Answer) -> None:
        self._drop_answer(work)
        if answer.task is not None:
            answer.task.cancel()

    def _drop_answer(self, work: Work) -> None:
        del self._answers[work]
        if not self._answers:
            self.link.is_idle.set()

    def _forget_earlier(self, plan: Plan) -> None:
        """The run has moved on: no attempt at an earlier round can come any more."""
        self._drop_expired()
        for held in self.updates:
            earlier = held.work.run == plan.run and held.work.round < plan.round
            if earlier and held.state is ReceiptState.NOT_COUNTED:
                self.updates.drop(held.work)
            elif earlier and held.state is not ReceiptState.SEALED:
                self._spawn(self._ask_what_became_of(held))

    async def _ask_what_became_of(self, held: Held) -> None:
        """Of an earlier round's update: what the region neither sealed nor refused, it never will."""
        try:
            is_unknown = await self._maker.is_unknown(held)
        except HierFLError as error:
            self.say(f"{round_of(held.key)}: what became of its update is not known yet: {error}")
            return
        if is_unknown and self.updates.find(held.work) is not None:
            self.say(
                f"{round_of(held.key)}: the run has moved on, and the region has no receipt of its update; dropped"
            )
            self._log(held, ReceiptState.OFFERED, reason=UNKNOWN_THERE)
            self.updates.drop(held.work)

    def _drop_expired(self) -> None:
        for held in self.updates.drop_expired():
            self.say(f"{round_of(held.key)}: its update was held for {held.hold_s:g} s without a last word; dropped")
            if not held.state.is_last_word:  # else it has its line
                self.folder.receipts.append(receipt_of(held, held.state, reason=HELD_TOO_LONG))

    # ---------------------------------------------------------------- answering

    async def _run_answer(self, work: Work, answer: _Answer, traceparent: str) -> None:
        try:
            with observe.remote_parent(traceparent):
                await self._answer(work, answer)
        except TaskFailed as failed:
            await self._on_failure(answer, failed)
        except StorageError as error:
            await self._on_failure(answer, TaskFailed("storage", str(error)))
        except RoundClosed as error:
            self.say(f"{round_of(answer.plan.key)}: too late for this attempt: {error}")
        except HierFLError as error:
            self.say(f"{round_of(answer.plan.key)}: the update was not taken: {error}")
        except Exception as error:  # noqa: BLE001  a bug of ours must not end the client's other work in silence
            sentence = f"unexpected {type(error).__name__}: {error}"
            await self._on_failure(answer, TaskFailed("train_error", sentence, traceback.format_exc()))
        finally:
            if self._answers.get(work) is answer:
                self._drop_answer(work)

    async def _answer(self, work: Work, answer: _Answer) -> None:
        held, outgoing = await self._find_held(work)
        if held is None or outgoing is None:
            if await self._is_known(answer.plan):
                return
            held, outgoing = await self._maker.make(answer.plan, answer.start)
        answer.stage = _Stage.HANDING_IN
        if answer.withdrawn:
            self.say(f"{round_of(held.key)}: kept, in case the round is tried again")
            return
        if held.attempt != answer.plan.attempt:
            held = self.updates.address(held, answer.plan.attempt)
            self.say(f"{round_of(held.key)}: answered with the update made before")
        answer.asked_again = True
        while answer.asked_again:
            answer.asked_again = False
            self._on_receipt(await self.courier.hand_in(held, outgoing, round_of(held.key)))

    async def _find_held(self, work: Work) -> tuple[Held | None, transfer.Outgoing | None]:
        held = self.updates.find(work)
        if held is None:
            return None, None
        try:
            return held, await asyncio.to_thread(self.updates.outgoing, held)
        except StoreDamaged as error:
            self.say(str(error))
            return None, None

    async def _is_known(self, plan: Plan) -> bool:
        """Whether the combiner has had an update of ours that is no longer here.

        Asked where it could be so: at the first offer of a run in this process, and at a round seen before.
        """
        newest = self._newest_round.get(plan.run, plan.round)
        self._newest_round[plan.run] = max(newest, plan.round)
        if plan.round > newest:
            return False
        known = await self.courier.known(plan.key, round_of(plan.key))
        if known is not None:
            self.say(f"{round_of(plan.key)}: the combiner has this client's update already ({known.state})")
        return known is not None

    # ---------------------------------------------------------------- saying no

    async def _on_failure(self, answer: _Answer, failed: TaskFailed) -> None:
        key = answer.plan.key
        where = self._write_failure(key, failed.details) if failed.details else ""
        self.say(f"{round_of(key)}: declined ({failed.code}): {failed.sentence}{where}")
        if not answer.withdrawn:
            await self._decline(key, failed.code)

    def _write_failure(self, key: AttemptKey, details: str) -> str:
        try:
            return f"; details, which stay here, are in {self.folder.write_failure(key, details)}"
        except StorageError as error:
            return f"; its details are lost: {error}"

    async def _decline(self, key: AttemptKey, code: str) -> None:
        try:
            await self.courier.decline(key, code, round_of(key))
        except HierFLError as error:
            self.say(f"{round_of(key)}: the combiner does not take the refusal: {error}")
        self.site.on_round_over(self.client, key)


def _words_of(receipt: Receipt) -> str:
    """What a receipt says, for people; nothing of one that says nothing new."""
    match receipt.state:
        case ReceiptState.COMMITTED:
            return f"counted in model version {receipt.version}"
        case ReceiptState.NOT_COUNTED:
            return f"not counted ({receipt.reason})"
        case ReceiptState.SEALED:
            waits = "; the controller, which has the last word, is away" if receipt.reason else ""
            return f"sealed in the region's sum{waits}"
        case ReceiptState.STAGED:
            return "handed in"
    return ""
