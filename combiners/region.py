"""What a region does about its attempts: events in, instructions out. Who is counted is decided here.

No I/O, no clock, no Ray: time and outcomes arrive as events (``combiners/events.py``), and claims,
which want an answer at once, by ``claim``. Rules held here:

- a claim is granted only while its attempt is collecting, and once per key and digest;
- an attempt closes when enough are in and nobody else is expected, or at its deadline;
- only what live incarnations handed over, in agreement with their claims, is sealed;
- one release for one base and task, over all attempts and runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from combiners.attempt import Attempt, Phase, Step
from combiners.cohort import Cohort, Outlook, Standing
from combiners.events import (
    Abstain,
    AskAgain,
    AttemptOver,
    ClaimsAnswered,
    ClientDeclined,
    ClientJoined,
    ClientLeft,
    CloseAtIntakes,
    Drained,
    Event,
    FetchModel,
    Freeze,
    HandedOver,
    Instruction,
    IntakeJoined,
    IntakeVoid,
    ModelFailed,
    ModelReady,
    OfferTaken,
    OpenAtIntakes,
    PartialAcknowledged,
    PartialPruned,
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
    TimerKind,
    UpdateFolded,
    UpdateLetGo,
    VoidIntake,
)
from combiners.messages import Answer, App, Claim, ClaimAnswer, Opening, serves
from hierfl.plan import Plan
from hierfl.receipts import Reason, ReceiptEvent, next_receipt
from hierfl.residency import Contribution, ZonePolicy, objection
from hierfl.types import AttemptKey, ClientRef, UpdateKey

__all__ = ["PRUNED", "Region", "contribution"]

PRUNED = ""
"""Stands for the digest of a release whose bytes are gone."""

DEADLINE_SHARE = 0.9
"""Of the plan's time: the rest is for sealing and the uplink, so that they end before the round does."""


def contribution(claim: Claim) -> Contribution:
    """A claim as the residency rule sees it."""
    return Contribution(site=claim.key.client.site, weight=claim.weight, metrics=claim.metrics)


