"""One client of one site: offers in, updates out, each held on disk until its last word.

Every kind of work is answered by one task, whatever number of attempts and repeated offers it takes:
train once (or find the update held), hand in, and wait for the receipt that comes on the link.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from hierfl import documents, observe
from hierfl.client.files import FolderLock, make_folder, write_durably
from hierfl.client.held import Held, HeldUpdates, LocalTensors, Work, encode_update
from hierfl.client.link import Link
from hierfl.client.models import FetchedModel, ModelCache, OwnModels
from hierfl.client.offers import SitePolicy, accept, check_groups, decline_code
from hierfl.client.work import Made, TaskFailed, do_task
from hierfl.client.worker import Worker
from hierfl.errors import (
    DigestMismatch,
    HierFLError,
    IdentityError,
    RoundClosed,
    StaleEpoch,
    StorageError,
    StoreDamaged,
    TransferIncomplete,
    Unreachable,
    WireError,
)
from hierfl.pki import Kit
from hierfl.plan import Plan
from hierfl.receipts import Reason, Receipt, ReceiptState
from hierfl.records import UPDATE_CONTEXT, update_statement
from hierfl.types import AttemptKey, RunId, TaskKind, UpdateKey
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.convert import key_from_proto

__all__ = ["Session", "Site"]

RETRY_PAUSE_S = 0.5
KEEP_FAILURES = 20
"""Files with tracebacks that a client keeps."""

_TRY_AGAIN = (Unreachable, TransferIncomplete, DigestMismatch)
"""What a better moment may mend."""

_FINAL_REASONS = frozenset({Reason.INVALID, Reason.DIGEST_CONFLICT, Reason.RUN_CANCELLED, Reason.RUN_FAILED})
"""Not counted, and no later attempt at the same work can change that."""


@dataclass(frozen=True)
class Site:
    """What the clients of one process share."""

    policy: SitePolicy
    site_config: Mapping[str, str]
    worker: Worker
    say: Callable[[str], None]
    models: ModelCache = field(default_factory=ModelCache)
    own_models: OwnModels = field(default_factory=OwnModels)


@dataclass(eq=False)
class _Answer:
    """Work being answered. ``plan`` is the newest attempt's; ``withdrawn`` once that attempt is over."""

    plan: Plan
    task: asyncio.Task[None] | None = None
    withdrawn: bool = False
    handing_in: bool = False


