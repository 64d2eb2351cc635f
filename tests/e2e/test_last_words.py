"""Every update gets its last word without an operator, whatever was down when that was spoken.

A whole federation in one loop, over real gRPC; each test ends with every client's own log and with the audit.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from federations import InProcess, job, noisy_app
from proxies import Proxy

from combiners.auditing import audit_region
from controller.auditing import audit_controller
from hierfl.audit import Kind
from hierfl.client.receiptlog import FILE, read_log
from hierfl.pki import Kit
from hierfl.receipts import ReceiptState
from hierfl.types import RunId

pytestmark = pytest.mark.timeout(180)

REGIONS = {"eu": ["eu-a", "eu-b"], "us": ["us-a", "us-b"]}


def last_words(federation: InProcess, region: str) -> set[tuple[int, str, int, str]]:
    """Round, state, version and reason of every line that the clients of a region keep."""
    logs = (federation.directory / "clients" / region).glob(f"*/{FILE}")
    return {(one.key.round, str(one.state), one.version, one.reason) for log in logs for one in read_log(log)}


def held(federation: InProcess) -> list[Path]:
    return list(federation.directory.glob("clients/*/*/updates/*"))


def audited(federation: InProcess, run: RunId) -> list[str]:
    """What the audit calls wrong, or not over yet."""
    state, summaries, found = federation.directory, {}, []
    for region in REGIONS:
        kit = Kit.load(state / "kits" / "regions" / region / "combiner")
        book, summary, _ = audit_region(run, state / "regions" / region, kit, anyway=True)
        summaries[summary.region] = summary
        found += book.findings
    report = audit_controller(run, state / "controller", Kit.load(state / "kits" / "controller"), summaries, again=True)
    return [str(one) for one in (*found, *report.book.findings) if one.kind is not Kind.PRUNED]


async def test_a_run_cancelled_while_a_region_is_down_is_heard_of_by_its_clients_when_it_is_back(federate):
    async with federate(REGIONS) as federation:
        await federation.stop_clients("us")  # so that the attempt stays open
        run = await federation.submit(job(rounds=1, min_regions=2, min_clients=2, evaluate_every=0))
        await federation.hear("sealed in the region's sum", times=2)
        (address,) = federation.combiners["eu"].addresses
        await federation.combiners["eu"].kill()
        async with federation.operator() as operator:
            assert await operator.cancel(run) == "cancelled"
        await federation.restart_controller()  # what waited for the region in its memory is gone
        await federation._open_combiner("eu", address)
        await federation.hear("not counted (run_cancelled)", times=2)
        assert last_words(federation, "eu") == {(1, ReceiptState.NOT_COUNTED, 0, "run_cancelled")}
        assert held(federation) == []
        assert await asyncio.to_thread(audited, federation, run) == []


async def test_a_region_that_comes_back_after_the_run_has_ended_learns_that_its_sum_came_too_late(federate):
    gate, links = threading.Event(), []

    async def between(name: str, address: str) -> str:
        if name != "controller":
            return address
        links.append(Proxy(address))
        await links[-1].start()
        return links[-1].address

    app = noisy_app(on_train=lambda seed: gate.wait(60) and None)
    async with federate(REGIONS, app=app, between=between) as federation:
        run = await federation.submit(job(rounds=1, min_regions=1, min_clients=2, evaluate_every=0))
        await federation.hear("round 1: training", times=4)
        await links[0].stop()  # of eu, the first that was started
        gate.set()
        await federation.hear("eu-a/client-00: round 1: sealed")
        found = await federation.outcome(run)
        assert [[share.region for share in item.regions] for item in found.rounds] == [["us"]]
        (address,) = federation.combiners["eu"].addresses
        await federation.combiners["eu"].kill()
        await federation._open_combiner("eu", address)
        await federation.hear("not counted (late)", times=2)
        await federation.hear("counted in model version 1", times=2)
        assert last_words(federation, "eu") == {(1, ReceiptState.NOT_COUNTED, 0, "late")}
        assert last_words(federation, "us") == {(1, ReceiptState.COMMITTED, 1, "")}
        assert await asyncio.to_thread(audited, federation, run) == []
        for link in links[1:]:
            await link.stop()


async def test_a_region_that_misses_the_verdict_learns_it_from_the_next_controller(federate):
    """Counted while the region was down: the word waits for it, over a restart of both."""
    async with federate(REGIONS) as federation:
        await federation.stop_clients("us")
        run = await federation.submit(job(rounds=1, min_regions=2, min_clients=2, evaluate_every=0))
        await federation.hear("sealed in the region's sum", times=2)
        async with federation.operator() as operator, asyncio.timeout(20):
            async for snapshot in operator.follow(run):
                if "sealed" in {one.phase for one in snapshot.regions if one.region == "eu"}:
                    break
        (address,) = federation.combiners["eu"].addresses
        await federation.combiners["eu"].kill()
        federation.start_clients("us")
        found = await federation.outcome(run)
        assert found.summary.state == "finished"
        await federation.restart_controller()
        await federation._open_combiner("eu", address)
        await federation.hear("counted in model version 1", times=4)
        assert last_words(federation, "eu") == {(1, ReceiptState.COMMITTED, 1, "")}
        assert held(federation) == []
        assert await asyncio.to_thread(audited, federation, run) == []


async def test_a_sum_that_counts_in_a_second_run_is_audited_there_as_the_first_ones(federate):
    async with federate(REGIONS) as federation:
        first, second = [await federation.train(job(rounds=2, min_regions=2, min_clients=2)) for _ in range(2)]
        assert first.summary.model_hash == second.summary.model_hash
        assert {share.collected_in for item in second.rounds for share in item.regions} == {first.summary.run}
        await federation.hear("counted in model version 2", times=8)
        for run in (first, second):
            assert await asyncio.to_thread(audited, federation, run.summary.run) == []


async def test_a_partial_that_is_counted_in_a_later_attempt_than_it_was_collected_in_is_no_mismatch(federate):
    async with federate(REGIONS) as federation:
        await federation.stop_clients("us")
        rules = {"report_timeout_s": 3, "silence_s": 0.5, "max_abandoned": 50, "evaluate_every": 0}
        run = await federation.submit(job(rounds=1, min_regions=2, min_clients=2, **rules))
        await federation.hear("sealed in the region's sum", times=2)
        async with federation.operator() as operator, asyncio.timeout(30):
            async for snapshot in operator.follow(run):
                if snapshot.summary.rounds_abandoned:
                    break
        federation.start_clients("us")
        found = await federation.outcome(run)
        assert found.rounds[0].attempts > 1
        await federation.hear("counted in model version 1", times=4)
        assert last_words(federation, "eu") == {(1, ReceiptState.COMMITTED, 1, "")}
        assert await asyncio.to_thread(audited, federation, run) == []
