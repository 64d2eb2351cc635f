"""From what the intakes handed over to sealed bytes: add up, round, pass the residency gate, encode. No I/O.

The kernels release the GIL; the host calls this in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from combiners.events import Seal
from combiners.merging import checked_sums
from combiners.messages import HandOver
from combiners.region import contribution
from combiners.residuals import Carried, LeftOver, left_over_of
from combiners.sealed import Sealed, seal
from hierfl.aggregation import Accumulator, PartialAggregate
from hierfl.border import merkle_root
from hierfl.feedback import round_off
from hierfl.plan import Plan
from hierfl.records import update_leaf
from hierfl.residency import Summed, ZonePolicy, release
from hierfl.types import RegionId

__all__ = ["make_sealed", "through_the_gate", "updates_root"]


def make_sealed(
    instruction: Seal,
    hand_overs: Sequence[HandOver],
    policy: ZonePolicy,
    region: RegionId,
    region_epoch: int,
    carried: Carried | None = None,
) -> tuple[Sealed, LeftOver | None]:
    """Add up what was handed over, round it where the plan says so, and encode the sum.

    Args:
        instruction: Of the Region.
        hand_overs: Of all incarnations that it names.
        policy: The zone's rule.
        region: Whose sum it is.
        region_epoch: Of the Region that seals.
        carried: What earlier rounds left over, if sums are rounded; ``None``: nothing, and nothing is kept this time.
    Returns:
        The sealed bytes, and what rounding left over, to be stored with them.
    Raises:
        ResidencyError: It may not leave.
        ValueOutOfRange, LayoutMismatch: An intake handed over what its claims cannot have made.
    """
    plan = instruction.plan
    partial, left_over = _add_up(plan, hand_overs, instruction.num_sites), None
    if plan.drop_bits:
        rounded = round_off(partial, plan.drop_bits, carried.sums if carried else None)
        partial = rounded.partial
        if carried is not None:
            left_over = left_over_of(plan.base.layout_hash, plan.task.groups, rounded.left_over)
    digests = (carried.digest if carried else "", left_over.digest if left_over else "")
    return through_the_gate(instruction, partial, policy, region, region_epoch, *digests), left_over


def through_the_gate(
    instruction: Seal,
    summed: Summed,
    policy: ZonePolicy,
    region: RegionId,
    region_epoch: int,
    carried: str = "",
    left_over: str = "",
) -> Sealed:
    """Encode a sum, if the zone's rule lets it go.

    Args:
        summed: Over all claims of the instruction.
        carried, left_over: Digests of what earlier rounds left over, and of what this one does.
    Raises:
        ResidencyError: It may not leave.
    """
    exportable = release(
        summed,
        policy=policy,
        plan=instruction.plan,
        region=region,
        contributions=[contribution(claim) for claim in instruction.claims],
        region_epoch=region_epoch,
        seal_id=instruction.seal_id,
        carried=carried,
        left_over=left_over,
    )
    return seal(exportable, instruction.plan.base.layout_hash)


def _add_up(plan: Plan, hand_overs: Sequence[HandOver], num_sites: int) -> PartialAggregate:
    """One sum over all incarnations; each has the weight of the claims it lists. What one alone handed over is taken
    as it is, views on Ray's object store.
    """
    partials = []
    for hand_over in hand_overs:
        partial = checked_sums(hand_over)
        if partial is not None:
            partials.append(partial)
    if len(partials) == 1:
        return replace(partials[0], num_sites=num_sites)
    total = Accumulator(plan.task.groups)
    for partial in partials:
        total.add(partial)
    return total.partial(num_sites)


def updates_root(instruction: Seal) -> str:
    """Merkle root over the statements that the clients signed, each followed by its signature."""
    return merkle_root(
        update_leaf(claim.key, claim.digest, claim.weight, claim.signature) for claim in instruction.claims
    )
