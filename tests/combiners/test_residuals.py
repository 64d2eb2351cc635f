"""What rounding leaves over: durable with its seal, the run's once the partial is counted, whole after any crash."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from combiners.attempt import Phase
from combiners.events import Seal
from combiners.messages import Claim, HandOver
from combiners.residuals import KEEP_RUNS, Carried, LeftOver
from combiners.sealed import Sealed
from combiners.sealing import make_sealed
from combiners.zone import ZoneStore
from hierfl.aggregation import Accumulator
from hierfl.border import verify_rows
from hierfl.errors import DiskFull
from hierfl.failpoints import VARIABLE
from hierfl.packing import PackedSums
from hierfl.plan import Plan
from hierfl.receipts import Reason, Receipt, ReceiptEvent, ReceiptState
from hierfl.residency import ZonePolicy, objection_to_resending
from hierfl.types import ClientId, ClientRef, ModelHash, RegionId, RunId, SiteId, TaskKind, UpdateKey
from hierfl.wire.packed import expect_partial, packed_sums
from hierfl.wire.transfer import Incoming, Outgoing

EU = RegionId("eu")
DROP = 20
ROUNDED = f"rounded-{DROP}"
POLICY = ZonePolicy(k=2, max_share=1.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ZoneStore]:
    made = ZoneStore(tmp_path / "zone", "test", EU)
    yield made
    made.close()


@pytest.fixture
def rounded(plan: Plan) -> Plan:
    return replace(plan, partial_encoding=ROUNDED)


def of_round(plan: Plan, number: int) -> Plan:
    """The plan of a later round of its run, on another model."""
    return replace(plan, round=number, base=replace(plan.base, model_hash=ModelHash(f"{number:064x}")))


def exact_sum(value: float) -> int:
    """Of three updates of this value, weight 1."""
    return 3 * round(np.float32(value) * 2.0**32)


def sealed_of(
    plan: Plan, carried: Carried | None, value: float
) -> tuple[Sealed, LeftOver | None, list[Claim], list[Receipt]]:
    total = Accumulator(plan.task.groups)
    claims = []
    for number in range(3):
        total.fold({"train": [np.full(3000, value, np.float32)]}, 1)
        key = UpdateKey(plan.key, ClientRef(EU, SiteId(f"site-{number}"), ClientId("client-00")))
        claims.append(Claim(key=key, digest=f"blake3:{number:02x}", weight=1, signature=b"s"))
    seal_id = f"{plan.run}-{plan.round}"
    handed = HandOver(incarnation="i", key=plan.key, seal_id=seal_id, entries=tuple(claims), partial=total.partial(3))
    receipts = [Receipt(key=claim.key, digest=claim.digest, state=ReceiptState.SEALED) for claim in claims]
    instruction = Seal(plan=plan, seal_id=seal_id, entries={"i": tuple(claims)}, receipts=tuple(receipts))
    return (*make_sealed(instruction, [handed], POLICY, EU, 1, carried), claims, receipts)


def write(store: ZoneStore, plan: Plan, value: float = 0.1) -> Sealed:
    """Seal a round as the host does."""
    carried = store.residuals.carried(plan)
    sealed, left_over, claims, receipts = sealed_of(plan, carried, value)
    store.write_seal(
        sealed,
        key=plan.key,
        claims=claims,
        receipts=receipts,
        sites_needed=2,
        max_share=1.0,
        updates_root="sha256:00",
        left_over=left_over,
    )
    return sealed


def commit(store: ZoneStore, plan: Plan) -> None:
    store.settle(plan.key, ReceiptEvent.COMMIT, version=plan.round)


def values_of(packed: PackedSums | None) -> np.ndarray:
    sums = {"train": np.zeros(3000, np.int64)}
    if packed is not None:
        packed.add_into(sums)
    return sums["train"]


def released(outgoing: Outgoing, plan: Plan) -> int:
    """The one integer that all values of a sealed partial are."""
    incoming = Incoming(expect_partial(plan.task.groups, None, None))
    for frame in outgoing.frames():
        incoming.feed(frame)
    (value,) = set(values_of(packed_sums(incoming, plan.task.groups)).tolist())
    return value


def carried(store: ZoneStore, plan: Plan) -> int:
    """The one integer that the run's next sum begins with."""
    found = store.residuals.carried(of_round(plan, 99))
    assert found is not None
    (value,) = set(values_of(found.sums).tolist())
    return value


