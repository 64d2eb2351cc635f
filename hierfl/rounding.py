"""Partials with loss: which sums may be rounded, how far, and between what bounds what is released then stands.

A job may have each region round its sums to multiples of ``2**drop_bits`` before they leave it (``[partials]``); what
leaves is ``rint((sum + carried) / 2**drop_bits)``, half to even, and what is left over is carried into the region's
next round (``hierfl/feedback.py``). Only the fixed point sums of the ``train`` vector are rounded: counts, weights,
metrics and 128-bit sums stay exact.

The error, for each value and region, in units of the sum: what all rounds so far released is off from what they summed
by what is left over, half a step or ``2**(drop_bits - 1)`` at most, however many they were. A single round is off by
what was carried less what is left over: a step at most, half a step in the first. In a mean over weight W, of n
regions, half a step is ``n * 2**(drop_bits - 1 - s) / W``.
"""

from __future__ import annotations

from collections.abc import Iterable

from hierfl.columns import MAX_SUM, ColumnGroup, GroupKind
from hierfl.errors import ConfigError, RequirementUnknown
from hierfl.job import MAX_DROP_BITS
from hierfl.layout import Role

__all__ = [
    "EXACT",
    "KEY",
    "drop_bits_of",
    "encoding_name",
    "error_of_a_sum",
    "has_room",
    "is_rounded",
    "largest_sum",
    "require_room",
    "rounded_groups",
]

KEY = "partials.drop_bits"
EXACT = "packed"
"""Name, in plans, of partials without loss."""

_PREFIX = "rounded-"


def encoding_name(drop_bits: int) -> str:
    """How a plan names partials that are rounded so far; ``EXACT`` for 0."""
    return f"{_PREFIX}{drop_bits}" if drop_bits else EXACT


def drop_bits_of(encoding: str) -> int:
    """The inverse of ``encoding_name``.

    Raises:
        RequirementUnknown: A form that this release does not know.
    """
    bits = encoding.removeprefix(_PREFIX)
    drop_bits = int(bits) if bits.isascii() and bits.isdecimal() and len(bits) <= 2 else 0
    if drop_bits > MAX_DROP_BITS or encoding_name(drop_bits) != encoding:
        raise RequirementUnknown(
            f"the plan asks for sums encoded as {encoding[:40]!r}, unknown to this release; upgrade hierfl"
        )
    return drop_bits


def is_rounded(group: ColumnGroup) -> bool:
    """Whether a group's sums may be: those that are fixed point, and trained."""
    return group.kind is GroupKind.FIXED and group.name == Role.TRAIN


def rounded_groups(groups: Iterable[ColumnGroup]) -> tuple[ColumnGroup, ...]:
    """Those of which something is left over."""
    return tuple(filter(is_rounded, groups))


def largest_sum(group: ColumnGroup, total: int, drop_bits: int) -> int:
    """Largest magnitude of an integer that a region releases.

    The sum itself is at most ``max_q * total``, what is carried half a step, and rounding adds half a step at most.

    Args:
        group: Whose sum it is.
        total: Sum of the multipliers of its updates (``ColumnGroup.total``).
        drop_bits: How far partials are rounded.
    """
    bound = group.max_q * total
    return (bound + 2**drop_bits) >> drop_bits if drop_bits and is_rounded(group) else bound


def require_room(groups: Iterable[ColumnGroup], total_weight: int, num_partials: int, drop_bits: int) -> None:
    """Hold what a job asks for against its model and caps.

    Raises:
        ConfigError: They could exceed them, or nothing here can be rounded; names ``partials.drop_bits``.
    """
    rounded = rounded_groups(groups)
    if drop_bits and not rounded:
        raise ConfigError(KEY, drop_bits, "must be 0: this model has no sums that can be rounded")
    if not has_room(rounded, total_weight, num_partials, drop_bits):
        rule = "leaves no room in 64 bits: lower it, arithmetic.max_abs or arithmetic.total_weight"
        raise ConfigError(KEY, drop_bits, rule)


def has_room(groups: Iterable[ColumnGroup], weight: int, num_partials: int, drop_bits: int) -> bool:
    """Whether so many rounded sums of so much weight in all, back in units of exact ones, surely fit into 64 bits."""
    steps = num_partials * 2**drop_bits if drop_bits else 0
    return all(group.max_q * weight + steps <= MAX_SUM for group in rounded_groups(groups))


def error_of_a_sum(group: ColumnGroup, drop_bits: int) -> float:
    """Half a step, in units of a value times its weight: most that what a region released in all rounds is off."""
    return float(2.0 ** (drop_bits - 1 - group.s)) if drop_bits and is_rounded(group) else 0.0
