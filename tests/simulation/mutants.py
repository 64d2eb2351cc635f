"""The product, broken on purpose, one rule at a time: the simulation has to notice each of these.

Where two guards stand behind each other, both are taken away: one alone is no danger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

from combiners import zonefile
from combiners.attempt import Attempt, Phase
from combiners.cohort import Cohort, Member
from combiners.events import HandedOver
from combiners.host import RegionHost
from combiners.messages import Answer, Claim, ClaimAnswer, HandOver
from combiners.reception import Reception
from combiners.region import Region
from combiners.session import Session as RegionSession
from combiners.zone import ZoneStore
from controller.commits import Commits
from hierfl.client.session import Session as ClientSession
from hierfl.errors import HierFLError
from hierfl.receipts import Receipt
from tests.simulation.stores import MemoryStore

__all__ = ["FOCUS", "MUTANTS"]

Mutant = Callable[[], AbstractContextManager[None]]


def _patching(*changes: tuple[Any, str, Any]) -> Mutant:
    @contextmanager
    def broken() -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, value in changes:
                stack.enter_context(mock.patch.object(owner, name, value))
            yield

    return broken


# ---------------------------------------------------------------- claims and hand-overs


def _grants_twice(cohort: Cohort, member: Member, incarnation: str, claim: Claim) -> ClaimAnswer:
    return ClaimAnswer(key=claim.key, answer=Answer.GRANTED)


def _believes(region: Region, event: HandedOver) -> None:
    """Whatever an intake lists is taken."""
    attempt = region.attempts.get(event.key)
    if attempt is None or attempt.phase is not Phase.SEALING or attempt.seal_id != event.seal_id:
        return
    if event.incarnation in attempt.awaited:
        for entry in event.entries:
            attempt.cohort.fold(event.incarnation, entry.key.client)
        attempt.awaited.discard(event.incarnation)
        attempt.handed_over[event.incarnation] = event.entries
        region._touched.add(event.key)


def _keeps_claims_of_the_dead(region: Region, incarnation: str) -> None:
    region.incarnations.discard(incarnation)
    for attempt in region.attempts.values():
        attempt.awaited.discard(incarnation)
        region._touched.add(attempt.key)


# ---------------------------------------------------------------- stores


def _of_any_run(store: ZoneStore, key: Any, event: Any, *, version: int = 0, reason: str = "") -> list[Receipt]:
    with store._file.transaction() as database:
        rows = database.execute(
            "select seal_id from addresses where run = ? and task = ? and round = ? and not is_judged",
            (key.run, key.task.value, key.round),
        ).fetchall()
        database.execute("update addresses set is_judged = 1 where run = ? and round = ?", (key.run, key.round))
        return [one for (seal,) in rows for one in store._settle_seal(database, seal, event, version, reason)]


def _writes_receipts_later(write: Any) -> Any:
    """Two transactions where there was one."""

    def rows(store: ZoneStore, sealed: Any, key: Any, claims: Any, receipts: Any, rule: Any) -> None:
        write(store, sealed, key, claims, receipts[:1], rule)
        with store._file.transaction() as database:
            for receipt in receipts[1:]:
                claim = next(claim for claim in claims if claim.key == receipt.key)
                store._put_receipt(database, receipt, 0, sealed.head.seal_id, claim)

    return rows


def _ignores_epochs(store: MemoryStore, epoch: int, *rows: Any) -> None:
    store._memory.leader_epoch, before = epoch, store._memory.leader_epoch
    try:
        _write(store, epoch, *rows)
    finally:
        store._memory.leader_epoch = max(epoch, before)


_write = MemoryStore.write
_create = Commits.create


def _replaces_records(commits: Commits, run: Any, version: int, record: Any) -> Any:
    (commits._directory / run / str(version)).unlink(missing_ok=True)
    return _create(commits, run, version, record)


# ---------------------------------------------------------------- words


async def _tells_before_it_writes(host: RegionHost, instruction: Any, hand_overs: list[HandOver]) -> None:
    host.reception.deliver(instruction.receipts)
    await _seal(host, instruction, hand_overs)


_seal = RegionHost._seal


async def _believes_any_verdict(session: RegionSession, verdict: Any, digest: str) -> bool:
    return bool(verdict.committed)


async def _refuses_without_record(reception: Reception, incarnation: str, claim: Claim) -> ClaimAnswer:
    with mock.patch.object(ZoneStore, "record"):
        answer = await _answer(reception, incarnation, claim)
    if answer.answer is Answer.REFUSED and answer.reason is not None:
        told = Receipt(key=claim.key, digest=claim.digest, state="not_counted", reason=answer.reason)  # type: ignore[arg-type]
        return ClaimAnswer(key=claim.key, answer=Answer.KNOWN, receipt=told)
    return answer


_answer = Reception._answer


async def _takes_late_copies(reception: Reception, incarnation: str, tick: Any) -> Any:
    line = reception.lines.get(incarnation)
    if line is not None:
        line.newest_tick = 0
    return await _tick(reception, incarnation, tick)


_tick = Reception.tick


async def _asks_once(session: ClientSession) -> None:
    with suppress(HierFLError):
        for receipt in await session.link.receipts(session._without_last_word()):
            session._on_receipt(receipt)


# ---------------------------------------------------------------- releases


def _releases_again(region: Region, attempt: Attempt) -> None:
    """Every attempt collects anew."""
    from combiners.events import FetchModel

    region._out.append(FetchModel(attempt.plan))


UNIQUE = "unique (base_model_hash, task_hash)"
UNGUARDED = zonefile._SCHEMA.replace(f",\n    {UNIQUE}", "")

MUTANTS: Mapping[str, Mutant] = {
    "a claim is granted at every intake, and hand-overs are believed": _patching(
        (Cohort, "_claimed_before", _grants_twice), (Region, "_hand_over", _believes)
    ),
    "claims of a dead intake are kept": _patching((Region, "_void", _keeps_claims_of_the_dead)),
    "a verdict settles the receipts of another run": _patching((ZoneStore, "settle", _of_any_run)),
    "receipts are written after their seal": _patching(
        (ZoneStore, "_write_seal_rows", _writes_receipts_later(ZoneStore._write_seal_rows))
    ),
    "the store takes rows of a leader that was replaced": _patching((MemoryStore, "write", _ignores_epochs)),
    "a commit record is replaced": _patching((Commits, "create", _replaces_records)),
    "clients hear of a seal before it is durable": _patching((RegionHost, "_seal", _tells_before_it_writes)),
    "every committed round counts as ours": _patching((RegionSession, "_is_counted", _believes_any_verdict)),
    "a refusal is told without a record": _patching((Reception, "_answer", _refuses_without_record)),
    "a client asks once what became of its updates": _patching((ClientSession, "_ask_for_receipts", _asks_once)),
    "a late copy of a call undoes what came after it": _patching((Reception, "tick", _takes_late_copies)),
    "a region releases anew for every attempt": _patching(
        (Region, "_admit_attempt", _releases_again), (zonefile, "_SCHEMA", UNGUARDED)
    ),
    "a Region that was replaced still writes": _patching((zonefile.ZoneFile, "_check_epoch", lambda file: None)),
}

FOCUS: Mapping[str, tuple[str, ...]] = {
    "receipts are written after their seal": ("region_dies_at_disk",),
    "a commit record is replaced": ("controller_freezes_at_disk",),
}
"""Faults alone by which some are noticed soon; the others, by any."""