def files(store_folder: Path) -> int:
    return len(list((store_folder / "blobs").glob("*.residual")))


# ---------------------------------------------------------------- the store


def test_what_counted_sums_left_over_is_in_the_next_ones_and_nothing_is_lost(store, rounded):
    exact = total = 0
    for number, value in enumerate((0.1, -0.03, 0.007, 0.1), start=1):
        plan = of_round(rounded, number)
        before = store.residuals.carried(plan).digest
        sealed = write(store, plan, value)
        assert (sealed.head.drop_bits, sealed.head.carried, sealed.head.left_over != "") == (DROP, before, True)
        commit(store, plan)
        exact += exact_sum(value)
        total += released(sealed.outgoing, plan) * 2**DROP
        assert total + carried(store, rounded) == exact
        assert abs(carried(store, rounded)) <= 2 ** (DROP - 1)
        assert store.residuals.carried(of_round(plan, 9)).digest == sealed.head.left_over


def test_a_partial_that_is_not_counted_leaves_what_there_was(store, rounded):
    first, second, third = (of_round(rounded, number) for number in (1, 2, 3))
    write(store, first)
    commit(store, first)
    before = store.residuals.carried(second).digest
    write(store, second, 0.03)
    store.settle(second.key, ReceiptEvent.REFUSE, reason=Reason.LATE)
    assert store.residuals.carried(third).digest == before
    store.settle(second.key, ReceiptEvent.COMMIT, version=2)
    assert store.residuals.carried(third).digest == before, "the last word was spoken"


def test_an_abandoned_attempt_moves_nothing_and_the_next_one_moves_it_once(store, rounded):
    sealed = write(store, rounded)
    again = replace(rounded, attempt=2)
    store.readdress(sealed.digest, again.key)
    assert store.residuals.carried(of_round(rounded, 2)) is None, "its last word is not spoken"
    commit(store, again)
    commit(store, rounded)
    assert store.residuals.carried(of_round(rounded, 2)).digest == sealed.head.left_over


def test_a_seal_before_the_last_word_on_an_earlier_one_goes_without_and_leaves_nothing(store, rounded, tmp_path):
    first, second = of_round(rounded, 1), of_round(rounded, 2)
    left_by_first = write(store, first).head.left_over
    head = write(store, second, 0.03).head
    assert (head.drop_bits, head.carried, head.left_over) == (DROP, "", "")
    commit(store, second)
    commit(store, first)
    assert store.residuals.carried(of_round(rounded, 3)).digest == left_by_first
    assert files(tmp_path / "zone") == 1


def test_exact_sums_have_none(store, plan, tmp_path):
    head = write(store, plan).head
    commit(store, plan)
    assert (head.drop_bits, head.carried, head.left_over) == (0, "", "")
    assert (files(tmp_path / "zone"), store.residuals.carried(of_round(plan, 2))) == (0, Carried())


KILLED_IN = """
import importlib.util, sys
from pathlib import Path
from combiners.zone import ZoneStore
from hierfl.plan import Plan
from hierfl.types import RegionId

zone, points, here, step, point = sys.argv[1:]
spec = importlib.util.spec_from_file_location("here", here)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
plan = Plan.from_bytes(Path(points, "plan").read_bytes())
store = ZoneStore(Path(zone), "test", RegionId("eu"))
if step == "verdict":
    module.write(store, plan, 0.03)
Path(points, point).write_text("kill")
module.write(store, plan, 0.03) if step == "seal" else module.commit(store, plan)
"""


