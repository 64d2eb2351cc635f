"""An intake without its sockets: offers out, updates in, claims and hand-overs with the Region.

Staged updates, accumulators and the incarnation go together: when the Region holds the incarnation void,
all of it is dropped and every client is sent away to come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from combiners.admission import Admitted, Line
from combiners.checks import check_announced
from combiners.delivery import Delivery
from combiners.door import Door
from combiners.folding import Folding
from combiners.followers import Followers, Session
from combiners.link import RegionLink
from combiners.merging import added
from combiners.messages import (
    Answer,
    Claim,
    ClaimAnswer,
    HandOver,
    Model,
    Opening,
    Outcome,
    RegionPort,
    Registration,
    Report,
    serves,
)
from combiners.placing import MakeShard, Placing
from combiners.settings import IntakeSettings
from combiners.sharding import held, room
from hierfl import documents, observe
from hierfl.endpoints import EndpointList
from hierfl.errors import (
    DigestMismatch,
    Interrupted,
    RoundClosed,
    TransferIncomplete,
    ValueOutOfRange,
    WireError,
)
from hierfl.failpoints import reach
from hierfl.plan import Plan
from hierfl.receipts import Reason, Receipt, ReceiptState
from hierfl.types import AttemptKey, ClientRef, ModelHash, UpdateKey
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.convert import key_to_proto
from hierfl.wire.resume import Unfinished
from hierfl.wire.transfer import Incoming

__all__ = ["Desk"]

RETRY_S = 0.5
"""A claim that has to wait for a seal is made again after so long, if nothing was heard."""
RETRY_AFTER_MS = 500


class Desk:
    """See the module. Implements ``IntakePort``."""

    def __init__(
        self, name: str, region: RegionPort, settings: IntakeSettings, make_shard: MakeShard | None = None
    ) -> None:
        self.name, self.settings = name, settings
        self._region = region
        self.link = RegionLink(
            region,
            on_registered=self._registered,
            on_void=self._void,
            on_answer=self._answered,
            traffic=lambda: (self.bytes_in, self.bytes_out),
            is_last=self._is_last,
        )
        self._pool = ThreadPoolExecutor(thread_name_prefix="fold")
        self._placing = Placing(
            self._pool,
            make_shard,
            self.link.begin_anew,
            memory_bytes=settings.memory_bytes,
            actors=settings.actors,
            shards=settings.shards,
        )
        staging_bytes = self._placing.staging_bytes(())
        self.line = Line(
            max_uploads=settings.max_uploads,
            max_bytes=staging_bytes,
            max_waiting=settings.max_following,
            ticket_s=settings.ticket_s,
        )
        self.unfinished: Unfinished[UpdateKey] = Unfinished(settings.resume_s, staging_bytes)
        self.followers = Followers(self.link.connection)
        self.door = Door(
            self.followers,
            self._is_idle,
            max_following=settings.max_following,
            least_turn_s=settings.least_turn_s,
            away_grace_s=settings.away_grace_s,
        )
        self._delivery = Delivery(self.followers)
        self.endpoints = pb.Endpoints()
        """The region's list, as this intake was last told; kept when the incarnation ends."""
        self.endpoints_age = (0, 0)
        self.attempts: dict[AttemptKey, Folding] = {}
        self.bytes_in = self.bytes_out = 0
        self.is_stopping = False
        self._is_registered = asyncio.Event()
        self._claiming: dict[UpdateKey, Claim] = {}
        self._models: dict[ModelHash, asyncio.Task[Model | None]] = {}

    async def run(self, address: str) -> None:
        """Serve the Region, for as long as this intake lives."""
        await self.link.run(self.name, address, self)

    def stop_admitting(self) -> None:
        """Take no more updates: what asks from now on is sent away."""
        self.is_stopping = True
        self.unfinished.close()
        self.line.clear()

    def shut(self) -> None:
        """The end: everyone is sent away."""
        self.stop_admitting()
        self._delivery.clear()
        self.followers.end_all()
        self._pool.shutdown(wait=False)

    # ------------------------------------------------------------ the incarnation

    def _registered(self, registration: Registration) -> None:
        self.bytes_in = self.bytes_out = 0
        for opening in registration.openings:
            self._open(opening)
        if registration.endpoints:
            self._list(registration.endpoints)
        self._is_registered.set()

    def _void(self) -> None:
        self._is_registered.clear()
        for attempt in self.attempts.values():
            attempt.close()
        self.attempts.clear()
        self._placing.void()
        self._make_room_for_uploads()
        self.unfinished.drop(lambda _: True)
        self.line.clear()
        self._delivery.clear()
        self.followers.end_all()

    def _answered(self, answer: ClaimAnswer) -> ClaimAnswer:
        """Note what is granted at once: a freeze that comes next has to wait for its fold."""
        if answer.answer is not Answer.GRANTED:
            return answer
        attempt = self.attempts.get(answer.key.attempt)
        claim = self._claiming.get(answer.key)
        if attempt is None or claim is None or not attempt.grant(claim):
            self.link.report(Report(key=answer.key, outcome=Outcome.LET_GO))
            return ClaimAnswer(key=answer.key, answer=Answer.LATER)
        return answer

    def _is_last(self, claim: Claim) -> bool:
        """Whether all who follow and are to answer this attempt have claimed: no other claim of it will come soon."""
        attempt = self.attempts.get(claim.key.attempt)
        if attempt is None:
            return False
        claiming = sum(key.attempt == claim.key.attempt for key in self._claiming)
        return claiming + len(attempt.folding) + len(attempt.folded) >= self.followers.num_serving(attempt.plan)

    # ------------------------------------------------------------ IntakePort

    async def open(self, opening: Opening) -> None:
        self._open(opening)

    def _open(self, opening: Opening) -> None:
        known = self.attempts.get(opening.key)
        if known is not None:
            known.opening = opening  # a new leader signed it anew
            return
        plan = Plan.from_bytes(pb.Offer.FromString(opening.offer).plan)
        attempt = self.attempts[opening.key] = Folding(opening, plan, self._placing.place(plan))
        self._make_room_for_uploads()
        if opening.model and plan.base.model_hash not in self._models:
            model = Model(model_hash=plan.base.model_hash, frames=opening.model)
            self._keep_model(model.model_hash, asyncio.create_task(_here(model)))
        offer, with_model = _offer(opening), _offer(opening, with_model=True)
        for session in self.followers.serving(attempt.plan):
            session.since_s = attempt.opened_s
            session.send(with_model if session.takes_models else offer)

    def _make_room_for_uploads(self) -> None:
        """As much as is left beside the attempts that are open now."""
        num_bytes = self._placing.staging_bytes(attempt.plan for attempt in self.attempts.values())
        self.line.resize(num_bytes)
        self.unfinished.max_bytes = num_bytes

    async def list_endpoints(self, endpoints: bytes) -> None:
        self._list(endpoints)
        for session in list(self.followers):
            session.send(pb.FollowResponse(endpoints=self.endpoints))

    def _list(self, endpoints: bytes) -> None:
        self.endpoints = pb.Endpoints.FromString(endpoints)
        self.endpoints_age = documents.decode(self.endpoints.document, EndpointList, "endpoint list").age

    async def ask_again(self, key: AttemptKey, clients: tuple[ClientRef, ...]) -> None:
        attempt = self.attempts.get(key)
        if attempt is not None:
            for client in clients:
                attempt.answered.discard(client)
                self.followers.send(client, _offer(attempt.opening))

    async def freeze(self, key: AttemptKey, seal_id: str) -> HandOver:
        attempt = self.attempts.get(key)
        if attempt is None:
            return HandOver(incarnation=self.link.incarnation, key=key, seal_id=seal_id)
        await self.link.settled()
        hand_over = await attempt.hand_over(self.link.incarnation, seal_id)
        reach("intake.hand_over")
        return hand_over

    async def add(self, hand_overs: tuple[HandOver, ...]) -> HandOver:
        """For the Region, where many intakes hand over; they need not be this one's."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, added, hand_overs)

    async def resume(self, key: AttemptKey, seal_id: str) -> None:
        attempt = self.attempts.get(key)
        if attempt is not None:
            attempt.resume()

    async def close(self, key: AttemptKey, reason: str) -> None:
        attempt = self.attempts.pop(key, None)
        if attempt is None:
            return
        attempt.close()
        self._make_room_for_uploads()
        self._delivery.attempt_over(attempt)
        self.unfinished.drop(lambda update: update.attempt == key)
        withdrawal = pb.FollowResponse(withdrawal=pb.Withdrawal(key=key_to_proto(key), reason=reason))
        for session in self.followers.serving(attempt.plan):
            if session.client not in attempt.folded:
                session.send(withdrawal)
        self.door.attempt_over()

    async def deliver(self, receipts: tuple[Receipt, ...]) -> None:
        self._delivery.deliver(receipts)

    def complete(self, session: Session, event: pb.FollowResponse) -> pb.FollowResponse | None:
        """An event that is about to be sent, and what waits to go along; none where that makes nothing."""
        self.bytes_out += sum(map(len, event.model))
        return self._delivery.complete(session, event)

    # ------------------------------------------------------------ for the service

    async def incarnation(self) -> str:
        """The current one; waits for the Region to give it."""
        self._require_running()
        await self._is_registered.wait()
        return self.link.incarnation

    def _is_idle(self, session: Session) -> bool:
        """Whether every open attempt that the client serves has its answer."""
        return all(
            session.client in attempt.answered
            for attempt in self.attempts.values()
            if serves(session.apps, attempt.plan)
        )

    def answered(self, key: UpdateKey) -> None:
        """The client has its receipt, or has said no: nothing is left for it to do in this attempt."""
        attempt = self.attempts.get(key.attempt)
        if attempt is None or key.client in attempt.answered:
            return
        attempt.answered.add(key.client)
        self.door.answered(key.client)

    def offers(self, serving: Callable[[Plan], bool]) -> list[pb.FollowResponse]:
        """The open offers that a client which serves these gets at once."""
        return [_offer(attempt.opening) for attempt in self.attempts.values() if serving(attempt.plan)]

    async def admit(self, claim: Claim, length_bytes: int) -> bytes | Receipt | int:
        """A ticket, what is known of the update already, or the milliseconds after which to ask again.

        Raises:
            RoundClosed: Its attempt is not open in this region.
            ValueOutOfRange, LayoutMismatch: What it announces does not fit the plan.
        """
        found = await self._look(claim, length_bytes)
        return await self.line.enter(Admitted(claim=claim, length_bytes=length_bytes)) if found is None else found

    async def take_whole(self, claim: Claim, length_bytes: int, frames: Sequence[bytes]) -> Receipt | int:
        """Hand in an update whose frames came with the request: it waits in line, and needs no ticket.

        Raises:
            RoundClosed, WireError: As ``admit`` and ``hand_in``.
        """
        found = await self._look(claim, length_bytes)
        if found is not None:
            return found
        async with self.line.inside(Admitted(claim=claim, length_bytes=length_bytes)):
            incoming = self.incoming(claim)
            with held(incoming):
                await room(incoming)
                try:
                    for frame in frames:
                        self.bytes_in += len(frame)
                        incoming.feed(frame)
                    incoming.close()
                except WireError as error:
                    self.refused(claim.key, error)
                    raise
                return await self.hand_in(claim, incoming)

    async def _look(self, claim: Claim, length_bytes: int) -> Receipt | int | None:
        """What is known of an update, or when to come back; none for one to be let in."""
        self._require_running()
        attempt = self.attempts.get(claim.key.attempt)
        if attempt is None:
            return await self._ask_instead(claim)
        known = attempt.folded.get(claim.key.client)
        if known is not None:
            return self._staged(known, claim)
        try:
            check_announced(attempt.plan, claim.weight, length_bytes)
        except WireError as error:
            self.refused(claim.key, error)
            raise
        admitted = Admitted(claim=claim, length_bytes=length_bytes)
        if self.line.is_full and not self.line.has_place(admitted):
            return RETRY_AFTER_MS
        return None

    async def _ask_instead(self, claim: Claim) -> Receipt | int:
        told = await self.link.ask(claim.key)
        if told.answer is Answer.LATER:
            return RETRY_AFTER_MS
        answer = told if told.receipt is not None else await self.link.claim(claim)
        return RETRY_AFTER_MS if answer.answer is Answer.LATER else self._receipt_of(answer, claim)

    def incoming(self, claim: Claim) -> Incoming:
        """What receives an update of an open attempt. Raises ``RoundClosed`` for any other."""
        return self._attempt(claim.key.attempt).sums.incoming(claim.digest)

    def _attempt(self, key: AttemptKey) -> Folding:
        attempt = self.attempts.get(key)
        if attempt is None:
            raise RoundClosed(_closed(key))
        return attempt

    async def hand_in(self, claim: Claim, incoming: Incoming) -> Receipt:
        """Check a received update, claim it, fold it; the receipt is STAGED, or what was known before.

        Raises:
            RoundClosed: Its attempt has closed meanwhile.
            WireError: It is refused; the Region waits for this client no more.
        """
        key = claim.key.attempt
        sums = self._attempt(key).sums
        reach("intake.stage")
        try:
            with observe.span(observe.SPAN_CHECK, run=key.run, round=key.round, attempt=key.attempt):
                head = await sums.check(incoming, claim.weight)
        except WireError as error:
            self.refused(claim.key, error)
            raise
        return await self._claim_and_fold(claim, incoming, head.metrics)

    def refused(self, key: UpdateKey, error: WireError) -> None:
        """Tell the Region of bytes that will not get better; a transfer that broke may come again."""
        if not isinstance(error, TransferIncomplete | DigestMismatch):
            self.link.report(Report(key=key, outcome=Outcome.INVALID))

    async def _claim_and_fold(self, claim: Claim, incoming: Incoming, metrics: Mapping[str, int]) -> Receipt:
        claim = replace(claim, metrics=frozenset(metrics))
        while (attempt := self.attempts.get(claim.key.attempt)) is not None:
            async with attempt.lock_of(claim.key.client):
                known = attempt.folded.get(claim.key.client)
                if known is not None:
                    return self._staged(known, claim)
                answer = await self._claim(claim)
                if answer.answer is Answer.GRANTED:
                    return await self._fold(attempt, claim, incoming, metrics)
            if answer.answer is not Answer.LATER:
                return self._receipt_of(answer, claim)
            await attempt.change(RETRY_S)
        return self._receipt_of(await self.link.claim(claim), claim)

    async def _claim(self, claim: Claim) -> ClaimAnswer:
        reach("intake.claim")
        self._claiming[claim.key] = claim
        try:
            return await self.link.claim(claim)
        finally:
            del self._claiming[claim.key]

    async def _fold(self, attempt: Folding, claim: Claim, incoming: Incoming, metrics: Mapping[str, int]) -> Receipt:
        outcome = Outcome.LET_GO
        try:
            reach("intake.fold")
            await attempt.fold(claim, incoming, metrics)
            outcome = Outcome.FOLDED
            reach("intake.folded")
        finally:
            self.link.report(Report(key=claim.key, outcome=outcome))
        return _staged_receipt(claim)

    def _staged(self, known: Claim, claim: Claim) -> Receipt:
        return _staged_receipt(claim) if known.digest == claim.digest else _conflict(claim)

    def _receipt_of(self, answer: ClaimAnswer, claim: Claim) -> Receipt:
        """The receipt of an answer that is not "granted", or the error that it is."""
        if answer.receipt is not None:
            return answer.receipt if answer.receipt.digest == claim.digest else _conflict(claim)
        if answer.reason is Reason.DIGEST_CONFLICT:
            return _conflict(claim)
        if answer.reason is Reason.INVALID:
            raise ValueOutOfRange("the update's weight is out of the plan's range")
        raise RoundClosed(_closed(claim.key.attempt))

    async def receipts(self, client: ClientRef, keys: list[AttemptKey]) -> list[Receipt]:
        """What is known of a client's updates under ``keys``; OFFERED (on the wire: unknown) where nothing is."""
        told = await asyncio.gather(*(self.link.ask(UpdateKey(key, client)) for key in keys))
        return [answer.receipt or Receipt(key=answer.key, digest="", state=ReceiptState.OFFERED) for answer in told]

    def decline(self, key: UpdateKey) -> None:
        self.link.report(Report(key=key, outcome=Outcome.DECLINED))
        self.answered(key)

    async def model(self, model_hash: ModelHash) -> Model | None:
        """A model from the Region, asked for once however many clients want it; kept while an open attempt needs it,
        or until another is asked for.
        """
        task = self._models.pop(model_hash, None)
        if task is None or (task.done() and (task.exception() is not None or task.result() is None)):
            task = asyncio.create_task(self._region.model(model_hash))
        self._keep_model(model_hash, task)
        return await asyncio.shield(task)

    def _keep_model(self, model_hash: ModelHash, task: asyncio.Task[Model | None]) -> None:
        self._models[model_hash] = task
        needed = {attempt.plan.base.model_hash for attempt in self.attempts.values()}
        for old in list(self._models)[:-1]:
            if old not in needed:
                del self._models[old]

    def _require_running(self) -> None:
        if self.is_stopping:
            raise Interrupted("this combiner is stopping; connect again in a while")


def _offer(opening: Opening, *, with_model: bool = False) -> pb.FollowResponse:
    return pb.FollowResponse(offer=pb.Offer.FromString(opening.offer), model=opening.model if with_model else ())


async def _here(model: Model) -> Model | None:
    """A model that came with its attempt: nobody has to be asked for it."""
    return model


def _staged_receipt(claim: Claim) -> Receipt:
    return Receipt(key=claim.key, digest=claim.digest, state=ReceiptState.STAGED)


def _closed(key: AttemptKey) -> str:
    return f"attempt {key.attempt} at round {key.round} of run {key.run} is not open in this region; wait for an offer"


def _conflict(claim: Claim) -> Receipt:
    """Another update was handed in under this key before: that one's receipt stands, this one is not counted."""
    return Receipt(key=claim.key, digest=claim.digest, state=ReceiptState.NOT_COUNTED, reason=Reason.DIGEST_CONFLICT)
