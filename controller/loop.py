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

from hierfl import observe
from hierfl.aggregation import PartialAggregate
from hierfl.errors import HierFLError, RoundClosed, RunFailed, StaleEpoch, StorageError
from hierfl.receipts import Reason
from hierfl.rounds import (
    Abandon,
    AttemptWithdrawn,
    Close,
    CollectionClosed,
    MergeFailed,
    PartialAccepted,
    QuorumUnreachable,
    RegionAbstained,
    RegionView,
    RoundState,
    Wait,
    decide_attempt,
    next_round_state,
)
from hierfl.runs import (
    Finish,
    OpenAttempt,
    Pause,
    RunCancelled,
    RunEvent,
    RunFinished,
    RunPaused,
    RunResumed,
    RunStarted,
    RunState,
    decide_run,
    retry_delay_s,
)
from hierfl.runs import RunFailed as RunHasFailed
from hierfl.types import AttemptKey, RegionId, TaskKind

from controller import committing, messages, planning
from controller.collection import Collection, region_view
from controller.merge import merge_partials, next_model
from controller.rows import AnswerRow, AttemptRow, RoundRow, Row, RunRow

if TYPE_CHECKING:
    from controller.leader import Leader

__all__ = ["RunLoop"]

logger = logging.getLogger(__name__)


class RunLoop:
    """One run, from its row in the store to its end."""

    def __init__(self, leader: Leader, row: RunRow) -> None:
        self.row = row
        self.open: Collection | None = None
        self.told: list[RoundRow] = leader.store.rounds(row.run)
        """Committed rounds, in order."""
        self.waiting_for = ""
        """In words, what the next step waits for."""
        self._leader = leader
        self._wish: RunEvent | None = None
        self._retry_at = 0.0
        self._wake = asyncio.Event()
        self._followers: set[asyncio.Event] = set()

    # -------------------------------------------------------------- what others may do

    def poke(self) -> None:
        """Something is different: look again."""
        self._wake.set()
        for follower in self._followers:
            follower.set()

    def follow(self) -> asyncio.Event:
        """An event that is set at every change, until ``unfollow``."""
        changed = asyncio.Event()
        self._followers.add(changed)
        return changed

    def unfollow(self, changed: asyncio.Event) -> None:
        self._followers.discard(changed)

    async def ask(self, event: RunCancelled | RunResumed) -> None:
        """Hand in an operator's wish; returns when it has been carried out, or has become void."""
        self._wish = event
        changed = self.follow()
        self.poke()
        try:
            while self._wish is event and not self.row.state.is_terminal:
                changed.clear()
                await changed.wait()
        finally:
            self.unfollow(changed)

    def collecting(self, key: AttemptKey, region: RegionId) -> Collection:
        """The open attempt of this key, if ``region`` may still answer it.

        Raises:
            RoundClosed: It is closed, was never offered, or the region has abstained.
        """
        if self.open is None or self.open.row.key != key or not self.open.offer_again_to(region):
            raise RoundClosed(f"{key} takes no partial aggregate of {region}: closed, or never offered to it")
        return self.open

    def answer(self, collection: Collection, answer: AnswerRow) -> None:
        """Make a region's answer durable, then count with it. The first word stands.

        Raises:
            RoundClosed: The attempt closed in the meantime.
        """
        self.collecting(collection.row.key, answer.region)
        said = PartialAccepted if answer.digest else RegionAbstained
        event = said(region=answer.region, **({"digest": answer.digest} if answer.digest else {"code": answer.code}))
        collection.row = replace(collection.row, state=next_round_state(collection.row.state, event))
        self._write(answer)
        collection.answers[answer.region] = answer
        self.poke()

    # -------------------------------------------------------------- the loop

    async def run(self) -> None:
        """Step until the run has ended. A storage error pauses the run, or surfaces if even that cannot be stored."""
        while not self.row.state.is_terminal:
            self._wake.clear()
            try:
                wake_at = await self._step()
            except StaleEpoch:
                raise
            except StorageError as error:
                logger.exception("run %s: storage", self.row.run)
                wake_at = self._pause(str(error))
            except HierFLError as error:
                wake_at = self._fail(str(error))
            self._tell_followers()
            if wake_at is not None:
                await self._wait_until(wake_at)

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
        now, view_of = self._leader.clock(), planning.run_view
        due = now >= self._retry_at
        decision = decide_run(view_of(self.row, len(self._attempts()), self._regions(), retry_due=due))
        match decision:
            case Wait():
                self.waiting_for = decision.waiting_for
                return self._next_change(now)
            case OpenAttempt():
                self._open(decision)
            case Pause():
                self._move(self.row.after(RunPaused(reason=decision.reason)))
            case Finish():
                self._end(RunFinished(reason=decision.reason))
        return None

    def _regions(self) -> tuple[RegionView, ...]:
        silence_s = self.row.job.round.silence_s
        return tuple(region_view(self._leader.registry, region, silence_s) for region in self.row.regions)

    def _next_change(self, now: float) -> float:
        if now < self._retry_at:
            return self._retry_at
        registry, silence_s = self._leader.registry, self.row.job.round.silence_s
        changes = [registry.live_until(view.region, silence_s) for view in self._regions() if view.presence.is_live]
        return min(changes, default=float("inf"))

    async def _wait_until(self, at: float) -> None:
        seconds = at - self._leader.clock()
        try:
            async with asyncio.timeout(None if seconds == float("inf") else max(seconds, 0.0)):
                await self._wake.wait()
        except TimeoutError:
            pass  # time alone changed what a decision sees

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
        """Sum, apply, commit. A failure that trying again would not mend ends the run."""
        leader, answers = self._leader, open_.counted()
        with observe.under(open_.span):
            with observe.span(observe.SPAN_MERGE, num_partials=len(answers)):
                total = await asyncio.to_thread(merge_partials, leader.blobs, open_.row, answers)
                if open_.row.task is TaskKind.TRAIN:
                    made = await asyncio.to_thread(next_model, leader.blobs, self.row, total)
            with observe.span(observe.SPAN_COMMIT, num_sites=total.num_sites):
                if open_.row.task is TaskKind.TRAIN:
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
                    signed = leader.signed(record)
                    found = await asyncio.to_thread(leader.commits.create, self.row.run, record.version, signed)
                    self._commit(open_, answers, total, found)
                else:
                    self._commit(open_, answers, total, None)
            with observe.span(observe.SPAN_ANNOUNCE):
                self._announce(open_)
        self._over(open_, outcome="committed")

    def _announce(self, open_: Collection) -> None:
        for region in open_.plans:
            verdict = self._leader.verdict(open_.row.key, region)
            assert verdict is not None, "the round is committed"
            self._leader.registry.send(region, verdict)

    # TODO
