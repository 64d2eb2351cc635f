"""What may leave a region. The only file that makes an exportable value.

A ``Release`` is a sum over at least ``k`` sites, none of which carries more than ``max_share`` of its
weight, with metrics that the plan declares and ``k`` sites carry. The uplink's serializer takes nothing
else, and nothing else can make one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, SupportsIndex

from hierfl.aggregation import ColumnGroup
from hierfl.errors import ConfigError, ResidencyError
from hierfl.metrics import check_metric_sums
from hierfl.plan import Plan
from hierfl.receipts import Reason
from hierfl.records import PartialHead
from hierfl.types import RegionId, SiteId

__all__ = ["LEAST_K", "Contribution", "Release", "ZonePolicy", "objection", "objection_to_resending", "release"]

LEAST_K = 2
"""No zone may go below: one site's sum is its update."""

_MAKER = object()


@dataclass(frozen=True, kw_only=True)
class ZonePolicy:
    """The zone's own rule on what may leave it. A plan may ask for more, never for less."""

    k: int = 3
    """Fewest distinct sites in a sum."""
    max_share: float = 0.8
    """Largest part of a sum's weight that one site may carry, above 0, at most 1."""

    def __post_init__(self) -> None:
        if self.k < LEAST_K:
            raise ConfigError("zone.k", self.k, f"must be at least {LEAST_K}: one site's sum is its update")
        if not 0 < self.max_share <= 1:
            raise ConfigError("zone.max_share", self.max_share, "must be above 0, at most 1")

    def sites_needed(self, plan: Plan) -> int:
        """The stricter of zone and plan."""
        return max(self.k, plan.k)


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one update adds to a sum, as far as the rule asks. Stays in the region."""

    site: SiteId
    weight: int
    metrics: frozenset[str] = frozenset()
    """Names of the metrics that it carries."""


def objection(policy: ZonePolicy, plan: Plan, contributions: Sequence[Contribution]) -> Reason | None:
    """Why a sum of these may not leave, or ``None`` if it may."""
    weights = _weights(contributions)
    if len(weights) < policy.sites_needed(plan) or len(contributions) < plan.min_clients:
        return Reason.TOO_FEW_SITES
    if is_dominated(weights, policy.max_share):
        return Reason.DOMINATED
    return None


def is_dominated(weights: Mapping[SiteId, int], max_share: float) -> bool:
    """Whether one site carries more than ``max_share`` of the weight of all."""
    return max(weights.values()) > max_share * sum(weights.values())


def objection_to_resending(policy: ZonePolicy, plan: Plan, head: PartialHead) -> Reason | None:
    """Why sealed bytes that left before may not go to another attempt, whose plan or zone may ask for more, or for
    another form: an exact and a rounded sum over one base and task would be two releases.
    """
    if head.num_sites < policy.sites_needed(plan) or head.num_updates < plan.min_clients:
        return Reason.TOO_FEW_SITES
    return Reason.ALREADY_RELEASED if head.drop_bits != plan.drop_bits else None


def _weights(contributions: Sequence[Contribution]) -> dict[SiteId, int]:
    weights: dict[SiteId, int] = {}
    for one in contributions:
        weights[one.site] = weights.get(one.site, 0) + one.weight
    return weights


def _shared_metrics(k: int, contributions: Sequence[Contribution]) -> set[str]:
    """Metrics that at least ``k`` sites carry: a sum over fewer is withheld, whatever else may leave."""
    sites: dict[str, set[SiteId]] = {}
    for one in contributions:
        for name in one.metrics:
            sites.setdefault(name, set()).add(one.site)
    return {name for name, of in sites.items() if len(of) >= k}


class Summed(Protocol):
    """A sum in whatever form: ``PartialAggregate``, or ``PackedPartial`` (``hierfl/wire/piecewise.py``)."""

    @property
    def groups(self) -> tuple[ColumnGroup, ...]: ...
    @property
    def weight(self) -> int: ...
    @property
    def num_sites(self) -> int: ...
    @property
    def num_updates(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, int]: ...

    def check_bounds(self, max_weight: int) -> None:
        """Raise ``ValueOutOfRange`` for sums that no updates within the caps can have."""
        ...


class Release:
    """A partial that may cross the border, and its head. Made by ``release`` only."""

    __slots__ = ("head", "partial")

    def __init__(self, maker: object, head: PartialHead, partial: Summed) -> None:
        if maker is not _MAKER:
            raise ResidencyError("a release is made by hierfl.residency.release only")
        self.head = head
        self.partial = partial

    def __reduce_ex__(self, protocol: SupportsIndex) -> str:
        raise ResidencyError("a release is not copied between processes: only its sealed bytes travel")


def release(
    partial: Summed,
    *,
    policy: ZonePolicy,
    plan: Plan,
    region: RegionId,
    contributions: Sequence[Contribution],
    region_epoch: int,
    seal_id: str,
    carried: str = "",
    left_over: str = "",
) -> Release:
    """Let a region's sum leave it.

    Args:
        partial: The exact sum of ``contributions`` and of nothing else; where the plan says so, rounded, with what
            rounding left over of earlier such sums.
        policy: The zone's rule.
        plan: What the controller asked for; its caps and metrics bound the sum.
        region: Whose sum it is.
        contributions: One for each update in the sum, from the claims granted.
        region_epoch: Of the Region that seals.
        seal_id: Names the seal.
        carried: Digest of what is in the sum of earlier ones, if anything is.
        left_over: Digest of what rounding left over of this one, if it is kept. It never leaves.
    Raises:
        ResidencyError: Too few sites, one that dominates, or a sum that is not of these updates; its message
            opens with the ``Reason``.
        ValueOutOfRange: Sums that no updates within the plan's caps can have, or an undeclared metric.
    """
    _require_same(partial, plan, contributions)
    reason = objection(policy, plan, contributions)
    if reason is not None:
        raise ResidencyError(f"{reason}: " + _WORDS[reason].format(k=policy.sites_needed(plan), share=policy.max_share))
    shared = _shared_metrics(policy.sites_needed(plan), contributions)
    partial.check_bounds(plan.caps.region_weight)
    check_metric_sums(plan.task.metrics, partial.metrics, partial.num_updates)
    exported = {name: value for name, value in partial.metrics.items() if name in shared}
    head = PartialHead(
        run=plan.run,
        region=region,
        base_model_hash=plan.base.model_hash,
        task_hash=plan.task.hash,
        groups=plan.task.groups,
        weight=partial.weight,
        num_sites=partial.num_sites,
        num_updates=partial.num_updates,
        metrics=exported,
        region_epoch=region_epoch,
        seal_id=seal_id,
        drop_bits=plan.drop_bits,
        carried=carried,
        left_over=left_over,
    )
    return Release(_MAKER, head, partial)


_WORDS = {
    Reason.TOO_FEW_SITES: "the sum is over fewer sites than the {k} asked for, or fewer clients than the plan needs",
    Reason.DOMINATED: "one site carries more than {share:.0%} of the sum's weight",
}


def _require_same(partial: Summed, plan: Plan, contributions: Sequence[Contribution]) -> None:
    weights = _weights(contributions)
    same = (
        partial.groups == plan.task.groups
        and partial.num_sites == len(weights)
        and partial.num_updates == len(contributions)
        and partial.weight == sum(weights.values())
    )
    if not same:
        raise ResidencyError(f"{Reason.POLICY}: the sum is not the one whose sites were checked")