@pytest.mark.parametrize(
    ("step", "point"),
    [
        ("seal", "region.seal.write"),
        ("seal", "region.seal.residual"),
        ("seal", "region.seal.file"),
        ("seal", "region.transaction"),
        ("verdict", "region.transaction"),
    ],
)
def test_a_crash_at_any_step_leaves_the_old_residual_whole_and_the_step_can_be_done_again(
    rounded, tmp_path, step, point
):
    zone, points = tmp_path / "zone", tmp_path / "points"
    first, second = of_round(rounded, 1), of_round(rounded, 2)
    store = ZoneStore(zone, "test", EU)
    write(store, first)
    commit(store, first)
    old = carried(store, rounded)
    store.close()
    points.mkdir()
    (points / "plan").write_bytes(second.to_bytes())
    command = [sys.executable, "-c", KILLED_IN, zone, points, __file__, step, point]
    died = subprocess.run(command, env={**os.environ, VARIABLE: str(points)}, check=False)
    assert died.returncode == -signal.SIGKILL

    again = ZoneStore(zone, "test", EU)
    assert (files(zone), list((zone / "blobs").glob("*.tmp"))) == (1 if step == "seal" else 2, [])
    if step == "seal":
        assert (again.pending(), carried(again, rounded)) == ([], old)
        write(again, second, 0.03)
    assert [one.key for one in again.pending()] == [second.key]
    assert again.residuals.carried(of_round(rounded, 3)) is None, "its last word is not spoken"
    commit(again, second)
    assert carried(again, rounded) == old + exact_sum(0.03) - round((old + exact_sum(0.03)) / 2**DROP) * 2**DROP
    again.close()
    once_more = ZoneStore(zone, "test", EU)
    assert carried(once_more, rounded) not in (old, 0), "what was counted stays"
    once_more.close()


def test_a_full_disk_leaves_neither_half_of_a_seal(store, rounded, tmp_path, monkeypatch):
    def no_space(path: Path, outgoing: Outgoing) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("combiners.residuals.write_transfer", no_space)
    with pytest.raises(DiskFull):
        write(store, rounded)
    assert store.pending() == []
    assert list((tmp_path / "zone" / "blobs").iterdir()) == []


def test_a_damaged_residual_is_named_and_the_run_goes_on_without(store, rounded, tmp_path, caplog):
    write(store, rounded)
    commit(store, rounded)
    (path,) = (tmp_path / "zone" / "blobs").glob("*.residual")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert store.residuals.carried(of_round(rounded, 2)) == Carried()
    assert "is damaged" in caplog.text
    assert "run run-1 goes on without" in caplog.text


def test_the_same_job_again_gets_the_same_bytes_and_goes_on_from_the_same_residual(store, rounded):
    """Another run on the same models counts what was sealed for the first; then it seals for itself."""
    first, other = of_round(rounded, 1), replace(of_round(rounded, 1), run=RunId("run-2"))
    sealed = write(store, first)
    commit(store, first)
    store.residuals.forget(first.run)
    store.readdress(sealed.digest, other.key)
    commit(store, other)
    assert store.residuals.carried(of_round(other, 2)).digest == sealed.head.left_over
    assert store.residuals.carried(of_round(first, 2)) == Carried()


def test_a_run_with_another_history_keeps_its_own(store, rounded):
    first, second = of_round(rounded, 1), of_round(rounded, 2)
    write(store, first)
    commit(store, first)
    sealed = write(store, second, 0.03)
    commit(store, second)
    forked = replace(second, run=RunId("run-2"), round=1)
    store.readdress(sealed.digest, forked.key)
    commit(store, forked)
    assert store.residuals.carried(of_round(forked, 2)) == Carried()


