"""Adding up what many intakes handed over: in pairs at the intakes, until few enough are left for the Region.

Sums add in any grouping to the same bits, so who adds what is free. What was handed over lies in the object
store and is the Region's: an intake that dies while it adds takes nothing with it, and others add instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from combiners.messages import HandOver
from hierfl.aggregation import Accumulator, PartialAggregate
from hierfl.errors import HierFLError, ValueOutOfRange

__all__ = ["MOST_AT_REGION", "added", "checked_sums", "merge_in_pairs"]

MOST_AT_REGION = 4
"""So many hand-overs the Region adds by itself."""

Add = Callable[[int, Sequence[HandOver]], Awaitable[HandOver]]


def checked_sums(hand_over: HandOver) -> PartialAggregate | None:
    """The sums of a hand-over, which must be of exactly its claims. Raises ``ValueOutOfRange``."""
    partial = hand_over.partial
    weight = sum(entry.weight for entry in hand_over.entries)
    found = (0, 0) if partial is None else (partial.weight, partial.num_updates)
    if found != (weight, len(hand_over.entries)):
        raise ValueOutOfRange(f"{hand_over.incarnation} handed over sums of another weight than its claims have")
    return partial


def added(hand_overs: Sequence[HandOver]) -> HandOver:
    """One hand-over in place of several of one seal, with all their claims.

    Raises:
        ValueOutOfRange, LayoutMismatch: One of them is not what its claims can have made.
    """
    first = hand_overs[0]
    entries = tuple(entry for hand_over in hand_overs for entry in hand_over.entries)
    partials = [partial for hand_over in hand_overs if (partial := checked_sums(hand_over)) is not None]
    total = None
    if partials:
        accumulator = Accumulator(partials[0].groups)
        for partial in partials:
            accumulator.add(partial)
        total = accumulator.partial(len({entry.key.client.site for entry in entries}))
    return HandOver(
        incarnation="+".join(hand_over.incarnation for hand_over in hand_overs),
        key=first.key,
        seal_id=first.seal_id,
        entries=entries,
        partial=total,
    )


async def merge_in_pairs(hand_overs: Sequence[HandOver], add: Add, most: int = MOST_AT_REGION) -> list[HandOver]:
    """At most ``most`` hand-overs with the same claims and the same sum; more where nobody adds any more, and where
    shards have the sums.

    Args:
        add: Has somebody add two; its number tells the pairs of one turn apart.
    """
    kept = [hand_over for hand_over in hand_overs if hand_over.ranged is not None]  # read where they are
    left = [hand_over for hand_over in hand_overs if hand_over.entries and hand_over.ranged is None]
    while len(left) > most:
        pairs = [left[n : n + 2] for n in range(0, 2 * (len(left) // 2), 2)]
        merged = await asyncio.gather(*(_add_or_keep(add, number, pair) for number, pair in enumerate(pairs)))
        after = [one for group in merged for one in group] + left[2 * len(pairs) :]
        if len(after) == len(left):
            return after + kept
        left = after
    return left + kept


async def _add_or_keep(add: Add, number: int, pair: Sequence[HandOver]) -> Sequence[HandOver]:
    try:
        return [await add(number, pair)]
    except HierFLError:
        return pair  # the Region adds them, or somebody else in the next turn