class Region:
    """The state machine. One per Region start; sealed partials of earlier starts come as ``released``."""

    def __init__(
        self,
        *,
        region_epoch: int,
        policy: ZonePolicy,
        released: Mapping[tuple[str, str], str] | None = None,
        grace_s: float = 6.0,
        capacity: int = 8,
    ) -> None:
        """``released``: digest (or ``PRUNED``) by (base model hash, task hash)."""
        self.region_epoch = region_epoch
        self.policy = policy
        self.released = dict(released or {})
        self.grace_s = grace_s
        self.capacity = capacity
        self.attempts: dict[AttemptKey, Attempt] = {}
        self.incarnations: set[str] = set()
        self.connected: dict[ClientRef, dict[str, tuple[App, ...]]] = {}
        self.is_draining = False
        self._num_seals = 0
        self._out: list[Instruction] = []
        self._touched: set[AttemptKey] = set()

    # ------------------------------------------------------------ in and out

    def handle(self, *events: Event) -> list[Instruction]:
        """Take ``events`` in order, then decide what is due; an event of something that is over is ignored."""
        for event in events:
            self._take(event)
        for key in sorted(self._touched):
            self._decide(key)
        self._touched.clear()
        out, self._out = self._out, []
        return out

    def claim(self, incarnation: str, claim: Claim) -> ClaimAnswer:
        """Grant a claim of a live incarnation, or say why not. Asked twice, it answers the same."""
        attempt = self.attempts.get(claim.key.attempt)
        if incarnation not in self.incarnations or attempt is None:
            return ClaimAnswer(key=claim.key, answer=Answer.REFUSED, reason=Reason.UNKNOWN_ATTEMPT)
        if attempt.phase is Phase.COLLECTING:
            return attempt.cohort.claim(incarnation, claim)
        if attempt.phase.collects:
            return ClaimAnswer(key=claim.key, answer=Answer.LATER)
        return ClaimAnswer(key=claim.key, answer=Answer.REFUSED, reason=attempt.closed_for)

    def ask(self, key: UpdateKey) -> ClaimAnswer:
        """What is known of an update that is not sealed: its receipt, or whether it may still be handed in."""
        attempt = self.attempts.get(key.attempt)
        if attempt is None:
            return ClaimAnswer(key=key, answer=Answer.REFUSED, reason=Reason.UNKNOWN_ATTEMPT)
        if not attempt.phase.collects:
            return ClaimAnswer(key=key, answer=Answer.REFUSED, reason=attempt.closed_for)
        member = attempt.cohort.members.get(key.client)
        receipt = None if member is None else member.receipt()
        return ClaimAnswer(key=key, answer=Answer.LATER if receipt is None else Answer.KNOWN, receipt=receipt)

    def openings(self) -> tuple[Opening, ...]:
        """What a new intake, or a client that comes back, has to know."""
        return tuple(
            Opening(key=attempt.key, offer=attempt.offer)
            for attempt in self.attempts.values()
            if attempt.phase is Phase.COLLECTING
        )

    def ready(self, plan: Plan) -> list[ClientRef]:
        """Connected clients that serve the plan's app."""
        return [client for client, at in self.connected.items() if any(serves(apps, plan) for apps in at.values())]

    # ------------------------------------------------------------ events

    def _take(self, event: Event) -> None:  # noqa: PLR0912 - one line a kind of event: the table of this machine
        match event:
            case OfferTaken():
                self._take_offer(event.plan, event.offer)
            case ModelReady():
                self._step(event.key, Phase.FETCHING, Step.MODEL)
            case ModelFailed():
                self._abstain(event.key, event.reason, only=(Phase.FETCHING,))
            case IntakeJoined():
                self.incarnations.add(event.incarnation)
            case IntakeVoid():
                self._void(event.incarnation)
            case ClientJoined():
                self._join(event)
            case ClientLeft():
                self._leave(event.incarnation, event.client)
            case ClaimsAnswered():
                self._touched.add(event.key)
            case UpdateFolded():
                self._cohort(event.key, lambda cohort: cohort.fold(event.incarnation, event.key.client))
            case UpdateLetGo():
                self._cohort(event.key, lambda cohort: cohort.let_go(event.incarnation, [event.key.client]))
            case ClientDeclined():
                self._cohort(event.key, lambda cohort: cohort.decline(event.key.client))
            case HandedOver():
                self._hand_over(event)
            case PartialSealed():
                self._sealed(event.key, event.digest)
            case SumsGone():
                self._lose_sums(event.key, event.incarnation)
            case SealFailed():
                self._abstain(event.key, event.reason, only=(Phase.WRITING, Phase.UPLINKING))
            case PartialAcknowledged():
                self._step(event.key, Phase.UPLINKING, Step.ACKNOWLEDGE)
            case AttemptOver():
                self._end(event.key, event.reason)
            case PartialPruned():
                self.released[event.base_model_hash, event.task_hash] = PRUNED
            case TimerFired():
                self._fire(event.timer)
            case Drained():
                self._drain()

    def _step(self, key: AttemptKey, phase: Phase, step: Step) -> None:
        attempt = self.attempts.get(key)
        if attempt is not None and attempt.phase is phase:
            attempt.step(step)
            self._touched.add(key)

    def _cohort(self, key: UpdateKey, change: Callable[[Cohort], object]) -> None:
        attempt = self.attempts.get(key.attempt)
        if attempt is not None and attempt.phase in (Phase.COLLECTING, Phase.SEALING):
            change(attempt.cohort)
            self._touched.add(key.attempt)

    def _take_offer(self, plan: Plan, offer: bytes) -> None:
        known = self.attempts.get(plan.key)
        if known is not None:
            self._take_again(known, offer)
            return
        self._supersede(plan)
        attempt = Attempt(plan=plan, offer=offer, cohort=Cohort(plan, self.policy.sites_needed(plan)))
        self.attempts[plan.key] = attempt
        seconds = DEADLINE_SHARE * plan.report_timeout_s
        self._out.append(SetTimer(Timer(kind=TimerKind.DEADLINE, key=plan.key), seconds))
        self._admit_attempt(attempt)

    def _take_again(self, attempt: Attempt, offer: bytes) -> None:
        """The controller re-sends what it has not heard an outcome of; a new leader signs anew."""
        attempt.offer = offer
        if attempt.phase is Phase.ABSTAINED:
            self._out.append(Abstain(attempt.key, attempt.closed_for))
        elif attempt.phase is Phase.COLLECTING:
            self._out.append(OpenAtIntakes(key=attempt.key, offer=offer))
        elif attempt.phase is Phase.UPLINKING:
            self._out.append(SendPartial(attempt.key, self.released[attempt.release_pair]))

    def _supersede(self, plan: Plan) -> None:
        """A run has one open attempt: an older one that was not withdrawn here ended while we were away."""
        older = [key for key in self.attempts if key.run == plan.run]
        for key in older:
            self._end(key, Reason.ATTEMPT_ABANDONED)

    def _admit_attempt(self, attempt: Attempt) -> None:
        """Send again what left before, wait for who collects the same, or begin."""
        digest = self.released.get(attempt.release_pair)
        others = [other for other in self.attempts.values() if other is not attempt]
        if digest == PRUNED:
            self._abstain(attempt.key, Reason.ALREADY_RELEASED)
        elif digest is not None:
            attempt.step(Step.READDRESS)
            self._out.append(SendPartial(attempt.key, digest))
        elif self.is_draining or len({other.key.run for other in others if other.phase.collects}) >= self.capacity:
            self._abstain(attempt.key, Reason.CAPACITY)
        elif any(other.phase.collects and other.release_pair == attempt.release_pair for other in others):
            attempt.step(Step.DEFER)
        else:
            self._out.append(FetchModel(attempt.plan))

    def _join(self, event: ClientJoined) -> None:
        self.connected.setdefault(event.client, {})[event.incarnation] = event.apps
        for attempt in self.attempts.values():
            if attempt.phase is Phase.COLLECTING and serves(event.apps, attempt.plan):
                attempt.cohort.expect(event.client)
            self._touched.add(attempt.key)

    def _leave(self, incarnation: str, client: ClientRef) -> None:
        at = self.connected.get(client, {})
        at.pop(incarnation, None)
        if not at and self.connected.pop(client, None) is not None:
            self._out.append(SetTimer(Timer(kind=TimerKind.GONE, client=client), self.grace_s))

    def _void(self, incarnation: str) -> None:
        """Its accumulators are gone, and with them every claim it held: those clients are asked again."""
        self.incarnations.discard(incarnation)
        for attempt in self.attempts.values():
            if attempt.phase in (Phase.COLLECTING, Phase.SEALING):
                self._let_go(attempt, incarnation)
                attempt.awaited.discard(incarnation)
                attempt.handed_over.pop(incarnation, None)
                self._touched.add(attempt.key)
        for client in [client for client, at in self.connected.items() if incarnation in at]:
            self._leave(incarnation, client)

    def _let_go(self, attempt: Attempt, incarnation: str, clients: Iterable[ClientRef] | None = None) -> None:
        freed = attempt.cohort.let_go(incarnation, clients)
        if freed:
            self._out.append(AskAgain(key=attempt.key, clients=tuple(freed)))

    def _hand_over(self, event: HandedOver) -> None:
        attempt = self.attempts.get(event.key)
        if attempt is None or attempt.phase is not Phase.SEALING or attempt.seal_id != event.seal_id:
            return
        if event.incarnation not in attempt.awaited:
            return
        granted = attempt.cohort.claims_of(event.incarnation)
        listed = {entry.key.client: entry for entry in event.entries}
        if any(granted.get(client) != entry for client, entry in listed.items()):
            self._out.append(VoidIntake(event.incarnation))
            self._void(event.incarnation)
            return
        self._let_go(attempt, event.incarnation, [client for client in granted if client not in listed])
        for client in listed:
            attempt.cohort.fold(event.incarnation, client)
        attempt.awaited.discard(event.incarnation)
        attempt.handed_over[event.incarnation] = event.entries
        self._touched.add(event.key)

    def _sealed(self, key: AttemptKey, digest: str) -> None:
        attempt = self.attempts[key]
        attempt.step(Step.WRITTEN)
        self.released[attempt.release_pair] = digest
        self._out.append(CloseAtIntakes(key, Reason.LATE))
        self._out.append(SendPartial(key, digest))
        self._release_deferred(attempt)

    def _lose_sums(self, key: AttemptKey, incarnation: str) -> None:
        """Of an attempt that is being sealed: as if the intake had died before it handed over."""
        attempt = self.attempts.get(key)
        if attempt is None or attempt.phase is not Phase.WRITING:
            return
        attempt.step(Step.LOSE)
        attempt.handed_over.pop(incarnation, None)
        self._let_go(attempt, incarnation)
        self._touched.add(key)

    def _release_deferred(self, ended: Attempt) -> None:
        """Attempts of other runs that waited for this one: send the same sum, or collect it themselves."""
        for attempt in list(self.attempts.values()):
            if attempt.phase is Phase.DEFERRED and attempt.release_pair == ended.release_pair:
                attempt.step(Step.FETCH)
                self._admit_attempt(attempt)

    def _fire(self, timer: Timer) -> None:
        if timer.client is not None:
            if timer.client not in self.connected:
                for attempt in self.attempts.values():
                    attempt.cohort.miss(timer.client)
                    self._touched.add(attempt.key)
            return
        timed = self.attempts.get(timer.key) if timer.key is not None else None
        if timed is None:
            return
        if timer.kind is TimerKind.DEADLINE:
            timed.is_past_deadline = True
            self._touched.add(timed.key)
        elif timed.phase is Phase.COLLECTING:
            timed.is_hopeless_timed = False
            if timed.cohort.outlook() is Outlook.HOPELESS:
                self._abstain(timed.key, Reason.TOO_FEW_SITES)

    def _drain(self) -> None:
        """Seal what is enough; hand the rest back: its clients keep their updates and are asked again."""
        self.is_draining = True
        for attempt in list(self.attempts.values()):
            if attempt.phase in (Phase.FETCHING, Phase.DEFERRED, Phase.WAITING):
                self._hand_back(attempt)
            self._touched.add(attempt.key)

    def _hand_back(self, attempt: Attempt) -> None:
        attempt.step(Step.END)
        del self.attempts[attempt.key]
        self._out.append(CloseAtIntakes(attempt.key, Reason.REGION_SILENT))

    # ------------------------------------------------------------ decisions

    def _decide(self, key: AttemptKey) -> None:
        attempt = self.attempts.get(key)
        if attempt is None:
            return
        if attempt.phase is Phase.WAITING:
            self._decide_begin(attempt)
        elif attempt.phase is Phase.COLLECTING:
            self._decide_close(attempt)
        elif attempt.phase is Phase.SEALING and not attempt.awaited:
            self._decide_seal(attempt)
        elif attempt.phase in (Phase.FETCHING, Phase.DEFERRED) and attempt.is_past_deadline:
            self._abstain(key, Reason.LATE)

    def _decide_begin(self, attempt: Attempt) -> None:
        if attempt.is_past_deadline:
            self._abstain(attempt.key, Reason.TOO_FEW_SITES)
        elif len(self.connected) < attempt.plan.min_clients:
            return  # asked at every arrival: too few are known without looking at each
        elif attempt.cohort.enough(ready := self.ready(attempt.plan)):
            attempt.step(Step.BEGIN)
            for client in ready:
                attempt.cohort.expect(client)
            self._out.append(OpenAtIntakes(key=attempt.key, offer=attempt.offer))

    def _decide_close(self, attempt: Attempt) -> None:
        outlook = attempt.cohort.outlook()
        if outlook is Outlook.COMPLETE:
            self._freeze(attempt)
        elif attempt.is_past_deadline or self.is_draining:
            if attempt.cohort.enough_with(Standing.CLAIMED, Standing.FOLDED):
                self._freeze(attempt)
            elif self.is_draining:
                self._hand_back(attempt)
            else:
                self._abstain(attempt.key, Reason.TOO_FEW_SITES)
        elif outlook is Outlook.HOPELESS and not attempt.is_hopeless_timed:
            attempt.is_hopeless_timed = True
            self._out.append(SetTimer(Timer(kind=TimerKind.HOPELESS, key=attempt.key), self.grace_s))

    def _freeze(self, attempt: Attempt) -> None:
        attempt.step(Step.FREEZE)
        self._num_seals += 1
        attempt.seal_id = f"{self.region_epoch}-{self._num_seals}"
        attempt.awaited = set(self.incarnations)
        attempt.handed_over = {}
        incarnations = tuple(sorted(self.incarnations))
        self._out.append(Freeze(key=attempt.key, seal_id=attempt.seal_id, incarnations=incarnations))

    def _decide_seal(self, attempt: Attempt) -> None:
        """Everyone alive has handed over: write, or go on collecting where an intake was lost in time."""
        waits = attempt.cohort.outlook() is not Outlook.COMPLETE
        if waits and not attempt.is_past_deadline and not self.is_draining:
            attempt.step(Step.RESUME)
            for client in self.ready(attempt.plan):
                attempt.cohort.expect(client)
            self._out.append(Resume(attempt.key, attempt.seal_id))
            # An intake that joined meanwhile has not been told of this attempt; to the others it is nothing new.
            self._out.append(OpenAtIntakes(key=attempt.key, offer=attempt.offer))
            self._decide_close(attempt)
            return
        claims = [claim for entries in attempt.handed_over.values() for claim in entries]
        reason = objection(self.policy, attempt.plan, [contribution(claim) for claim in claims])
        if reason is not None:
            self._abstain(attempt.key, reason)
            return
        attempt.step(Step.WRITE)
        receipts = tuple(next_receipt(receipt, ReceiptEvent.SEAL) for receipt in attempt.cohort.receipts())
        self._out.append(
            Seal(plan=attempt.plan, seal_id=attempt.seal_id, entries=dict(attempt.handed_over), receipts=receipts)
        )

    def _abstain(self, key: AttemptKey, reason: Reason, only: tuple[Phase, ...] = ()) -> None:
        attempt = self.attempts.get(key)
        if attempt is None or (only and attempt.phase not in only):
            return
        self._refuse_granted(attempt, reason)
        attempt.step(Step.ABSTAIN)
        attempt.closed_for = reason
        self._out.append(Abstain(key, reason))
        self._release_deferred(attempt)

    def _end(self, key: AttemptKey, reason: Reason) -> None:
        attempt = self.attempts.get(key)
        if attempt is None:
            return
        if attempt.phase is Phase.UPLINKING:
            self._out.append(StopSending(key))
        self._refuse_granted(attempt, reason)
        attempt.step(Step.END)
        del self.attempts[key]
        self._release_deferred(attempt)

    def _refuse_granted(self, attempt: Attempt, reason: Reason) -> None:
        """Nothing is sealed of this attempt: what was granted in it is not counted."""
        if attempt.phase not in (Phase.COLLECTING, Phase.SEALING, Phase.WRITING):
            return
        receipts = [next_receipt(each, ReceiptEvent.REFUSE, reason=reason) for each in attempt.cohort.receipts()]
        if receipts:
            self._out.append(Tell(tuple(receipts)))
        self._out.append(CloseAtIntakes(attempt.key, reason))