class Session:
    """See the module. One folder, one certificate, one link."""

    def __init__(self, kit: Kit, site: Site, folder: Path, on_last_word: Callable[[], None] = lambda: None) -> None:
        """Open the client's folder.

        Raises:
            StoreLocked: Another process runs this client from there.
            StorageError, ConfigError: The folder, or the kit, cannot be used.
        """
        self.site = site
        self.client = kit.identity.client_ref
        app = site.policy.app
        self.link = Link(kit, [(app.name, app.version)], self.say)
        self.folder = make_folder(folder / f"{self.client.region}.{self.client.site}.{self.client.client}")
        self._lock = FolderLock(self.folder, str(kit.identity))
        self.updates = HeldUpdates(self.folder)
        self.local = LocalTensors(self.folder)
        self._epoch = _EpochFile(self.folder / "leader_epoch")
        self._answers: dict[str, _Answer] = {}
        self._on_last_word = on_last_word
        for held in self.updates.drop_expired():
            self.say(f"{_round_of(held.key)}: its update was held for {held.hold_s:g} s without a last word; dropped")
        if len(self.updates):
            self.say(f"{len(self.updates)} update(s) held from before; handed in when asked")

    def say(self, text: str) -> None:
        """One line for the site's administrator."""
        self.site.say(f"{self.client.site}/{self.client.client}: {text}")

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async for event in self.link.events():
                await self._on_event(event)
        finally:
            for answer in list(self._answers.values()):
                if answer.task is not None:
                    answer.task.cancel()
            self._lock.close()

    async def stop(self) -> None:
        """Tell the combiner not to wait for what is still being worked on. Best effort, soon."""
        open_keys = [answer.plan.key for answer in self._answers.values() if not answer.handing_in]
        for key in open_keys:
            try:
                async with asyncio.timeout(1.0):
                    await self.link.decline(key, "stopping")
            except (HierFLError, TimeoutError):
                return

    # ---------------------------------------------------------------- events

    async def _on_event(self, event: pb.FollowResponse) -> None:
        kind = event.WhichOneof("event")
        try:
            if kind == "welcome":
                await self._ask_for_receipts()
            elif kind == "offer":
                await self._on_offer(event.offer)
            elif kind == "receipt":
                self._on_receipt(self.link.receipt(event.receipt))
            elif kind == "withdrawal":
                self._on_withdrawal(key_from_proto(event.withdrawal.key), event.withdrawal.reason)
        except (WireError, StorageError) as error:
            self.say(f"a message of the combiner ({kind}) was not taken up: {error}")

    async def _ask_for_receipts(self) -> None:
        """Last words may have been said while this client was away."""
        keys = [held.key for held in self.updates if not held.state.is_last_word]
        if not keys:
            return
        try:
            for receipt in await self.link.receipts(keys):
                self._on_receipt(receipt)
        except _TRY_AGAIN:
            return  # the link is down again; asked once more when it is up

    async def _on_offer(self, offer: pb.Offer) -> None:
        try:
            plan = accept(offer, self.link.kit, self.site.policy, self._epoch.value, datetime.now(UTC))
        except StaleEpoch as error:
            self.say(f"an offer was left unanswered: {error}")
            return
        except (HierFLError, IdentityError) as error:
            await self._refuse(offer, error)
            return
        self._epoch.raise_to(offer.leader_epoch)
        self._forget_earlier(plan)
        work_id = Work.of(plan).id
        answer = self._answers.get(work_id)
        if answer is not None and answer.plan.attempt >= plan.attempt and not answer.withdrawn:
            return  # said twice
        if answer is not None and not answer.handing_in:
            answer.plan, answer.withdrawn = plan, False  # what is being made answers the new attempt
            return
        if answer is not None and answer.task is not None:
            answer.task.cancel()
        self._start(work_id, plan, offer.traceparent)

    def _start(self, work_id: str, plan: Plan, traceparent: str) -> None:
        answer = self._answers[work_id] = _Answer(plan)
        answer.task = asyncio.create_task(self._run_answer(work_id, answer, traceparent))

    async def _refuse(self, offer: pb.Offer, error: HierFLError) -> None:
        code = decline_code(error)
        self.say(f"declined an offer ({code}): {error}")
        await self._decline(key_from_proto(offer.key), code)

    def _on_receipt(self, receipt: Receipt) -> None:
        held = self.updates.find_key(receipt.key.attempt)
        if held is None or (receipt.digest and receipt.digest != held.digest):
            return
        where, state = _round_of(held.key), receipt.state
        if state is held.state:
            return
        if state is ReceiptState.COMMITTED:
            self.updates.drop(held.work)
            self.say(f"{where}: counted in model version {receipt.version}")
        elif state is ReceiptState.NOT_COUNTED and receipt.reason in _FINAL_REASONS:
            self.updates.drop(held.work)
            self.say(f"{where}: not counted ({receipt.reason})")
        else:
            self.updates.mark(held, state)
            if state is ReceiptState.SEALED:
                self.say(f"{where}: sealed in the region's sum")
            elif state is ReceiptState.NOT_COUNTED:
                self.say(f"{where}: not counted ({receipt.reason}); kept in case the round is tried again")
        if state.is_last_word:
            self._on_last_word()

    def _on_withdrawal(self, key: AttemptKey, reason: str) -> None:
        for answer in self._answers.values():
            if answer.plan.key == key and not answer.withdrawn:
                answer.withdrawn = True
                self.say(f"{_round_of(key)}: this attempt is over ({reason or 'closed'})")
                if answer.handing_in and answer.task is not None:
                    answer.task.cancel()

    def _forget_earlier(self, plan: Plan) -> None:
        """The run has moved on: no attempt at an earlier round can come any more."""
        for held in self.updates:
            earlier = held.work.run == plan.run and held.work.round < plan.round
            if earlier and held.state is ReceiptState.NOT_COUNTED:
                self.updates.drop(held.work)

    # ---------------------------------------------------------------- answering

    async def _run_answer(self, work_id: str, answer: _Answer, traceparent: str) -> None:
        try:
            with observe.remote_parent(traceparent):
                await self._answer(answer)
        except TaskFailed as failed:
            await self._on_failure(answer, failed)
        except StorageError as error:
            await self._on_failure(answer, TaskFailed("storage", str(error)))
        except RoundClosed as error:
            self.say(f"{_round_of(answer.plan.key)}: came too late: {error}")
        except HierFLError as error:
            self.say(f"{_round_of(answer.plan.key)}: the update was not taken: {error}")
        except Exception as error:  # noqa: BLE001  a bug of ours must not end the client's other work in silence
            failed = TaskFailed("train_error", f"unexpected {type(error).__name__}: {error}", traceback.format_exc())
            await self._on_failure(answer, failed)
        finally:
            if self._answers.get(work_id) is answer:
                del self._answers[work_id]

    async def _answer(self, answer: _Answer) -> None:
        work = Work.of(answer.plan)
        held = self.updates.find(work)
        if held is None:
            held = await self._make(answer, work)
        answer.handing_in = True
        if answer.withdrawn:
            self.say(f"{_round_of(held.key)}: kept, in case the round is tried again")
            return
        if held.attempt != answer.plan.attempt:
            held = self.updates.address(held, answer.plan.attempt)
            self.say(f"{_round_of(held.key)}: the update made before answers it; nothing is trained again")
        await self._hand_in(held)

    async def _make(self, answer: _Answer, work: Work) -> Held:
        """Fetch, train, hold. Durable when it returns."""
        plan = answer.plan
        model = await self._fetch(plan)
        site = self.site

        def started() -> None:
            self.say(f"{_round_of(plan.key)}: {'training' if plan.task.kind is TaskKind.TRAIN else 'evaluating'}")

        def make() -> tuple[Made, Held]:
            first = site.own_models.local_of(site.policy.app, plan, model.layout)
            local = {**first, **self.local.load(plan.run, plan.round)}
            made = do_task(site.policy.app, plan, model.layout, model.vectors, local, site.site_config, self.client)
            return made, self._hold(plan, work, made, local)

        made, held = await site.worker.run(make, started)
        self.say(f"{_round_of(plan.key)}: {'; '.join(made.said) or 'nothing to evaluate here'}; held on disk")
        return held

    def _hold(self, plan: Plan, work: Work, made: Made, local: Mapping[str, np.ndarray]) -> Held:
        """On the worker's thread: encode, hash, write. Local tensors first: a crash between the two repeats the round."""
        outgoing = encode_update(plan.base.layout_hash, made.vectors, made.head)
        if plan.task.kind is TaskKind.TRAIN:
            self.local.save(plan.run, plan.round, {**local, **made.local})
        held = Held(
            work=work,
            attempt=plan.attempt,
            digest=outgoing.digest,
            layout_hash=plan.base.layout_hash,
            vectors=outgoing.descriptor.vectors,
            head=made.head,
            state=ReceiptState.OFFERED,
            made_unix_ns=time.time_ns(),
            hold_s=plan.hold_s,
        )
        self.updates.save(held, made.vectors)
        return held

    async def _fetch(self, plan: Plan) -> FetchedModel:
        with observe.span(observe.SPAN_MODEL_FETCH, run=plan.run, round=plan.round, site=self.client.site):
            while True:
                try:
                    model = await self.site.models.get(plan, self.link.fetch_model)
                    check_groups(plan, model.layout)
                    return model
                except _TRY_AGAIN as error:
                    self.say(f"{_round_of(plan.key)}: the model did not come: {error}; trying again")
                    await asyncio.sleep(RETRY_PAUSE_S)
                except HierFLError as error:
                    raise TaskFailed(decline_code(error), f"the model cannot be used: {error}") from None

    async def _hand_in(self, held: Held) -> None:
        """Until the combiner has it, or says what became of it. A link that breaks is waited for."""
        outgoing = await asyncio.to_thread(self.updates.outgoing, held)
        key = UpdateKey(held.key, self.client)
        statement = update_statement(key, held.digest, held.head.weight)
        signature = self.link.kit.sign(statement, UPDATE_CONTEXT)
        while True:
            try:
                with observe.span(
                    observe.SPAN_UPLOAD,
                    run=held.work.run,
                    round=held.work.round,
                    site=self.client.site,
                    bytes=outgoing.length_bytes,
                ):
                    receipt = await self._known(held) or await self._send(held, outgoing, signature)
                self._on_receipt(receipt)
                return
            except _TRY_AGAIN as error:
                self.say(f"{_round_of(held.key)}: the update is not with the combiner yet: {error}")
                await asyncio.sleep(RETRY_PAUSE_S)

    async def _known(self, held: Held) -> Receipt | None:
        """What the combiner already has under this key."""
        receipts = await self.link.receipts([held.key])
        return next((r for r in receipts if r.state is not ReceiptState.OFFERED), None)

    async def _send(self, held: Held, outgoing: "transfer.Outgoing", signature: bytes) -> Receipt:
        while True:
            answer = await self.link.admit(held.key, outgoing, held.head.weight, signature)
            kind = answer.WhichOneof("answer")
            if kind == "ticket":
                return await self.link.upload(held.key, outgoing, answer.ticket)
            if kind == "receipt":
                return self.link.receipt(answer.receipt)
            await asyncio.sleep(answer.retry_after_ms / 1000)

    # ---------------------------------------------------------------- saying no

    async def _on_failure(self, answer: _Answer, failed: TaskFailed) -> None:
        where = self._write_failure(answer.plan.key, failed)
        self.say(f"{_round_of(answer.plan.key)}: declined ({failed.code}): {failed.sentence}{where}")
        if not answer.withdrawn:
            await self._decline(answer.plan.key, failed.code)

    def _write_failure(self, key: AttemptKey, failed: TaskFailed) -> str:
        """Keep the traceback at the site; where it is, in words."""
        if not failed.details:
            return ""
        folder = make_folder(self.folder / "failures")
        path = folder / f"{key.run}-{key.task}-{key.round}.{key.attempt}.txt"
        try:
            write_durably(path, (failed.details.encode(),))
        except StorageError as error:
            return f" (and {error})"
        by_age = sorted(folder.glob("*.txt"), key=lambda file: file.stat().st_mtime_ns)
        for old in by_age[:-KEEP_FAILURES]:
            old.unlink(missing_ok=True)
        return f"; details, which stay here, in {path}"

    async def _decline(self, key: AttemptKey, code: str) -> None:
        """A code, never text. A link that is down is waited for; a refusal of the refusal is the end of it."""
        while True:
            try:
                await self.link.decline(key, code)
                return
            except _TRY_AGAIN:
                await asyncio.sleep(RETRY_PAUSE_S)
            except HierFLError:
                return


class _EpochFile:
    """The highest leader epoch that this client has obeyed; it outlasts restarts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.value = int(path.read_text()) if path.exists() else 0
        except ValueError:
            raise StoreDamaged(f"{path} does not hold a number; remove it") from None

    def raise_to(self, epoch: int) -> None:
        if epoch > self.value:
            write_durably(self._path, (str(epoch).encode(),))
            self.value = epoch


def _round_of(key: AttemptKey) -> str:
    """A key for people: ``round 3``, ``round 3, attempt 2``, ``evaluation``."""
    what = f"round {key.round}" if key.task is TaskKind.TRAIN else "evaluation"
    return f"{what}, attempt {key.attempt}" if key.attempt > 1 else what
