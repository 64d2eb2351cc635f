"""From partial aggregates to the next model: checked one by one, added exactly, applied by the strategy.

No store and no clock here: blobs in, blobs out. Everything blocks and is called in a worker thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from controller.blobs import Blobs
from controller.planning import strategy_of
from controller.rows import AnswerRow, AttemptRow, RunRow
from controller.summing import RunningSum
from hierfl.aggregation import PartialAggregate, check_counts
from hierfl.errors import HierFLError, LayoutMismatch, RegionRejected, RunFailed
from hierfl.layout import Layout
from hierfl.metrics import check_metric_sums
from hierfl.plan import Plan
from hierfl.records import PartialHead
from hierfl.strategies.base import State
from hierfl.types import Float32Array, ModelHash, RegionId

__all__ = ["NextModel", "apply_strategy", "check_head", "merge_partials", "next_model"]


@dataclass(frozen=True, kw_only=True)
class NextModel:
    """What the strategy made, stored."""

    model_hash: ModelHash
    model_digest: str
    """Of its transfer."""
    state_digest: str


def check_head(plan: Plan, region: RegionId, head: PartialHead) -> None:
    """Hold what a partial says of itself against the plan that its region was given, before anything is stored.

    Raises:
        RegionRejected: It answers another plan, is over too few sites, or above its share.
        LayoutMismatch: Other column groups than the plan's.
        ValueOutOfRange: Counts, a weight or metrics that no updates within the caps can have.
    """
    if head.region != region:
        raise RegionRejected(f"the partial is of region {head.region}, the connection of {region}")
    if head.base_model_hash != plan.base.model_hash or head.task_hash != plan.task.hash:
        raise RegionRejected(f"the partial of {region} answers another task, or starts from another model")
    if head.num_sites < plan.k or head.num_updates < plan.min_clients:
        raise RegionRejected(f"the partial of {region} is over {head.num_sites} sites, fewer than the plan asks for")
    if head.drop_bits != plan.drop_bits:
        raise RegionRejected(f"the partial of {region} is rounded by {head.drop_bits} bits, the plan says otherwise")
    if head.groups != plan.task.groups:
        raise LayoutMismatch(f"the partial of {head.region} has other column groups than the plan")
    check_metric_sums(plan.task.metrics, head.metrics, head.num_updates)
    check_counts(head.num_sites, head.num_updates, head.weight, plan.caps.region_weight)


def merge_partials(
    blobs: Blobs, attempt: AttemptRow, answers: Sequence[AnswerRow], running: RunningSum | None = None
) -> PartialAggregate:
    """The sum over the regions' partials: what ``running`` has of them, and the rest from their blobs.

    Raises:
        StoreDamaged: A stored partial is not what was accepted.
    """
    return (running or RunningSum(attempt.spec.groups)).total(answers, blobs.partial)


def apply_strategy(
    blobs: Blobs, run: RunRow, total: PartialAggregate
) -> tuple[Layout, dict[str, Float32Array], dict[str, np.ndarray]]:
    """What the run's strategy makes of its current model and state: layout, model, the state after. Stores nothing.

    Raises: as ``next_model``.
    """
    layout, vectors = blobs.model(run.model_hash)
    strategy = strategy_of(run.job)
    kept = State.from_arrays(blobs.state(run.state_digest)) if run.state_digest else None
    try:
        state = strategy.init(vectors) if kept is None else kept
        model, after = strategy.apply(vectors, total, state)
        layout.check_vectors(model)
    except HierFLError as error:
        raise RunFailed(f"strategy {run.job.strategy.name}: {error}") from error
    except Exception as error:
        raise RunFailed(f"strategy {run.job.strategy.name} broke: {type(error).__name__}: {error}") from error
    return layout, dict(model), after.to_arrays()


def next_model(blobs: Blobs, run: RunRow, total: PartialAggregate) -> NextModel:
    """Apply the run's strategy to its current model and state; store what comes out.

    Raises:
        RunFailed: The strategy refused the sum, or broke: asking again would not help.
        StorageError: The blobs could not be read or written.
    """
    layout, model, after = apply_strategy(blobs, run, total)
    name = blobs.put_model(layout, model)
    digest = blobs.model_transfer(name).digest
    return NextModel(model_hash=name, model_digest=digest, state_digest=blobs.put_state(after))
