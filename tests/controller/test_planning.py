"""From a job to plans, from partials to a model, and what an open attempt shows of time: plain calls."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from controller.blobs import Blobs
from controller.collection import Collection
from controller.committing import commit_record
from controller.merge import check_head, merge_partials, next_model
from controller.planning import new_attempt, new_run, plan_for, run_id
from controller.registry import Progress, Registry
from controller.rows import AnswerRow
from hierfl import documents
from hierfl.aggregation import Accumulator
from hierfl.errors import ConfigError, RegionRejected, RequirementUnknown, RunFailed, StoreDamaged
from hierfl.feedback import round_off
from hierfl.job import Arithmetic, PartialChoice, RoundRules, StrategyChoice, UpdateChoice
from hierfl.layout import Layout, Role
from hierfl.plan import Plan
from hierfl.records import PartialHead
from hierfl.rounds import Answer, Deadline, Presence
from hierfl.runs import OpenAttempt
from hierfl.types import RegionId, RunId, TaskKind
from hierfl.wire.packed import outgoing_partial

REGIONS = (RegionId("ap"), RegionId("eu"), RegionId("us"))
PARAMS = {"w": np.zeros(3, np.float32), "running_mean": np.ones(2, np.float32)}
LAYOUT = Layout.of(PARAMS, {"running_mean": Role.MEAN})


def run_of(job, blobs=None, **rules):
    vectors = LAYOUT.flatten(PARAMS)
    name = blobs.put_model(LAYOUT, vectors) if blobs else "a" * 64
    return new_run(job(**rules), LAYOUT, name, REGIONS, run=RunId("r"), request_id="", now_unix_ns=1)


def attempt_of(run, task=TaskKind.TRAIN, number=1, attempt=1):
    return new_attempt(run, OpenAttempt(task=task, round=number, attempt=attempt), now_unix_ns=2)


@pytest.mark.parametrize(
    ("name", "slug"),
    [("Digits", "digits-00ff00"), ("Über Größe 7", "ber-gr-e-7-00ff00"), ("!?", "run-00ff00"), ("x" * 99, "x" * 40)],
)
def test_a_run_id_is_a_name_made_from_the_jobs(job, name, slug):
    made = job()
    assert run_id(replace(made, job=replace(made.job, name=name)), "00ff00").startswith(slug)


def test_the_total_weight_is_shared_by_all_provisioned_regions(job):
    run = run_of(job)
    plan = plan_for(run, attempt_of(run), REGIONS[0], "fed")
    assert plan.caps.region_weight == 2**27 // 3
    tight = replace(job(), arithmetic=Arithmetic(max_weight=100, total_weight=299))
    with pytest.raises(ConfigError, match=r"arithmetic\.total_weight"):
        new_run(tight, LAYOUT, "a" * 64, REGIONS, run=RunId("r"), request_id="", now_unix_ns=1)


def test_a_budget_that_exact_sums_could_exceed_is_refused_with_what_would_fit(job):
    layout = Layout.of({"w": np.zeros(100_000, np.float32)})

    def submit(budget, **caps):
        made = job(border_budget_bytes=budget)
        made = replace(made, arithmetic=replace(made.arithmetic, max_weight=1000, **caps))
        return new_run(made, layout, "a" * 64, REGIONS, run=RunId("r"), request_id="", now_unix_ns=1)

    with pytest.raises(ConfigError) as refused:
        submit(600_000)
    words = str(refused.value)
    assert refused.value.key == "round.border_budget_bytes"
    values = {name: float(value) for name, value in re.findall(r"arithmetic\.(\w+) = ([\d.e+-]+)", words)}
    assert submit(600_000, max_abs=values["max_abs"])
    assert submit(600_000, total_weight=int(values["total_weight"]))
    most = int(re.search(r"at least ([\d,]+)", words)[1].replace(",", ""))
    assert submit(most)
    with pytest.raises(ConfigError):
        submit(most - 1)
    assert submit(0)


def rounding(made, drop_bits):
    return replace(made, partials=PartialChoice(drop_bits=drop_bits))


def test_a_budget_that_exact_sums_exceed_names_how_far_rounding_would_have_to_go(job):
    layout = Layout.of({"w": np.zeros(100_000, np.float32)})

    def submit(budget, drop_bits):
        made = rounding(job(border_budget_bytes=budget), drop_bits)
        return new_run(made, layout, "a" * 64, REGIONS, run=RunId("r"), request_id="", now_unix_ns=1)

    with pytest.raises(ConfigError, match="which exact sums can take") as refused:
        submit(500_000, 0)
    found = re.search(r"partials\.drop_bits = (\d+) \(approximate across regions\)", str(refused.value))
    least = int(found[1])
    assert not submit(500_000, least).exact_in_two_tiers
    with pytest.raises(ConfigError, match=f"sums rounded by {least - 1} bits can take.*drop_bits = {least} "):
        submit(500_000, least - 1)
    with pytest.raises(ConfigError) as refused:
        submit(100_000, 0)
    assert "drop_bits" not in str(refused.value), "no rounding makes it fit"


def test_rounding_is_in_the_plan_beside_the_task_and_in_no_evaluation(job):
    exact, rounded = (
        new_run(rounding(job(), bits), LAYOUT, "a" * 64, REGIONS, run=RunId("r"), request_id="", now_unix_ns=1)
        for bits in (0, 20)
    )
    assert (exact.exact_in_two_tiers, rounded.exact_in_two_tiers) == (True, False)
    plans = [plan_for(run, attempt_of(run), REGIONS[0], "fed") for run in (exact, rounded)]
    assert [plan.partial_encoding for plan in plans] == ["packed", "rounded-20"]
    assert plans[0].task.hash == plans[1].task.hash, "one release for one base and task, in one form"
    evaluation = plan_for(rounded, attempt_of(rounded, TaskKind.EVALUATE), REGIONS[0], "fed")
    assert evaluation.partial_encoding == "packed"


def test_a_model_without_sums_that_can_be_rounded_is_refused(job):
    only_means = Layout.of({"running_mean": np.ones(2, np.float32)}, {"running_mean": Role.MEAN})
    with pytest.raises(ConfigError, match=r"partials\.drop_bits = 20 must be 0"):
        new_run(rounding(job(), 20), only_means, "a" * 64, REGIONS, run=RunId("r"), request_id="", now_unix_ns=1)


def test_a_plan_is_the_same_bytes_each_time_and_a_valid_plan(job):
    run = run_of(job)
    attempt = attempt_of(run)
    data = plan_for(run, attempt, REGIONS[1], "fed").to_bytes()
    assert plan_for(run, attempt, REGIONS[1], "fed").to_bytes() == data
    plan = Plan.from_bytes(data)
    assert (plan.base.size_bytes, plan.caps.max_upload_bytes, plan.k) == (20, 20, 2)


def test_attempts_at_one_round_ask_for_the_same_task(job):
    run = run_of(job)
    assert attempt_of(run, attempt=1).spec.hash == attempt_of(run, attempt=2).spec.hash


def test_an_encoding_is_of_the_task_and_the_bytes_of_an_upload_follow_it(job):
    def plan(**updates):
        run = new_run(
            replace(job(), updates=UpdateChoice(**updates)),
            LAYOUT,
            "a" * 64,
            REGIONS,
            run=RunId("r"),
            request_id="",
            now_unix_ns=1,
        )
        return Plan.from_bytes(plan_for(run, attempt_of(run), REGIONS[0], "fed").to_bytes())

    plain, small = plan(), plan(encoding="int8", options={"block": 16})
    assert plain.task.hash != small.task.hash
    assert plan(encoding="int8").task.hash != small.task.hash
    assert plan(encoding="int8", options={"block": 256}).task.hash == plan(encoding="int8").task.hash
    assert small.task.encoding.options == {"block": 16, "rounding": "nearest"}
    assert small.caps.max_upload_bytes == 3 + 4 + 2 * 4, "three codes, one step, and two means as float32"


def test_an_evaluation_has_no_encoding(job):
    run = new_run(
        replace(job(), updates=UpdateChoice(encoding="topk")),
        LAYOUT,
        "a" * 64,
        REGIONS,
        run=RunId("r"),
        request_id="",
        now_unix_ns=1,
    )
    plan = plan_for(run, attempt_of(run, TaskKind.EVALUATE), REGIONS[0], "fed")
    assert (plan.task.encoding.name, plan.caps.max_upload_bytes) == ("float32", 0)


def test_a_plan_with_an_encoding_that_is_unknown_here_is_one_that_cannot_be_obeyed(job):
    run = run_of(job)
    data = plan_for(run, attempt_of(run), REGIONS[0], "fed").to_bytes()
    for name, options in (("float32", "int3"), ('"options":{}', '"options":{"colour":1}')):
        with pytest.raises(RequirementUnknown, match="unknown to this release; upgrade"):
            Plan.from_bytes(data.replace(name.encode(), options.encode()))


def test_an_app_may_name_its_version(job):
    made = job()
    pinned = replace(made, job=replace(made.job, app="digits@1.2"))
    run = new_run(pinned, LAYOUT, "a" * 64, REGIONS, run=RunId("r"), request_id="", now_unix_ns=1)
    assert (attempt_of(run).spec.app, attempt_of(run).spec.app_version) == ("digits", "1.2")


def answers_of(run, attempt, blobs, deltas_by_region, drop_bits=0):
    """Accepted partials, one region a list of (train, mean) deltas of weight 1."""
    rows = []
    for region, deltas in deltas_by_region.items():
        total = Accumulator(run.groups)
        for train, mean in deltas:
            total.fold({"train": [np.array(train, np.float32)], "mean": [np.array(mean, np.float32)]}, 1)
        summed = total.partial(len(deltas))
        if drop_bits:
            summed = round_off(summed, drop_bits, None).partial
        head = PartialHead(
            region=region,
            run=run.run,
            base_model_hash=run.model_hash,
            task_hash=attempt.spec.hash,
            groups=run.groups,
            weight=summed.weight,
            num_sites=summed.num_sites,
            num_updates=summed.num_updates,
            metrics={},
            region_epoch=1,
            seal_id="s",
            drop_bits=drop_bits,
        )
        outgoing = outgoing_partial(run.layout_hash, run.groups, summed.sums, documents.encode(head))
        with blobs.arriving_partial() as file:
            for frame in outgoing.frames():
                file.write(frame)
            file.keep(outgoing.digest)
        rows.append(answer_row(attempt, region, head, outgoing.digest))
    return rows


def answer_row(attempt, region, head=None, blob="blake3:00"):
    return AnswerRow(
        run=attempt.run,
        task=attempt.task,
        round=attempt.round,
        attempt=attempt.attempt,
        region=region,
        received_unix_ns=3,
        digest=blob,
        head=head,
        blob=blob,
    )


def test_partials_of_both_widths_merge_into_the_mean_model(job, tmp_path):
    blobs = Blobs(tmp_path)
    run = run_of(job, blobs)
    attempt = attempt_of(run)
    rows = answers_of(
        run,
        attempt,
        blobs,
        {
            REGIONS[0]: [([1, 0, 0], [-500, 1]), ([0, 0, 0], [0, 0])],
            REGIONS[1]: [([0, 4, 0], [0, 0]), ([3, 0, -4], [500, 3])],
        },
    )
    total = merge_partials(blobs, attempt, rows)
    assert (total.weight, total.num_sites) == (4, 4)
    assert merge_partials(blobs, attempt, rows[::-1]) == total
    _, vectors = blobs.model(next_model(blobs, run, total).model_hash)
    assert vectors["train"].tolist() == [1.0, 1.0, -1.0]
    assert vectors["mean"].tolist() == [1.0, 2.0]


def test_rounded_partials_merge_in_the_units_of_exact_ones_and_the_record_says_so(job, tmp_path):
    blobs = Blobs(tmp_path)
    run = run_of(lambda: rounding(job(), 31), blobs)
    attempt = attempt_of(run)
    deltas = {REGIONS[0]: [([1.25, 0.25, 0.75], [1, 2])], REGIONS[1]: [([1, 0, -0.25], [1, 2])]}
    rows = answers_of(run, attempt, blobs, deltas, drop_bits=31)
    total = merge_partials(blobs, attempt, rows)
    assert (total.sums["train"] / 2**32).tolist() == [2.0, 0.0, 1.0], "halves, to even"
    made = next_model(blobs, run, total)
    assert blobs.model(made.model_hash)[1]["train"].tolist() == [1.0, 0.0, 0.5]
    assert blobs.model(made.model_hash)[1]["mean"].tolist() == [2.0, 3.0]
    record = commit_record(run, attempt, rows, total, made, federation="fed", leader_epoch=1, now_unix_ns=1)
    assert (record.exact_in_two_tiers, record.partial_encoding) == (False, "rounded-31")
    plan = plan_for(run, attempt, REGIONS[0], "fed")
    check_head(plan, REGIONS[0], replace(rows[0].head, num_sites=2, num_updates=2, weight=2))
    with pytest.raises(RegionRejected, match="rounded by 0 bits"):
        check_head(plan, REGIONS[0], replace(rows[0].head, num_sites=2, num_updates=2, weight=2, drop_bits=0))


def test_the_strategys_state_goes_on_from_round_to_round(job, tmp_path):
    blobs = Blobs(tmp_path)
    run = run_of(job, blobs, strategy="fedavgm")
    attempt = attempt_of(run)
    total = merge_partials(blobs, attempt, answers_of(run, attempt, blobs, {REGIONS[0]: [([1, 1, 1], [0, 0])] * 2}))
    first = next_model(blobs, run, total)
    second = next_model(blobs, replace(run, model_hash=first.model_hash, state_digest=first.state_digest), total)
    assert blobs.model(first.model_hash)[1]["train"].tolist() == [1.0] * 3
    np.testing.assert_allclose(blobs.model(second.model_hash)[1]["train"], [2.9] * 3, rtol=1e-6)


def test_a_strategy_that_breaks_ends_its_run_with_its_name(job, tmp_path, monkeypatch):
    from hierfl.strategies.averaging import FedAvg

    def broken(*_):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(FedAvg, "apply", broken)
    blobs = Blobs(tmp_path)
    run = run_of(job, blobs)
    attempt = attempt_of(run)
    total = merge_partials(blobs, attempt, answers_of(run, attempt, blobs, {REGIONS[0]: [([0, 0, 0], [0, 0])] * 2}))
    with pytest.raises(RunFailed, match="strategy fedavg broke: ZeroDivisionError: oops"):
        next_model(blobs, run, total)


def test_a_partial_that_was_changed_on_disk_is_never_added(job, tmp_path):
    blobs = Blobs(tmp_path)
    run = run_of(job, blobs)
    attempt = attempt_of(run)
    rows = answers_of(run, attempt, blobs, {REGIONS[0]: [([1, 0, 0], [0, 0])] * 2})
    path = next((tmp_path / "partials").iterdir())
    path.write_bytes(path.read_bytes()[:-200] + b"\1" + path.read_bytes()[-199:])
    with pytest.raises(StoreDamaged):
        merge_partials(blobs, attempt, rows)


class Desk:
    """An open attempt with a clock of ours: 10 s to report, 2 s of silence."""

    def __init__(self, job) -> None:
        self.now = 100.0
        self.registry = Registry(REGIONS, lambda: self.now, lambda: None)
        rules = RoundRules(min_regions=2, min_clients=3, report_timeout_s=10.0, silence_s=2.0)
        run = replace(run_of(job), job=replace(job(), round=rules, strategy=StrategyChoice()))
        self.open = Collection(run, attempt_of(run), [], federation="fed", opened_at=100.0)

    def view(self):
        return self.open.view(self.registry, self.now)

    def next_change(self):
        return self.open.next_change(self.registry, self.now)


def test_an_open_attempt_shows_who_answered_and_how_far_the_others_are(job):
    desk = Desk(job)
    for region in REGIONS[:2]:
        desk.registry.attach(region, 1, "z")
    progress = Progress(phase="collecting", clients_ready=4, clients_reported=2, cohort=4)
    desk.registry.report(REGIONS[0], {desk.open.row.key: progress}, desk.registry.traffic(REGIONS[0]))
    desk.open.answers[REGIONS[1]] = answer_row(desk.open.row, REGIONS[1])
    ap, eu, us = desk.view().regions
    assert (ap.phase, ap.clients_reported, ap.cohort, ap.answer) == ("collecting", 2, 4, Answer.NONE)
    assert (eu.phase, eu.answer) == ("sealed", Answer.PARTIAL)
    assert us.presence is Presence.EXPECTED


def test_an_open_attempt_names_the_next_moment_at_which_time_alone_changes_it(job):
    desk = Desk(job)
    desk.registry.attach(REGIONS[0], 1, "z")
    assert desk.next_change() == 102.0  # ap falls silent, the others turn out absent
    desk.now = 102.0
    assert desk.view().deadline is Deadline.AHEAD
    assert desk.next_change() == 112.0  # 10 s for the regions, 2 s for their word that it comes
    desk.now = 112.0
    assert desk.view().deadline is Deadline.PASSED
    assert desk.next_change() == 122.0
    desk.now = 122.0
    assert desk.view().deadline is Deadline.FINAL
