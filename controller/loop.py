"""One run: look, decide, carry out, until the run ends. The only place that changes the state of a run.

Decisions are made by ``hierfl/rounds.py`` and ``hierfl/runs.py``; what they ask for is carried out here, the store
first, then what regions and operators are told. Between two steps the loop waits for an event, or for the moment
at which time alone changes what a decision sees.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from controller import committing, messages, planning
from controller.bell import Bell
from controller.collection import Collection, region_view
from controller.commits import SignedRecord
from controller.merge import NextModel, merge_partials, next_model
from controller.rows import AnswerRow, AttemptRow, RoundRow, Row, RunRow
from hierfl import observe
from hierfl.aggregation import PartialAggregate
from hierfl.errors import (
    HierFLError,
    InvalidTransition,
    NotTheLeader,
    RoundClosed,
    StorageError,
    StoreDamaged,
    StoreUnreachable,
)
from hierfl.failpoints import reach
from hierfl.receipts import Reason
from hierfl.rounds import (
    Abandon,
    AttemptWithdrawn,
    Close,
    CollectionClosed,
    PartialAccepted,
    QuorumUnreachable,
    RegionAbstained,
    RegionView,
    RoundEvent,
    RoundState,
    Wait,
    decide_attempt,
)
from hierfl.runs import (
    Finish,
    OpenAttempt,
    Pause,
    RunCancelled,
    RunFailed,
    RunFinished,
    RunPaused,
    RunResumed,
    RunStarted,
    RunState,
    decide_run,
    retry_delay_s,
)
from hierfl.types import AttemptKey, RegionId, TaskKind
from hierfl.wire import hierfl_pb2 as pb

if TYPE_CHECKING:
    from controller.leader import Leader

__all__ = ["RunLoop"]

logger = logging.getLogger(__name__)


class RunLoop:
    """One run, from its row in the store to its end."""

    def __init__(self, leader: Leader, row: RunRow) -> None:
        self.row = row
        self.open: Collection | None = None
        self.told = {(told.task, told.round): told for told in leader.store.rounds(row.run)}
        """Committed rounds, in order."""
        self.waiting_for = ""
        """In words, what the next step waits for."""
        self._leader = leader
        self._wish: RunCancelled | RunResumed | None = None
        self._retry_at = 0.0
        self.bell = Bell(leader.clock)

    # -------------------------------------------------------------- what others may do

    async def ask(self, event: RunCancelled | RunResumed) -> None:
        """Hand in an operator's wish; returns when it has been carried out, or has become void."""
        self._wish = event
        changed = self.bell.follow()
        self.bell.ring()
        try:
            while self._wish is event and not self.row.state.is_terminal:
                changed.clear()
                await changed.wait()
        finally:
            self.bell.unfollow(changed)

    def collecting(self, key: AttemptKey, region: RegionId) -> Collection:
        """The open attempt of this key, if ``region`` may still answer it.

        Raises:
            RoundClosed: It is closed, was never offered, or the region has abstained.
        """
        if self.open is None or self.open.row.key != key or not self.open.offer_again_to(region):
            raise RoundClosed(f"{key} takes no partial aggregate of {region}: closed, or never offered to it")
        return self.open

    def answer(self, collection: Collection, answer: AnswerRow) -> None:
        """Make a region's answer durable, then count with it.

        Raises:
            RoundClosed: The attempt closed in the meantime.
            DigestMismatch: The region has answered, with another partial.
        """
        self.collecting(collection.row.key, answer.region)
        earlier = collection.answers.get(answer.region)
        if earlier is not None:
            earlier.require_same(answer)
            return
        if answer.digest:
            event: RoundEvent = PartialAccepted(region=answer.region, digest=answer.digest)
        else:
            event = RegionAbstained(region=answer.region, code=answer.code)
        row = collection.row.after(event)
        self._write(answer)
        collection.row = row
        collection.answers[answer.region] = answer
        self.bell.ring()

    def partials_of(self, region: RegionId) -> dict[str, AttemptKey]:
        """Digests of a region's partials that are held for the round that comes next, with the attempt of each."""
        if self.row.state.is_terminal:
            return {}
        answers = [answer for attempt in self._attempts() for answer in self._leader.store.answers(attempt.key)]
        return {answer.digest: answer.key for answer in answers if answer.region == region and answer.digest}

    def recover(self) -> None:
        """Take up what an earlier controller left: its open attempt, and a version that it could only just record.

        Raises:
            StorageError: Store, blobs and commit records contradict each other.
        """
        attempts = self._attempts()
        if attempts and not attempts[-1].state.is_terminal:
            self.open = self._collection(attempts[-1], self._leader.store.answers(attempts[-1].key))
        self._adopt()

    def _adopt(self) -> None:
        """A version that is on record is committed, whoever recorded it and whatever came between.

        Raises:
            StorageError: As ``recover``.
        """
        found = self._leader.commits.find(self.row.run, self.row.version + 1)
        if found is None:
            return
        if self.open is None or self.open.row.attempt != found.read().attempt:
            raise StoreDamaged(
                f"run {self.row.run}: version {self.row.version + 1} is on record, its attempt is not open"
            )
        logger.warning("run %s: version %d was on record, adopted", self.row.run, self.row.version + 1)
        self._commit_model(self.open, list(self.open.answers.values()), found)
        self._announce(self.open.row.key)
        self._over(self.open, outcome="committed")

    # -------------------------------------------------------------- the loop

    async def run(self) -> None:
        """Step until the run has ended. What a store or disk refuses pauses the run, if even that can be stored."""
        while not self.row.state.is_terminal:
            self.bell.hush()
            try:
                wake_at = await self._step()
            except (NotTheLeader, InvalidTransition, StoreUnreachable):  # whoever leads next takes it up as it is
                raise
            except StorageError as error:
                if self.row.state is not RunState.RUNNING:
                    raise
                logger.exception("run %s cannot use its storage", self.row.run)
                wake_at = self.pause(str(error))
            except HierFLError as error:
                logger.exception("run %s failed", self.row.run)
                wake_at = None
                self._end(RunFailed(reason=str(error)))
            self.bell.tell()
            if wake_at is not None:
                await self.bell.sleep_until(wake_at)

    async def _step(self) -> float | None:
        """One step; returns until when to wait for an event, None to go on at once."""
        if self._wish is not None:
            self._grant(self._wish)
            return None
        if self.row.state is RunState.SUBMITTED:
            self._move(self.row.after(RunStarted()))
        if self.row.state is not RunState.RUNNING:
            return float("inf")
        return await (self._step_run() if self.open is None else self._step_attempt(self.open))

    async def _step_attempt(self, open_: Collection) -> float | None:
        if open_.row.state is RoundState.MERGING:
            await self._merge(open_)
            return None
        now = self._leader.clock()
        decision = decide_attempt(open_.view(self._leader.registry, now))
        match decision:
            case Wait():
                self.waiting_for = decision.waiting_for
                return open_.next_change(self._leader.registry, now)
            case Close():
                self._close(open_, decision)
            case Abandon():
                self._abandon(open_, decision.reason)
        return None

    async def _step_run(self) -> float | None:
        now = self._leader.clock()
        due = now >= self._retry_at
        decision = decide_run(planning.run_view(self.row, len(self._attempts()), self.regions(), retry_due=due))
        match decision:
            case Wait():
                self.waiting_for = decision.waiting_for
                return self._next_change(now)
            case OpenAttempt():
                self._open(decision)
            case Pause():
                self.pause(decision.reason)
            case Finish():
                self._end(RunFinished(reason=decision.reason))
        return None

    def regions(self) -> tuple[RegionView, ...]:
        """The run's regions between two attempts."""
        silence_s = self.row.job.round.silence_s
        return tuple(region_view(self._leader.registry, region, silence_s) for region in self.row.regions)

    def _next_change(self, now: float) -> float:
        if now < self._retry_at:
            return self._retry_at
        registry, silence_s = self._leader.registry, self.row.job.round.silence_s
        changes = [registry.live_until(view.region, silence_s) for view in self.regions() if view.presence.is_live]
        return min(changes, default=float("inf"))

    # -------------------------------------------------------------- carrying out: rounds

    def _open(self, wish: OpenAttempt) -> None:
        """Store the attempt, then offer it. Partials of an earlier attempt at the same task count on."""
        leader = self._leader
        row = planning.new_attempt(self.row, wish, now_unix_ns=time.time_ns())
        answers = self._carried_over(row)
        open_ = self._collection(row, answers)
        with observe.under(open_.span), observe.span(observe.SPAN_PLAN, num_regions=len(open_.plans)):
            self._write(row, *answers)
            self.open = open_
            reach("controller.open")
            for region in open_.plans:
                leader.offer(open_, region)

    def _carried_over(self, row: AttemptRow) -> list[AnswerRow]:
        """A region releases one partial for one base and task: what it sent for an earlier attempt is its answer."""
        earlier: dict[RegionId, AnswerRow] = {}
        for attempt in self._attempts():
            if (attempt.base_hash, attempt.spec) == (row.base_hash, row.spec):
                partials = [answer for answer in self._leader.store.answers(attempt.key) if answer.digest]
                earlier.update({answer.region: replace(answer, attempt=row.attempt) for answer in partials})
        return list(earlier.values())

    def _close(self, open_: Collection, decision: Close) -> None:
        row = open_.row.after(CollectionClosed(regions=decision.regions))
        self._write(row)
        open_.row = row

    def _abandon(self, open_: Collection, reason: str) -> None:
        row, run = open_.row.after(QuorumUnreachable(reason=reason)), self.row
        if row.task is TaskKind.TRAIN:
            run = replace(run, rounds_abandoned=run.rounds_abandoned + 1, abandoned_in_a_row=run.abandoned_in_a_row + 1)
        run = replace(run, last_reason=reason)
        self._write(row, run)
        logger.warning("%s abandoned: %s", row.key, reason)
        self.row = run
        self._retry_at = self._leader.clock() + retry_delay_s(run.abandoned_in_a_row, run.job.round.silence_s)
        self._send_all(messages.withdrawal(row.key, Reason.ATTEMPT_ABANDONED))
        self._over(open_, outcome="abandoned")

    async def _merge(self, open_: Collection) -> None:
        """Sum, apply, commit, tell."""
        leader, answers = self._leader, open_.counted()
        reach("controller.merge")
        with observe.under(open_.span):
            with observe.span(observe.SPAN_MERGE, num_partials=len(answers)):
                total = await asyncio.to_thread(merge_partials, leader.blobs, open_.row, answers, open_.sum)
                train = open_.row.task is TaskKind.TRAIN
                made = await asyncio.to_thread(next_model, leader.blobs, self.row, total) if train else None
            with observe.span(observe.SPAN_COMMIT, num_sites=total.num_sites):
                if made is not None:
                    self._commit_model(open_, answers, await self._record(open_, answers, total, made))
                else:
                    self._commit_metrics(open_, answers, total)
            reach("controller.announce")
            with observe.span(observe.SPAN_ANNOUNCE, num_regions=len(open_.plans)):
                self._announce(open_.row.key)
        self._over(open_, outcome="committed")

    async def _record(
        self, open_: Collection, answers: Sequence[AnswerRow], total: PartialAggregate, made: NextModel
    ) -> SignedRecord:
        """Create the commit record; the one that stands is returned."""
        leader = self._leader
        reach("controller.record")
        record = committing.commit_record(
            self.row,
            open_.row,
            answers,
            total,
            made,
            federation=leader.federation,
            leader_epoch=leader.epoch,
            now_unix_ns=time.time_ns(),
        )
        signed = await asyncio.to_thread(leader.commits.create, self.row.run, record.version, leader.signed(record))
        reach("controller.recorded")
        return signed

    def _commit_model(self, open_: Collection, answers: Sequence[AnswerRow], signed: SignedRecord) -> None:
        seconds = self._leader.clock() - open_.opened_at
        self._committed(open_, *committing.rows_of_commit(self.row, open_.row, answers, signed, seconds=seconds))

    def _commit_metrics(self, open_: Collection, answers: Sequence[AnswerRow], total: PartialAggregate) -> None:
        seconds, now = self._leader.clock() - open_.opened_at, time.time_ns()
        rows = committing.rows_of_evaluation(self.row, open_.row, answers, total, seconds=seconds, now=now)
        self._committed(open_, *rows)

    def _committed(self, open_: Collection, run: RunRow, attempt: AttemptRow, rows: tuple[Row, ...]) -> None:
        """One transaction; only after it does anybody hear of the new version."""
        self._write(*rows)
        self.row, open_.row = run, attempt
        self.told.update({(row.task, row.round): row for row in rows if isinstance(row, RoundRow)})

    # -------------------------------------------------------------- carrying out: the run

    def pause(self, reason: str) -> float:
        """Wait for an operator, who is told why."""
        self._move(self.row.after(RunPaused(reason=reason)))
        return float("inf")

    def _grant(self, wish: RunCancelled | RunResumed) -> None:
        if isinstance(wish, RunCancelled):
            self._end(wish)
        elif self.row.state is RunState.PAUSED:
            self._move(replace(self.row.after(wish), abandoned_in_a_row=0))
            if self.open is not None:
                self.open.opened_at = self._leader.clock()  # the pause took none of its time
        self._wish = None

    def _end(self, event: RunFinished | RunCancelled | RunFailed) -> None:
        """End the run; regions that hold something for it get the last word on it."""
        if self.open is not None:
            self._adopt()
        run, open_ = self.row.after(event, now_unix_ns=time.time_ns()), self.open
        reason = messages.REASON_OF_END[run.state]
        last = next(reversed(self._attempts()), None)
        withdrawn = [] if open_ is None else [open_.row.after(AttemptWithdrawn(reason=reason))]
        self._write(run, *withdrawn)
        self.row = run
        reach("controller.ended")
        self._leader.run_ended()
        if open_ is not None:
            self._send_all(messages.withdrawal(open_.row.key, reason))
            self._over(open_, outcome=str(run.state))
        if last is not None and last.state is not RoundState.COMMITTED:
            self._announce(last.key)

    def _move(self, run: RunRow) -> None:
        self._write(run)
        self.row = run

    # -------------------------------------------------------------- tools

    def _announce(self, key: AttemptKey) -> None:
        """The last word on an attempt, to every region that was offered it."""
        for region in self.row.regions:
            verdict = self._leader.verdict(key, region)
            if verdict is not None:
                self._leader.registry.send(region, verdict)

    def _send_all(self, event: pb.AttachResponse) -> None:
        for region in self.row.regions:
            self._leader.registry.send(region, event)

    def _over(self, open_: Collection, outcome: str) -> None:
        open_.span.set(outcome=outcome, num_partials=len(open_.counted()))
        open_.span.end()
        self.open = None

    def _collection(self, row: AttemptRow, answers: Sequence[AnswerRow]) -> Collection:
        now = self._leader.clock()
        return Collection(self.row, row, answers, federation=self._leader.federation, opened_at=now)

    def _attempts(self) -> list[AttemptRow]:
        """Attempts made at the round that comes next."""
        run, rounds = self.row, self.row.job.job.rounds
        if run.rounds_committed < rounds:
            return self._leader.store.attempts(run.run, TaskKind.TRAIN, run.rounds_committed + 1)
        return self._leader.store.attempts(run.run, TaskKind.EVALUATE, rounds + 1)

    def _write(self, *rows: Row) -> None:
        reach("controller.write")
        self._leader.store.write(self._leader.epoch, *rows)