def test_residuals_of_ended_runs_go_with_the_bytes_that_left_them(store, rounded, tmp_path):
    folder = tmp_path / "zone"
    write(store, rounded)
    commit(store, rounded)
    store.prune(keep_bytes=0)
    assert files(folder) == 1, "the run has it"
    store.residuals.forget(rounded.run)
    assert files(folder) == 0


def test_pruning_counts_what_was_left_over_too(store, rounded, tmp_path):
    folder = tmp_path / "zone"
    for number in (1, 2):
        write(store, of_round(rounded, number), 0.1 * number)
        commit(store, of_round(rounded, number))
    sizes = [path.stat().st_size for path in (folder / "blobs").iterdir()]
    assert store.prune(keep_bytes=sum(sizes)) == []
    (pruned,) = store.prune(keep_bytes=sum(sizes) - 1)
    assert pruned == (f"{1:064x}", rounded.task.hash)
    assert files(folder) == 1


def test_only_so_many_runs_keep_theirs(store, rounded):
    plans = [replace(of_round(rounded, number), run=RunId(f"run-{number}")) for number in range(1, KEEP_RUNS + 2)]
    for plan in plans:
        write(store, plan)
        commit(store, plan)
    assert store.residuals.carried(of_round(plans[0], 99)) == Carried()
    assert store.residuals.carried(of_round(plans[1], 99)).digest


def test_a_store_of_the_release_before_gets_what_it_lacks(store, rounded, tmp_path):
    store.close()
    with sqlite3.connect(tmp_path / "zone" / "zone.sqlite") as database:
        database.executescript("drop table carried; drop table residuals; pragma user_version = 1;")
    database.close()
    again = ZoneStore(tmp_path / "zone", "test", EU)
    write(again, rounded)
    commit(again, rounded)
    assert carried(again, rounded) == exact_sum(0.1) - round(exact_sum(0.1) / 2**DROP) * 2**DROP
    again.close()


def test_what_left_in_one_form_does_not_leave_in_another(plan, rounded):
    for sealed_as, asked_as in (
        (plan, rounded),
        (rounded, plan),
        (rounded, replace(plan, partial_encoding="rounded-8")),
    ):
        head = sealed_of(sealed_as, Carried(), 0.1)[0].head
        assert objection_to_resending(POLICY, asked_as, head) is Reason.ALREADY_RELEASED
        assert objection_to_resending(POLICY, sealed_as, head) is None
    assert plan.task.hash == rounded.task.hash, "it is one release, in one form"


# ---------------------------------------------------------------- a region, over real gRPC


async def joined(connect, combiner, kits):
    return [await connect(kit, combiner.addresses[0]) for kit in kits]


async def partial_of(controller, clients, plan, value):
    """Offer a round, hand in three times ``value``; the head of what comes, its one integer, and its digest."""
    await controller.offer(plan)
    await asyncio.gather(*(client.until_sealed(plan, value=value) for client in clients))
    async with asyncio.timeout(10):
        key, head, partial, digest = await controller.partials.get()
    assert key == plan.key
    (one,) = set(partial.sums["train"].tolist())
    return head, one, digest


async def counted(controller, clients, plan, digest, made):
    controller.commit(plan, digest, made)
    for client in clients:
        while (await client.event("receipt")).state != 4:
            pass


def on(plan: Plan, number: int, model) -> Plan:
    return replace(plan, round=number, base=replace(plan.base, version=number - 1, model_hash=model.hash))


