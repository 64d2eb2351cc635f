"""From what the intakes handed over to sealed bytes: add up, pass the residency gate, encode. No I/O.

The kernels release the GIL; the host calls this in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from combiners.events import Seal
from combiners.merging import checked_sums
from combiners.messages import HandOver
from combiners.region import contribution
from combiners.sealed import Sealed, seal
from hierfl.aggregation import Accumulator, PartialAggregate
from hierfl.border import merkle_root
from hierfl.plan import Plan
from hierfl.records import update_statement
from hierfl.residency import ZonePolicy, release
from hierfl.types import RegionId

__all__ = ["make_sealed", "updates_root"]


def make_sealed(
    instruction: Seal, hand_overs: Sequence[HandOver], policy: ZonePolicy, region: RegionId, region_epoch: int
) -> Sealed:
    """Add up what was handed over and encode the sum.

    Raises:
        ResidencyError: It may not leave.
        ValueOutOfRange, LayoutMismatch: An intake handed over what its claims cannot have made.
    """
    claims = [claim for entries in instruction.entries.values() for claim in entries]
    num_sites = len({claim.key.client.site for claim in claims})
    exportable = release(
        _add_up(instruction.plan, hand_overs, num_sites),
        policy=policy,
        plan=instruction.plan,
        region=region,
        contributions=[contribution(claim) for claim in claims],
        region_epoch=region_epoch,
        seal_id=instruction.seal_id,
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
    claims = [claim for entries in instruction.entries.values() for claim in entries]
    return merkle_root(update_statement(claim.key, claim.digest, claim.weight) + claim.signature for claim in claims)
