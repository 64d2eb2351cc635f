"""From partial aggregates to the next model: checked one by one, added exactly, applied by the strategy.

No store and no clock here: blobs in, blobs out. Everything blocks and is called in a worker thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from controller.blobs import Blobs
from controller.planning import strategy_of
from controller.rows import AnswerRow, AttemptRow, RunRow
from hierfl.aggregation import Accumulator, PartialAggregate
from hierfl.errors import HierFLError, LayoutMismatch, RegionRejected, RunFailed, StoreDamaged
from hierfl.metrics import check_metric_sums
from hierfl.plan import Plan
from hierfl.records import PartialHead
from hierfl.strategies.base import State
from hierfl.types import Int64Array, ModelHash, RegionId

__all__ = ["NextModel", "check_partial", "merge_partials", "next_model", "partial_sizes"]


@dataclass(frozen=True, kw_only=True)
class NextModel:
    """What the strategy made, stored."""

    model_hash: ModelHash
    state_digest: str


def partial_sizes(attempt: AttemptRow) -> dict[str, int]:
    """int64 values of each vector of a partial: a wide group's are its high halves, then its low ones."""
    sizes = {group.name: 1 for group in attempt.spec.groups}
    for group in attempt.spec.groups:
        for length in group.shape:
            sizes[group.name] *= length
    return sizes


def check_partial(plan: Plan, region: RegionId, head: PartialHead, vectors: Mapping[str, Int64Array]) -> None:
    """Hold a partial against the plan that its region was given, before anything is stored.

    Raises:
        RegionRejected: It answers another plan, is over too few sites, or above its share.
        LayoutMismatch: Other vectors than the plan's.
        ValueOutOfRange: A sum that no updates within the caps can have.
    """
    if head.region != region:
        raise RegionRejected(f"the partial is of region {head.region}, the connection of {region}")
    if head.base_model_hash != plan.base.model_hash or head.task_hash != plan.task.hash:
        raise RegionRejected(f"the partial of {region} answers another task, or starts from another model")
    if head.num_sites < plan.k or head.num_updates < plan.min_clients:
        raise RegionRejected(f"the partial of {region} is over {head.num_sites} sites, fewer than the plan asks for")
    check_metric_sums(plan.task.metrics, head.metrics, head.num_updates)
    _partial(head, plan, vectors).check_bounds(plan.caps.region_weight)


def _partial(head: PartialHead, plan: Plan, vectors: Mapping[str, Int64Array]) -> PartialAggregate:
    if head.groups != plan.task.groups:
        raise LayoutMismatch(f"the partial of {head.region} has other column groups than the plan")
    return _aggregate(head, vectors)


def _aggregate(head: PartialHead, vectors: Mapping[str, Int64Array]) -> PartialAggregate:
    sums = {group.name: vectors[group.name].reshape(group.shape) for group in head.groups}
    return PartialAggregate(head.groups, sums, head.weight, head.num_sites, head.num_updates, head.metrics)


def merge_partials(blobs: Blobs, attempt: AttemptRow, answers: Sequence[AnswerRow]) -> PartialAggregate:
    """The exact sum over the regions' partials, one in memory at a time.

    Raises:
        StoreDamaged: A stored partial is not what was accepted.
    """
    total, num_sites, sizes = Accumulator(attempt.spec.groups), 0, partial_sizes(attempt)
    for answer in answers:
        if answer.head is None:
            raise StoreDamaged(f"region {answer.region} has no partial in {attempt.key}")
        total.add(_aggregate(answer.head, blobs.partial(answer.blob, sizes)))
        num_sites += answer.head.num_sites
    return total.partial(num_sites)


def next_model(blobs: Blobs, run: RunRow, total: PartialAggregate) -> NextModel:
    """Apply the run's strategy to its current model and state; store what comes out.

    Raises:
        RunFailed: The strategy refused the sum, or broke: asking again would not help.
        StorageError: The blobs could not be read or written.
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
    return NextModel(model_hash=blobs.put_model(layout, model), state_digest=blobs.put_state(after.to_arrays()))