async def test_what_rounding_leaves_over_crosses_with_the_next_sum_also_after_a_restart(
    start_combiner, controller, client_kits, connect, rounded, toy_model, combiner_kit
):
    models = [toy_model(float(number)) for number in range(4)]
    for model in models:
        controller.models[model.hash] = model.outgoing
    plans = [on(rounded, number + 1, models[number]) for number in range(3)]
    total, exact, before, digests = 0, 0, "", []
    for times, numbers in enumerate(((0, 1), (2,)), start=1):
        async with start_combiner() as combiner:
            await controller.attached(times)
            clients = await joined(connect, combiner, client_kits[:3])
            for number in numbers:
                value = (0.1, -0.03, 0.007)[number]
                head, one, digest = await partial_of(controller, clients, plans[number], value)
                assert (head.drop_bits, head.carried) == (DROP, before)
                total, exact, before = total + one * 2**DROP, exact + exact_sum(value), head.left_over
                assert abs(exact - total) <= 2 ** (DROP - 1)
                digests.append((digest, head.carried, head.left_over))
                await counted(controller, clients, plans[number], digest, models[number + 1])
            store = combiner.region.store
            left_over = store.residuals.carried(of_round(rounded, 9))
            assert total + int(values_of(left_over.sums)[0]) == exact
            rows = [row.row() for row in store.ledger.signed_rows()]
            verify_rows(store.ledger.signed_rows(), combiner_kit.ledger.certificate)
            await combiner.kill()
    crossings = [row.crossing for row in rows if row.crossing]
    assert [(row.digest, row.carried, row.left_over) for row in crossings] == digests
    assert all((row.exact_in_two_tiers, row.drop_bits) == (False, DROP) for row in crossings)


@pytest.mark.parametrize("how", ["cancelled", "evaluated"])
async def test_a_run_that_is_over_has_none_any_more(
    start_combiner, controller, client_kits, connect, rounded, toy_model, how
):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        _, _, digest = await partial_of(controller, clients, rounded, 0.1)
        await counted(controller, clients, rounded, digest, toy_model(1.0))
        residuals = combiner.region.store.residuals
        assert residuals.carried(of_round(rounded, 2)).digest
        if how == "cancelled":
            controller.withdraw(of_round(rounded, 2).key, "run_cancelled")
        else:
            controller.refuse(replace(rounded.key, task=TaskKind.EVALUATE, round=2), "late")
        async with asyncio.timeout(10):
            while residuals.carried(of_round(rounded, 2)).digest:
                await asyncio.sleep(0.01)


async def test_a_sum_that_left_exact_does_not_leave_rounded_for_another_run(
    start_combiner, controller, client_kits, connect, plan, rounded
):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await partial_of(controller, clients, plan, 0.1)
        await controller.offer(replace(rounded, run=RunId("run-2")))
        async with asyncio.timeout(10):
            abstained = await controller.abstained.get()
        assert (abstained.key.run, abstained.code) == ("run-2", "already_released")
        assert controller.partials.empty()


@pytest.mark.parametrize("in_time", [True, False], ids=["in time", "too late"])
async def test_a_seal_waits_for_a_verdict_that_is_being_settled_but_not_for_ever(
    start_combiner, controller, client_kits, connect, rounded, toy_model, monkeypatch, caplog, in_time
):
    """The verdict has come, the model that proves it has not: the next round is on a model that is here."""
    if not in_time:
        monkeypatch.setattr("combiners.session.SETTLE_S", 0.1)
    made, base = toy_model(1.0), toy_model(2.0)
    controller.models[base.hash] = base.outgoing
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        first, _, digest = await partial_of(controller, clients, rounded, 0.1)
        controller.commit(rounded, digest, made)
        controller.models.pop(made.hash)
        second = on(rounded, 2, base)
        next_one = asyncio.create_task(partial_of(controller, clients, second, -0.03))
        if in_time:
            attempts = combiner.region.region.attempts
            async with asyncio.timeout(20):
                while second.key not in attempts or attempts[second.key].phase is not Phase.WRITING:
                    await asyncio.sleep(0.01)
            controller.models[made.hash] = made.outgoing
        head, _, _ = await next_one
        assert head.carried == (first.left_over if in_time else "")
        assert bool(head.left_over) is in_time
        assert ("what rounding leaves out is not kept" in caplog.text) is not in_time
