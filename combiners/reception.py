"""The Region's side of its intakes: who they are, what they report and claim, and what is said of it.

An incarnation that fails a call, or is silent, is void: nothing that it holds is used. A refusal that is a
last word is a receipt, durable before it is said.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from combiners.cohort import Standing
from combiners.directory import Directory
from combiners.events import (
    ClaimsAnswered,
    ClientDeclined,
    ClientJoined,
    ClientLeft,
    Event,
    IntakeJoined,
    IntakeVoid,
    UpdateFolded,
    UpdateLetGo,
)
from combiners.messages import (
    Answer,
    Claim,
    ClaimAnswer,
    ClientView,
    IntakePort,
    Outcome,
    Registration,
    Report,
    Tick,
    TickReply,
)
from combiners.ports import IntakeLine
from combiners.region import Region
from combiners.settings import RegionSettings
from combiners.zone import ZoneStore
from hierfl.endpoints import Endpoint
from hierfl.failpoints import reach
from hierfl.pki import Kit
from hierfl.receipts import Reason, Receipt, ReceiptEvent, ReceiptState, next_receipt
from hierfl.types import ClientRef, UpdateKey
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.convert import key_to_proto

__all__ = ["Reception"]

logger = logging.getLogger(__name__)

REFUSED_FOR_GOOD = (Reason.LATE, Reason.WEIGHT_SHARE, Reason.TOO_FEW_SITES, Reason.DOMINATED, Reason.STORAGE)
"""Refusals of a claim that are last words on its update; the others are errors of the request."""


class Shell(Protocol):
    """What the reception needs of its host."""

    kit: Kit
    region: Region
    store: ZoneStore
    settings: RegionSettings

    def apply(self, *events: Event) -> None: ...
    def spawn(self, work: Coroutine[Any, Any, None]) -> object: ...
    def on_disk(self, function: Callable[..., Any], *arguments: Any) -> Awaitable[Any]: ...
    @property
    def is_informed(self) -> bool: ...
    @property
    def is_orphaned(self) -> bool: ...


class Reception:
    """See the module."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self.lines: dict[str, IntakeLine] = {}
        self._numbers = itertools.count(1)
        self._joined_at_s: dict[ClientRef, float] = {}
        self._bytes_before = [0, 0]
        """In and out, of incarnations that are gone."""
        self._directory = Directory(shell.kit, shell.region.region_epoch, shell.settings.settle_s)

    def at_intakes(self, call: Callable[[IntakePort], Coroutine[Any, Any, None]]) -> None:
        """Call every live intake, in the order of calls to each."""
        for line in self.lines.values():
            line.call(call)

    def deliver(self, receipts: tuple[Receipt, ...]) -> None:
        """Push receipts to the clients that wait; the others ask."""
        if receipts:
            self.at_intakes(lambda port: port.deliver(receipts))

    async def register(self, name: str, address: str, port: IntakePort) -> Registration:
        """A new incarnation of intake ``name``; the one before, if any, is void."""
        for line in [line for line in self.lines.values() if line.name == name]:
            self.lost(line.incarnation)
        incarnation = f"{self._shell.region.region_epoch}.{next(self._numbers)}"
        self.lines[incarnation] = IntakeLine(
            name, incarnation, address, port, timeout_s=self._shell.settings.freeze_s, on_lost=self.lost
        )
        self._directory.changed()
        self._shell.apply(IntakeJoined(incarnation))
        return Registration(
            incarnation=incarnation, openings=self._shell.region.openings(), endpoints=self._directory.newest
        )

    async def list_intakes(self) -> None:
        """Tell clients, by their intakes, where the region's intakes are, whenever that has changed."""
        await self._directory.run(
            lambda: [Endpoint(name=line.name, address=line.address) for line in self.lines.values()],
            lambda signed: self.at_intakes(lambda port: port.list_endpoints(signed)),
        )

    def lost(self, incarnation: str) -> None:
        """An incarnation is void: nothing that it holds is used."""
        if incarnation in self.lines:
            logger.warning("intake %s is void; its clients are asked again", self.lines[incarnation].name)
            self.drop(incarnation)
            self._shell.apply(IntakeVoid(incarnation))

    def drop(self, incarnation: str) -> None:
        """Let go of an incarnation."""
        line = self.lines.pop(incarnation, None)
        if line is not None:
            self._directory.changed()
            self._bytes_before[0] += line.bytes_in
            self._bytes_before[1] += line.bytes_out
            self._shell.spawn(line.close())

    async def watch(self) -> None:
        """An intake ticks every second; one that has not for long is void."""
        silence_s = self._shell.settings.intake_silence_s
        while True:
            await asyncio.sleep(silence_s / 4)
            now_s = time.monotonic()
            for line in list(self.lines.values()):
                if now_s - line.heard_at_s > silence_s:
                    self.lost(line.incarnation)

    async def tick(self, incarnation: str, tick: Tick) -> TickReply:
        """Everything that waits at an intake, in one call. A copy that comes late, after later ones, changes nothing:
        it would undo what they said, or grant a claim that nobody waits for any more.
        """
        line = self.lines.get(incarnation)
        if line is None:
            return TickReply(known=False)
        if tick.number < line.newest_tick:
            return TickReply(known=True)
        line.newest_tick = tick.number
        line.heard_at_s, line.bytes_in, line.bytes_out = time.monotonic(), tick.bytes_in, tick.bytes_out
        events = [*self._connection_events(incarnation, tick), *(_event_of(incarnation, one) for one in tick.reports)]
        if events:
            self._shell.apply(*events)
        answers = await self._answers(incarnation, tick.claims)
        told = [await self._told(key) for key in tick.asks]
        if answers:
            reach("region.claim")
        return TickReply(known=True, answers=tuple(answers), told=tuple(told))

    async def _answers(self, incarnation: str, claims: Sequence[Claim]) -> list[ClaimAnswer]:
        """The store is asked once for all; then their attempts may be complete."""
        if not claims:
            return []
        known = await self._shell.on_disk(self._shell.store.receipts_of, [claim.key for claim in claims])
        answers = [await self._answer(incarnation, claim, known.get(claim.key)) for claim in claims]
        self._shell.apply(*(ClaimsAnswered(key) for key in {claim.key.attempt for claim in claims}))
        return answers

    def _connection_events(self, incarnation: str, tick: Tick) -> list[Event]:
        events: list[Event] = []
        for one in tick.connections:
            if one.joined:
                self._joined_at_s.setdefault(one.client, time.monotonic())
                events.append(ClientJoined(incarnation=incarnation, client=one.client, apps=one.apps))
            else:
                self._joined_at_s.pop(one.client, None)
                events.append(ClientLeft(incarnation=incarnation, client=one.client))
        return events

    async def _answer(self, incarnation: str, claim: Claim, known: Receipt | None) -> ClaimAnswer:
        """A refusal for good is a receipt, durable before it is said. What has its last word, or is sealed, is asked
        no more, though the attempt is offered again after a restart.
        """
        if known is not None:
            self._shell.apply(ClientDeclined(claim.key))
            return self._as_it_is(known)
        answer = self._shell.region.claim(incarnation, claim)
        if answer.answer is not Answer.REFUSED or answer.reason is Reason.DIGEST_CONFLICT:
            return answer
        if answer.reason in REFUSED_FOR_GOOD:
            refused = Receipt(
                key=claim.key, digest=claim.digest, state=ReceiptState.NOT_COUNTED, reason=answer.reason or ""
            )
            await self._shell.on_disk(self._shell.store.record, [refused])
            reach("region.refuse")
        return await self._known_or(answer)

    async def _told(self, key: UpdateKey) -> ClaimAnswer:
        return await self._known_or(self._shell.region.ask(key))

    async def _known_or(self, answer: ClaimAnswer) -> ClaimAnswer:
        """What is durably known by now, or else ``answer``."""
        known = await self._shell.on_disk(self._shell.store.receipt, answer.key)
        return self._patient(answer) if known is None else self._as_it_is(known)

    def _as_it_is(self, known: Receipt) -> ClaimAnswer:
        """A receipt of the book; a sealed one says so while the controller, which has the last word, stays away."""
        if self._shell.is_orphaned:
            known = next_receipt(known, ReceiptEvent.ORPHAN, reason=Reason.CONTROLLER_AWAY)
        return ClaimAnswer(key=known.key, answer=Answer.KNOWN, receipt=known)

    def _patient(self, answer: ClaimAnswer) -> ClaimAnswer:
        """Before the controller has said what is open, nothing is closed."""
        if answer.reason is Reason.UNKNOWN_ATTEMPT and not self._shell.is_informed:
            return ClaimAnswer(key=answer.key, answer=Answer.LATER)
        return answer

    def clients(self) -> tuple[ClientView, ...]:
        """Who is connected, by name: for operators of this region."""
        now_s = time.monotonic()
        return tuple(
            ClientView(
                client=client,
                apps=tuple(sorted({app for apps in at.values() for app in apps}, key=lambda app: app.name)),
                state=self._state_of(client),
                connected_for_s=now_s - self._joined_at_s.get(client, now_s),
            )
            for client, at in sorted(self._shell.region.connected.items())
        )

    def _state_of(self, client: ClientRef) -> str:
        words = {Standing.EXPECTED: "working", Standing.CLAIMED: "uploading", Standing.FOLDED: "reported"}
        for attempt in self._shell.region.attempts.values():
            member = attempt.cohort.members.get(client)
            if attempt.phase.collects and member is not None and member.standing in words:
                return words[member.standing]
        return "waiting"

    def report_request(self) -> pb.ReportRequest:
        """Counts only: no name leaves."""
        connected = self._shell.region.connected
        return pb.ReportRequest(
            region_epoch=self._shell.region.region_epoch,
            progress=[
                pb.AttemptProgress(
                    key=key_to_proto(attempt.key),
                    phase=attempt.phase.word,
                    clients_ready=len(self._shell.region.ready(attempt.plan)),
                    clients_reported=attempt.cohort.count(Standing.FOLDED),
                    cohort=len(attempt.cohort.members),
                )
                for attempt in self._shell.region.attempts.values()
            ],
            clients_connected=len(connected),
            sites_connected=len({client.site for client in connected}),
            bytes_from_sites=self._bytes_before[0] + sum(line.bytes_in for line in self.lines.values()),
            bytes_to_sites=self._bytes_before[1] + sum(line.bytes_out for line in self.lines.values()),
        )


def _event_of(incarnation: str, report: Report) -> Event:
    match report.outcome:
        case Outcome.FOLDED:
            return UpdateFolded(incarnation, report.key)
        case Outcome.LET_GO:
            return UpdateLetGo(incarnation, report.key)
        case Outcome.DECLINED | Outcome.INVALID:
            return ClientDeclined(report.key)
