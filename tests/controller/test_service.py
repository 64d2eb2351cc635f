"""Rounds from submission to verdict: real gRPC, real certificates, regions that send real partials."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import numpy as np
import pytest
from cryptography import x509

from hierfl import documents, observe, spans
from hierfl.errors import (
    ConfigError,
    DigestMismatch,
    NotFound,
    PermissionRefused,
    RegionRejected,
    RoundClosed,
    StaleEpoch,
    TransferIncomplete,
    ValueOutOfRange,
)
from hierfl.job import PartialChoice
from hierfl.layout import Layout
from hierfl.operator import connect
from hierfl.pki import verify
from hierfl.records import COMMIT_CONTEXT, CommitRecord
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc
from hierfl.wire.packed import outgoing_partial
from hierfl.wire.transfer import Outgoing


async def ended(operator, run):
    """All snapshots of a run until its end."""
    async with asyncio.timeout(20):
        return [snapshot async for snapshot in operator.follow(run)]


async def test_a_run_of_two_rounds_makes_the_mean_model_and_tells_everyone(three, job):
    operator = await three.operator()
    regions = [await three.region(name) for name in ("ap", "eu", "us")]
    run = await three.submit(operator, job(2, min_regions=3))
    for version in (1, 2):
        plans = await asyncio.gather(
            regions[0].answer([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
            regions[1].answer([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]),
            regions[2].answer([[0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]),
        )
        assert {(plan.round, plan.base.version) for plan in plans} == {(version, version - 1)}
        for region in regions:
            verdict = (await region.next("verdict")).verdict
            assert (verdict.committed, verdict.model_version) == (True, version)
            verify(
                x509.load_der_x509_certificate(verdict.certificate), verdict.signature, verdict.record, COMMIT_CONTEXT
            )
            record = documents.decode(verdict.record, CommitRecord, "record")
            mine = next(partial for partial in record.partials if partial.region == region.name)
            assert mine.digest == verdict.partial_digest
            assert record.previous_hash == plans[0].base.model_hash
            assert (await region.model(record.model_hash)).tolist() == [version * 0.5] * 3
    snapshots = await ended(operator, run)
    assert snapshots[-1].summary.state == "finished"
    assert [s.committed.round for s in snapshots if s.HasField("committed")] == [1, 2]
    told = await operator.run(run)
    assert told.summary.rounds_committed == 2
    assert [share.region for share in told.rounds[0].regions] == ["ap", "eu", "us"]
    assert told.rounds[0].regions[0].bytes_out > 24
    assert (told.rounds[0].weight, told.rounds[0].num_sites, told.rounds[0].num_updates) == (6, 6, 6)
    assert told.rounds[0].metrics["num_examples"] == 12.0
    assert told.rounds[0].metrics["train_loss"] == 1.5
    models = await operator.models(run)
    assert [model.version for model in models] == [0, 1, 2]
    assert Layout.from_bytes(models[0].layout).num_params == 3
    assert (await operator.fetch_model(models[2]))[1]["train"].tolist() == [1.0] * 3


async def test_the_operator_sees_what_the_round_waits_for(three, job):
    operator = await three.operator()
    eu = await three.region("eu")
    run = await three.submit(operator, job(min_clients=3, silence_s=0.5))
    snapshot = await three.until(operator, run, lambda s: "absent" in s.waiting_for)
    assert snapshot.waiting_for == "1 of 3 regions attached; ap is absent; us is absent"
    us = await three.region("us")
    _, plan = await us.plan()
    await us.report(key=pb.AttemptKey(run=run, task=1, round=1, attempt=1), phase="waiting", clients_ready=1)
    snapshot = await three.until(operator, run, lambda s: "1 of 3 clients" in s.waiting_for)
    assert snapshot.phase == "collecting"
    assert "us has 1 of 3 clients" in snapshot.waiting_for
    progress = {region.region: region for region in snapshot.regions}
    assert (progress["us"].phase, progress["us"].clients_ready, progress["us"].clients_needed) == ("waiting", 1, 3)
    assert progress["ap"].phase == "absent"
    assert plan.min_clients == 3
    status = await operator.status()
    assert {region.region: region.state for region in status.regions} == {
        "ap": "absent",
        "eu": "attached",
        "us": "attached",
    }
    assert status.regions[2].clients_connected == 3
    assert await operator.cancel(run) == "cancelled"
    await eu.plan()
    assert (await eu.next("withdrawal")).withdrawal.reason == "run_cancelled"
    verdict = (await eu.next("verdict")).verdict
    assert (verdict.committed, verdict.reason) == (False, "run_cancelled")


async def test_a_region_that_dies_costs_the_others_no_round_once_its_silence_is_noticed(three, job):
    operator = await three.operator()
    eu, us, ap = [await three.region(name) for name in ("eu", "us", "ap")]
    run = await three.submit(operator, job(silence_s=0.5))
    _, plan = await ap.plan()
    await ap.close()
    await asyncio.gather(eu.answer(), us.answer())
    assert (await ended(operator, run))[-1].summary.rounds_committed == 1
    back = await three.region("ap", region_epoch=2, pending=[((await eu.next("verdict")).verdict.key, "blake3:00")])
    verdict = (await back.next("verdict")).verdict
    assert (verdict.committed, verdict.partial_digest, verdict.reason) == (True, "", "late")
    with pytest.raises(RoundClosed):
        await back.uplink(plan, back.partial(plan))


async def test_abstaining_regions_abandon_the_round_and_then_pause_the_run_with_the_reason(running, job):
    operator = await running.operator()
    eu, us = [await running.region(name) for name in ("eu", "us")]
    run = await running.submit(operator, job(max_abandoned=2, silence_s=0.5))
    for attempt in (1, 2):
        for region in (eu, us):
            _, plan = await region.plan()
            assert plan.attempt == attempt
            await region.abstain(plan)
        for region in (eu, us):
            assert (await region.next("withdrawal")).withdrawal.reason == "attempt_abandoned"
    snapshot = await running.until(operator, run, lambda s: s.summary.state == "paused")
    assert snapshot.summary.rounds_abandoned == 2
    assert snapshot.summary.reason == (
        "round 1: 2 attempts in a row were abandoned; the last one: quorum out of reach: 0 of 2 regions needed;"
        " eu abstained (too_few_sites); us abstained (too_few_sites)"
    )
    assert await operator.resume(run) == "running"
    plans = await asyncio.gather(eu.answer(), us.answer())
    assert {plan.attempt for plan in plans} == {3}
    assert (await ended(operator, run))[-1].summary.state == "finished"


async def test_a_partial_sent_for_an_abandoned_attempt_counts_in_the_next(three, job):
    operator = await three.operator()
    ap, eu, us = [await three.region(name) for name in ("ap", "eu", "us")]
    run = await three.submit(operator, job(silence_s=0.5))
    first = await eu.answer()
    for region in (ap, us):
        await region.abstain((await region.plan())[1])
    await eu.next("withdrawal")
    _, second = await eu.plan()
    assert (second.attempt, second.task.hash) == (2, first.task.hash)
    await eu.uplink(second, eu.partial(second))  # the same sealed bytes, addressed anew
    with pytest.raises(DigestMismatch):
        await eu.uplink(second, eu.partial(second, [[7.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    await us.next("withdrawal")
    await us.answer()
    await ap.close()
    assert (await ended(operator, run))[-1].summary.state == "finished"
    verdict = (await eu.next("verdict")).verdict
    assert verdict.partial_digest == eu.partial(first).digest


async def test_the_same_partial_gets_the_same_answer_again_and_another_is_refused(running, job):
    operator = await running.operator()
    eu, us = [await running.region(name) for name in ("eu", "us")]
    run = await running.submit(operator, job())
    _, plan = await eu.plan()
    outgoing = eu.partial(plan)
    first = await eu.uplink(plan, outgoing)
    assert (await eu.uplink(plan, outgoing)).digest == first.digest
    other = eu.partial(plan, [[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    with pytest.raises(DigestMismatch):
        await eu.uplink(plan, other)
    await us.answer()
    await ended(operator, run)
    assert (await eu.uplink(plan, outgoing)).digest == first.digest  # however late
    with pytest.raises(DigestMismatch):
        await eu.uplink(plan, other)


async def test_a_partial_that_ended_early_goes_on_where_it_broke_off_and_counts_once(running, job):
    operator = await running.operator()
    eu, us = [await running.region(name) for name in ("eu", "us")]
    run = await running.submit(operator, job())
    _, plan = await eu.plan()
    outgoing = eu.partial(plan)
    header, *chunks, _ = outgoing.frames(plan.key)
    there = []
    for frames in ([header, *chunks[:-1]], [header, chunks[-1]], [header]):
        call = eu.stub.Uplink(metadata=((rpc.RESUME, outgoing.digest),))
        await call.write(frames[0])
        there.append(rpc.chunks_there(tuple(await call.initial_metadata())))
        for frame in frames[1:]:
            await call.write(frame)
        await call.done_writing()
        with pytest.raises(grpc.RpcError) as caught:
            await call
        assert isinstance(eu.stub.error(caught.value), TransferIncomplete)
    assert there == [0, len(chunks) - 1, len(chunks)]
    await eu.uplink(plan, outgoing)
    await us.answer()
    assert (await ended(operator, run))[-1].summary.state == "finished"
    told = await operator.run(run)
    assert [share.region for share in told.rounds[0].regions] == ["eu", "us"]
    assert told.rounds[0].num_updates == 4


@pytest.mark.parametrize(
    "falsify",
    [
        {"region": "us"},
        {"base_model_hash": "0" * 64},
        {"task_hash": "sha256:00"},
        {"num_sites": 1},
        {"weight": 1},
        {"groups": ()},
        {"metrics": {"num_examples": 2**50}},
        {"metrics": {"site_loss": 1}},
        {"drop_bits": 20},
    ],
    ids=str,
)
async def test_a_partial_that_breaks_its_plan_is_refused_and_its_region_not_waited_for(running, job, falsify):
    operator = await running.operator()
    eu, us = [await running.region(name) for name in ("eu", "us")]
    run = await running.submit(operator, job(min_regions=1))
    _, plan = await eu.plan()
    with pytest.raises(RegionRejected, match="is refused"):
        await eu.uplink(plan, eu.partial(plan, **falsify))
    with pytest.raises(RoundClosed):
        await eu.uplink(plan, eu.partial(plan))
    await us.answer()
    assert (await ended(operator, run))[-1].summary.state == "finished"
    told = (await operator.run(run)).rounds[0]
    assert [share.region for share in told.regions] == ["us"]


@pytest.mark.parametrize("value", [2 * 8 * 2**32 + 1, -(2**63)])
async def test_a_sum_above_what_its_weight_can_make_is_refused(running, job, value):
    operator = await running.operator()
    eu, us = [await running.region(name) for name in ("eu", "us")]
    run = await running.submit(operator, job(min_regions=1))
    _, plan = await eu.plan()
    meta = eu.partial(plan).descriptor.meta.encode()
    sums = {"train": np.array([0, value, 0])}
    with pytest.raises(RegionRejected, match="has a sum above what its weight can make"):
        await eu.uplink(plan, outgoing_partial(plan.base.layout_hash, plan.task.groups, sums, meta))
    await us.answer()
    assert (await ended(operator, run))[-1].summary.state == "finished"


@pytest.mark.parametrize(("value", "good"), [(2 * 8 * 2**12 + 1, True), (2 * 8 * 2**12 + 2, False)])
async def test_a_rounded_sum_may_be_a_step_larger_and_no_more(running, job, value, good):
    operator = await running.operator()
    eu, us = [await running.region(name) for name in ("eu", "us")]
    made = replace(job(min_regions=1), partials=PartialChoice(drop_bits=20))
    run = await running.submit(operator, made)
    _, plan = await eu.plan()
    assert plan.partial_encoding == "rounded-20"
    meta = eu.partial(plan, drop_bits=20).descriptor.meta.encode()
    outgoing = outgoing_partial(plan.base.layout_hash, plan.task.groups, {"train": np.array([0, value, 0])}, meta)
    if good:
        await eu.uplink(plan, outgoing)
    else:
        with pytest.raises(RegionRejected, match="has a sum above what its weight can make"):
            await eu.uplink(plan, outgoing)
    _, plan = await us.plan()
    await us.uplink(plan, us.partial(plan, ((0, 0, 0), (0, 0, 0)), drop_bits=20))
    assert (await ended(operator, run))[-1].summary.state == "finished"
    told = await operator.run(run)
    assert not told.summary.exact_in_two_tiers
    assert [share.region for share in told.rounds[0].regions] == (["eu", "us"] if good else ["us"])
    models = {model.version: model for model in await operator.models(run)}
    assert (models[0].approximate_across_regions, models[1].approximate_across_regions) == (False, True)


async def test_packed_sums_with_fewer_words_than_their_widths_say_are_refused(running, job):
    operator = await running.operator()
    eu, us = [await running.region(name) for name in ("eu", "us")]
    run = await running.submit(operator, job(min_regions=1))
    _, plan = await eu.plan()
    meta = eu.partial(plan).descriptor.meta.encode()
    vectors = {
        "widths": np.full(1, 64, np.uint8),
        "references": np.zeros(1, np.int64),
        "words": np.zeros(15, np.uint64),
    }
    with pytest.raises(RegionRejected, match="have 16 words, not 15"):
        await eu.uplink(plan, Outgoing("partial", plan.base.layout_hash, vectors, meta, "packed"))
    await us.answer()
    assert (await ended(operator, run))[-1].summary.state == "finished"


async def test_a_partial_of_another_layout_is_refused_by_its_header(running, job):
    operator = await running.operator()
    eu, us = [await running.region(name) for name in ("eu", "us")]
    run = await running.submit(operator, job(min_regions=1))
    _, plan = await eu.plan()
    meta = eu.partial(plan).descriptor.meta.encode()
    (group,) = plan.task.groups
    for layout, size in (("0" * 64, 3), (plan.base.layout_hash, 1025)):
        groups = (replace(group, num_values=size),)
        with pytest.raises((RegionRejected, RoundClosed)):
            await eu.uplink(plan, outgoing_partial(layout, groups, {"train": np.zeros(size, np.int64)}, meta))
    await us.answer()
    assert (await ended(operator, run))[-1].summary.state == "finished"


async def test_an_older_start_of_a_region_is_refused_and_the_newer_stream_ends_it(running):
    old = await running.region("eu", region_epoch=2)
    new = await running.region("eu", region_epoch=3)
    with pytest.raises(StaleEpoch):
        await old.next("offer")
    with pytest.raises(grpc.RpcError) as refused:
        await old.report()
    assert isinstance(old.stub.error(refused.value), StaleEpoch)
    older = running.region_of("eu", region_epoch=1)
    with pytest.raises(StaleEpoch):
        await older.attach()
    await new.report()


async def test_a_leader_goes_above_the_epoch_that_a_region_has_seen(three, job):
    operator = await three.operator()
    eu, us = [await three.region(name) for name in ("eu", "us")]
    await three.submit(operator, job())
    offer, _ = await eu.plan()
    assert offer.leader_epoch == 1
    ap = await three.region("ap", leader_epoch=7)
    assert ap.greeting.leader_epoch == 8
    offer, _ = await eu.plan()
    assert offer.leader_epoch == 8
    await us.next("offer")
    offer, plan = await us.plan()
    assert (offer.leader_epoch, plan.attempt) == (8, 1)


async def test_the_last_evaluation_adds_its_metrics_to_the_finished_run(running, job):
    operator = await running.operator()
    eu, us = [await running.region(name) for name in ("eu", "us")]
    run = await running.submit(operator, job(1, evaluate_every=1))
    plans = await asyncio.gather(eu.answer(), us.answer())
    assert plans[0].task.evaluate
    for region in (eu, us):
        await region.next("verdict")
    sums = {"eval_examples": 4, "eval_loss_sum": 2 << 20, "eval_correct": 3}
    for region in (eu, us):
        _, plan = await region.plan()
        assert (plan.task.kind, plan.round, plan.task.groups) == ("evaluate", 2, ())
        assert plan.base.version == 1
        await region.uplink(plan, region.partial(plan, metrics=sums))
    for region in (eu, us):
        verdict = (await region.next("verdict")).verdict
        assert (verdict.committed, verdict.model_version, verdict.record) == (True, 1, b"")
        assert verdict.partial_digest
    assert (await ended(operator, run))[-1].summary.state == "finished"
    last = (await operator.run(run)).rounds[-1]
    assert (last.task, last.model_version) == (pb.TASK_KIND_EVALUATE, 1)
    assert last.metrics["eval_accuracy"] == 0.75
    assert last.metrics["eval_loss"] == 0.5
    assert last.metrics["eval_examples"] == 16.0


async def test_a_run_whose_regions_cannot_evaluate_is_finished_all_the_same(running, job):
    operator = await running.operator()
    eu, us = [await running.region(name) for name in ("eu", "us")]
    run = await running.submit(operator, job(1, evaluate_every=1))
    await asyncio.gather(eu.answer(), us.answer())
    for region in (eu, us):
        await region.next("verdict")
        await region.abstain((await region.plan())[1])
    summary = (await ended(operator, run))[-1].summary
    assert summary.state == "finished"
    assert summary.reason.startswith("without the last evaluation: quorum out of reach")
    assert (summary.rounds_committed, summary.rounds_abandoned) == (1, 0)


async def test_evaluation_rides_with_every_so_many_rounds(running, job):
    operator = await running.operator()
    eu, us = [await running.region(name) for name in ("eu", "us")]
    await running.submit(operator, job(3, evaluate_every=2))
    seen = []
    for _ in range(3):
        plan, _ = await asyncio.gather(eu.answer(), us.answer())
        seen.append(plan.task.evaluate)
        await asyncio.gather(eu.next("verdict"), us.next("verdict"))
    assert seen == [True, False, True]


async def test_several_runs_share_the_regions(running, job):
    operator = await running.operator()
    eu, us = [await running.region(name) for name in ("eu", "us")]
    runs = [await running.submit(operator, job(), values=[float(n)] * 3) for n in range(3)]
    for region in (eu, us):
        answered = {(await region.answer()).run for _ in range(3)}
        assert answered == set(runs)
    for run in runs:
        assert (await ended(operator, run))[-1].summary.state == "finished"
    assert [summary.run for summary in await operator.runs()] == runs


async def test_a_strategy_that_cannot_go_on_fails_its_run_and_no_other(running, job):
    operator = await running.operator()
    eu, us = [await running.region(name) for name in ("eu", "us")]
    doomed = await running.submit(operator, job(strategy="fedavg", learning_rate=1e38))
    for region in (eu, us):
        await region.answer([[8.0, 8.0, 8.0]] * 2)
    summary = (await ended(operator, doomed))[-1].summary
    assert summary.state == "failed"
    assert summary.reason.startswith("strategy fedavg: value 0 of vector 'train' would become inf")
    assert (await eu.next("withdrawal")).withdrawal.reason == "run_failed"
    verdict = (await eu.next("verdict")).verdict
    assert (verdict.committed, verdict.reason) == (False, "run_failed")
    healthy = await running.submit(operator, job())
    await asyncio.gather(eu.answer(), us.next("withdrawal"))
    await us.next("verdict")
    await us.answer()
    assert (await ended(operator, healthy))[-1].summary.state == "finished"


async def test_a_job_that_this_federation_cannot_run_is_refused_with_its_key(running, job):
    operator = await running.operator()
    model = await operator.upload_model(Layout.of({"w": np.zeros(3, np.float32)}), {"train": np.zeros(3, np.float32)})
    with pytest.raises(ConfigError, match=r"round\.min_regions = 4 must be at most 2"):
        await operator.submit(job(min_regions=4), model)
    with pytest.raises(ConfigError, match=r"strategy\.name"):
        await operator.submit(job(strategy="fedavgg"), model)
    with pytest.raises(NotFound):
        await operator.submit(job(), "0" * 64)
    assert await operator.runs() == []


async def test_a_model_with_a_value_that_is_not_finite_is_refused_by_its_tensor(running):
    operator = await running.operator()
    layout = Layout.of({"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)})
    with pytest.raises(ValueOutOfRange, match="'b'"):
        await operator.upload_model(layout, {"train": np.array([0, 0, np.nan], np.float32)})


async def test_what_is_not_there_is_not_found_by_name(running):
    operator = await running.operator()
    with pytest.raises(NotFound, match="none was submitted yet"):
        await operator.run("nothing")
    for call in (operator.cancel, operator.resume, operator.models):
        with pytest.raises(NotFound):
            await call("nothing")
    with pytest.raises(NotFound):
        await operator.fetch_model(pb.Model(model_hash="0" * 64, layout_hash="0" * 64))


async def test_a_request_made_twice_submits_once(running, job):
    operator = await running.operator()
    run = await running.submit(operator, job())
    model = (await operator.models(run))[0].model_hash
    request = pb.SubmitRunRequest(job=documents.encode(job()), model_hash=model, request_id="once")
    first, second = [await operator._call("SubmitRun", request) for _ in range(2)]
    assert first.run == second.run != run
    assert len(await operator.runs()) == 2


async def test_roles_are_kept_apart(running):
    with pytest.raises(PermissionRefused):
        async with connect(running.kit("regions", "eu", "combiner"), running.address):
            pass


async def test_a_round_is_one_trace_over_the_controllers_spans(federation, job):
    observe.configure("controller", federation.directory)
    try:
        async with federation.controller():
            operator = await federation.operator()
            eu, us = [await federation.region(name) for name in ("eu", "us")]
            run = await federation.submit(operator, job())
            offer, plan = await eu.plan()
            with observe.remote_parent(offer.traceparent), observe.span(observe.SPAN_UPLINK):
                await eu.uplink(plan, eu.partial(plan))
            await us.answer()
            await ended(operator, run)
            await federation.close()
    finally:
        observe.shutdown()
    written, _ = spans.read(federation.directory)
    mine = [span for span in written if span.trace == offer.traceparent.split("-")[1]]
    assert {span.name for span in mine} == {
        observe.SPAN_ROUND,
        observe.SPAN_PLAN,
        observe.SPAN_UPLINK,
        observe.SPAN_RECEIVE,
        observe.SPAN_MERGE,
        observe.SPAN_COMMIT,
        observe.SPAN_ANNOUNCE,
    }
