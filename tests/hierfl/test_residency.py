"""What may leave a region."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from hierfl.aggregation import Accumulator, ColumnGroup, GroupKind, Weighting
from hierfl.errors import ConfigError, ResidencyError, ValueOutOfRange
from hierfl.metrics import MetricSpec
from hierfl.plan import Caps, ModelRef, Plan, TaskSpec
from hierfl.receipts import Reason
from hierfl.residency import Contribution, Release, ZonePolicy, objection, objection_to_resending, release
from hierfl.types import ModelHash, RegionId, RunId, SiteId, TaskKind

GROUP = ColumnGroup(name="train", kind=GroupKind.FIXED, s=32, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=4)
METRICS = (MetricSpec(name="num_examples", scale=0, max_abs=1000), MetricSpec(name="eval_correct", scale=0, max_abs=9))


def plan(k: int = 2, min_clients: int = 1) -> Plan:
    return Plan(
        federation="test",
        region=RegionId("eu"),
        run=RunId("run-1"),
        round=1,
        attempt=1,
        seed=0,
        task=TaskSpec(
            kind=TaskKind.TRAIN,
            app="toy",
            app_version="",
            config={},
            client_part={},
            groups=(GROUP,),
            metrics=METRICS,
            evaluate=True,
        ),
        base=ModelRef(version=0, model_hash=ModelHash("00"), layout_hash="11", size_bytes=16),
        caps=Caps(max_weight=100, region_weight=1000, max_upload_bytes=1000),
        k=k,
        min_clients=min_clients,
        report_timeout_s=60.0,
        hold_s=60.0,
    )


def contributions(*weights: int, metrics: tuple[str, ...] = ("num_examples",)) -> list[Contribution]:
    return [
        Contribution(site=SiteId(f"site-{n}"), weight=weight, metrics=frozenset(metrics))
        for n, weight in enumerate(weights)
    ]


def try_release(parts: list[Contribution], *, policy: ZonePolicy | None = None, **wrong: object) -> Release:
    total = Accumulator((GROUP,))
    for part in parts:
        total.fold({"train": [np.ones(4, np.float32)]}, part.weight, dict.fromkeys(part.metrics, 1))
    partial = total.partial(len({part.site for part in parts}))
    usual = {"policy": policy or ZonePolicy(), "plan": plan(), "contributions": parts}
    more = {"region": RegionId("eu"), "region_epoch": 1, "seal_id": "1-1"}
    return release(partial, **(usual | more | wrong))  # type: ignore[arg-type]


def test_a_sum_over_enough_sites_may_leave():
    made = try_release(contributions(1, 1, 1))
    assert (made.head.num_sites, made.head.weight, made.head.metrics) == (3, 3, {"num_examples": 3})


@pytest.mark.parametrize(
    ("parts", "policy", "asked", "reason"),
    [
        (contributions(1, 1), ZonePolicy(k=3), plan(k=2), Reason.TOO_FEW_SITES),
        (contributions(1, 1, 1), ZonePolicy(k=3), plan(k=4), Reason.TOO_FEW_SITES),
        (contributions(1, 1, 1), ZonePolicy(k=3), plan(min_clients=4), Reason.TOO_FEW_SITES),
        (contributions(1) * 5, ZonePolicy(k=2), plan(), Reason.TOO_FEW_SITES),
        (contributions(9, 1, 1), ZonePolicy(k=3, max_share=0.8), plan(), Reason.DOMINATED),
        (contributions(8, 1, 1), ZonePolicy(k=3, max_share=0.8), plan(), None),
        ([], ZonePolicy(k=2), plan(), Reason.TOO_FEW_SITES),
    ],
)
def test_the_stricter_of_zone_and_plan_decides(parts, policy, asked, reason):
    assert objection(policy, asked, parts) is reason


@pytest.mark.parametrize("parts", [contributions(1, 1), contributions(90, 1, 1)])
def test_what_may_not_leave_is_refused_whatever_was_asked_before(parts):
    with pytest.raises(ResidencyError):
        try_release(parts)


def test_a_sum_of_other_updates_than_were_checked_is_refused():
    with pytest.raises(ResidencyError, match="not the one"):
        try_release(contributions(1, 1, 1), contributions=contributions(1, 1, 1, 1))


def test_a_metric_that_too_few_sites_carry_is_withheld():
    parts = [*contributions(1, 1, 1), *contributions(1, metrics=("num_examples", "eval_correct"))]
    parts[3] = Contribution(site=SiteId("site-3"), weight=1, metrics=parts[3].metrics)
    assert try_release(parts).head.metrics == {"num_examples": 4}


def test_a_metric_that_the_plan_does_not_declare_is_refused():
    with pytest.raises(ValueOutOfRange, match="not declared"):
        try_release(contributions(1, 1, 1, metrics=("num_examples", "secret")))


def test_a_sum_above_the_region_share_is_refused():
    with pytest.raises(ValueOutOfRange):
        try_release(contributions(500, 500, 500))


def test_a_release_cannot_be_made_elsewhere_nor_copied():
    made = try_release(contributions(1, 1, 1))
    with pytest.raises(ResidencyError):
        Release(object(), made.head, made.partial)
    with pytest.raises(ResidencyError):
        pickle.dumps(made)
    with pytest.raises(ResidencyError):
        copy.copy(made)


def test_sealed_bytes_do_not_go_to_a_plan_that_asks_for_more_sites():
    head = try_release(contributions(1, 1, 1)).head
    assert objection_to_resending(ZonePolicy(k=3), plan(), head) is None
    assert objection_to_resending(ZonePolicy(k=3), plan(k=4), head) is Reason.TOO_FEW_SITES
    assert objection_to_resending(ZonePolicy(k=4), plan(), head) is Reason.TOO_FEW_SITES


@pytest.mark.parametrize("rule", [{"k": 1}, {"max_share": 0.0}, {"max_share": 1.1}])
def test_a_zone_cannot_go_below_the_floor(rule):
    with pytest.raises(ConfigError):
        ZonePolicy(**rule)
