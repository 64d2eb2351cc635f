"""From a job to a run, and from a run to the plans of one attempt. Pure: what is asked of a region is decided here.

Everything that a sum's bits depend on (groups, scales, shares of the weight) is fixed when the run is submitted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from controller.budget import check_budget
from controller.rows import AttemptRow, RunRow
from hierfl import encodings, rounding, strategies
from hierfl.encodings import EncodingSpec
from hierfl.errors import ConfigError
from hierfl.job import Job
from hierfl.layout import Layout
from hierfl.metrics import STANDARD_METRICS
from hierfl.plan import Caps, ModelRef, Plan, TaskSpec
from hierfl.rounds import RegionView
from hierfl.runs import OpenAttempt, RunView
from hierfl.strategies import Strategy
from hierfl.types import ModelHash, RegionId, RunId, TaskKind

__all__ = [
    "BYTES_PER_VALUE",
    "new_attempt",
    "new_run",
    "partial_encoding",
    "plan_for",
    "run_id",
    "run_view",
    "strategy_of",
]

BYTES_PER_VALUE = 4
"""Models travel as float32."""


def run_id(job: Job, random_hex: str) -> RunId:
    """Such as ``digits-3f9a1c``: from the job's name, fit for a path and a URL."""
    slug = re.sub(r"[^a-z0-9]+", "-", job.job.name.lower()).strip("-")[:40].strip("-") or "run"
    return RunId(f"{slug}-{random_hex}")


def strategy_of(job: Job) -> Strategy:
    """The job's strategy with its options.

    Raises:
        ConfigError: There is none of that name, or an option breaks its rule.
    """
    return strategies.get(job.strategy.name, job.strategy.options)


def new_run(
    job: Job,
    layout: Layout,
    model_hash: ModelHash,
    regions: Sequence[RegionId],
    *,
    run: RunId,
    request_id: str,
    now_unix_ns: int,
) -> RunRow:
    """A submitted run, or why this federation cannot run it.

    Raises:
        ConfigError: Names the key of the job that is wrong here.
    """
    strategy, caps = strategy_of(job), job.arithmetic
    if job.round.min_regions > len(regions):
        rule = f"must be at most {len(regions)}: this federation has {', '.join(regions)}"
        raise ConfigError("round.min_regions", job.round.min_regions, rule)
    if caps.total_weight // len(regions) < caps.max_weight:
        least = caps.max_weight * len(regions)
        raise ConfigError(
            "arithmetic.total_weight", caps.total_weight, f"must be at least {least}: regions share it out"
        )
    groups = strategy.column_groups(layout, max_abs=caps.max_abs, total_weight=caps.total_weight)
    encodings.length_bytes(encodings.get(job.updates.encoding, job.updates.options), groups)
    rounding.require_room(groups, caps.total_weight, len(regions), job.partials.drop_bits)
    check_budget(job, strategy, layout, len(regions))
    return RunRow(
        run=run,
        request_id=request_id,
        job=job,
        regions=tuple(regions),
        groups=groups,
        exact_in_two_tiers=strategy.exact_in_two_tiers and not job.partials.drop_bits,
        layout_hash=layout.hash,
        num_params=layout.num_params,
        submitted_unix_ns=now_unix_ns,
        model_hash=model_hash,
    )


def new_attempt(run: RunRow, wish: OpenAttempt, *, now_unix_ns: int) -> AttemptRow:
    """The attempt that a decision asks for, on the run's current model."""
    return AttemptRow(
        run=run.run,
        task=wish.task,
        round=wish.round,
        attempt=wish.attempt,
        spec=_task_spec(run, wish),
        base_version=run.version,
        base_hash=run.model_hash,
        base_digest=run.model_digest,
        opened_unix_ns=now_unix_ns,
    )


def _task_spec(run: RunRow, wish: OpenAttempt) -> TaskSpec:
    train, every = wish.task is TaskKind.TRAIN, run.job.round.evaluate_every
    app, _, version = run.job.job.app.partition("@")
    return TaskSpec(
        kind=wish.task,
        app=app,
        app_version=version,
        config=run.job.app,
        client_part=strategy_of(run.job).client_part() if train else {},
        groups=run.groups if train else (),
        metrics=STANDARD_METRICS,
        evaluate=not train or (every > 0 and (wish.round - 1) % every == 0),
        encoding=encodings.spec(run.job.updates.encoding, run.job.updates.options) if train else EncodingSpec(),
    )


def _region_weight(run: RunRow) -> int:
    """A region's share of a round's weight: equal, and of all provisioned regions, whoever is alive."""
    return run.job.arithmetic.total_weight // len(run.regions)


def plan_for(run: RunRow, attempt: AttemptRow, region: RegionId, federation: str) -> Plan:
    """What one region is asked in an attempt. The same values give the same bytes: it can be signed again."""
    return Plan(
        federation=federation,
        region=region,
        run=run.run,
        round=attempt.round,
        attempt=attempt.attempt,
        seed=run.job.job.seed,
        task=attempt.spec,
        base=ModelRef(
            version=attempt.base_version,
            model_hash=attempt.base_hash,
            digest=attempt.base_digest,
            layout_hash=run.layout_hash,
            size_bytes=run.num_params * BYTES_PER_VALUE,
        ),
        caps=Caps(
            max_weight=run.job.arithmetic.max_weight,
            region_weight=_region_weight(run),
            max_upload_bytes=encodings.length_bytes(attempt.spec.update_encoding, attempt.spec.groups),
        ),
        k=run.job.arithmetic.k,
        min_clients=run.job.round.min_clients,
        report_timeout_s=run.job.round.report_timeout_s,
        hold_s=run.job.round.hold_s,
        partial_encoding=partial_encoding(run, attempt.task),
    )


def partial_encoding(run: RunRow, task: TaskKind) -> str:
    """How the sums of a task cross the border; an evaluation has only metrics, which are exact."""
    return rounding.encoding_name(run.job.partials.drop_bits if task is TaskKind.TRAIN else 0)


def run_view(run: RunRow, attempts: int, regions: tuple[RegionView, ...], *, retry_due: bool) -> RunView:
    """What decides about a run without an open attempt."""
    rules = run.job.round
    return RunView(
        rounds=run.job.job.rounds,
        rounds_committed=run.rounds_committed,
        evaluate_last=rules.evaluate_every > 0,
        evaluation_over=run.evaluation_over,
        attempts=attempts,
        abandoned_in_a_row=run.abandoned_in_a_row,
        max_abandoned=rules.max_abandoned,
        last_reason=run.last_reason,
        retry_due=retry_due,
        min_regions=rules.min_regions,
        regions=regions,
    )
