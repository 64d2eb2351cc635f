"""What a region's link may carry in a round, held against the most that its partial can take. Pure.

The bound is safe whatever the clients send: it follows from the caps. What normal sums take is far below it, since a
block is only as wide as its own values need (``hierfl/packing.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from hierfl import packing, rounding
from hierfl.errors import ConfigError
from hierfl.job import MAX_DROP_BITS, Job
from hierfl.layout import Layout
from hierfl.strategies import Strategy

__all__ = ["check_budget"]

T = TypeVar("T")

KEY = "round.border_budget_bytes"
NOTES = {rounding.KEY: " (approximate across regions)"}
MAX_HALVINGS = 40


def check_budget(job: Job, strategy: Strategy, layout: Layout, num_regions: int) -> None:
    """Refuse a job whose partials could exceed its budget.

    Raises:
        ConfigError: Names the budget, the most that a partial can take, and what would fit.
    """
    budget, caps, dropped = job.round.border_budget_bytes, job.arithmetic, job.partials.drop_bits

    def most_bytes(max_abs: float, total_weight: int, drop_bits: int = dropped) -> int:
        groups = strategy.column_groups(layout, max_abs=max_abs, total_weight=total_weight)
        return packing.most_bytes(groups, total_weight // num_regions, drop_bits)

    def has_room(drop_bits: int) -> bool:
        groups = strategy.column_groups(layout, max_abs=caps.max_abs, total_weight=caps.total_weight)
        return rounding.has_room(groups, caps.total_weight, num_regions, drop_bits)

    most = most_bytes(caps.max_abs, caps.total_weight)
    if not budget or most <= budget:
        return
    least_weight = caps.max_weight * num_regions
    remedies = {
        "arithmetic.max_abs": _first(
            _halves(caps.max_abs), lambda value: most_bytes(value, caps.total_weight) <= budget
        ),
        "arithmetic.total_weight": _first(
            (int(value) for value in _halves(caps.total_weight) if value >= least_weight),
            lambda value: most_bytes(caps.max_abs, value) <= budget,
        ),
        rounding.KEY: _first(
            (value for value in range(dropped + 1, MAX_DROP_BITS + 1) if has_room(value)),
            lambda value: most_bytes(caps.max_abs, caps.total_weight, value) <= budget,
        ),
    }
    would = [f"{name} = {value}{NOTES.get(name, '')}" for name, value in remedies.items() if value is not None]
    fitting = layout.num_params * budget // most
    would.append(f"model.tensors that have at most {fitting:,} values in all")
    form = f"sums rounded by {dropped} bits" if dropped else "exact sums"
    raise ConfigError(KEY, budget, f"must be at least {most:,}, which {form} can take; or one of {', '.join(would)}")


def _halves(value: float) -> Iterator[float]:
    return (value / 2**times for times in range(1, MAX_HALVINGS))


def _first(values: Iterable[T], fits: Callable[[T], bool]) -> T | None:
    return next((value for value in values if fits(value)), None)
