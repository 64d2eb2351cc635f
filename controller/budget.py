"""What a region's link may carry in a round, held against the most that an exact partial can take. Pure.

The bound is safe whatever the clients send: it follows from the caps. What normal sums take is far below it, since a
block is only as wide as its own values need (``hierfl/packing.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hierfl import packing
from hierfl.errors import ConfigError
from hierfl.job import Job
from hierfl.layout import Layout
from hierfl.strategies import Strategy

__all__ = ["check_budget"]

KEY = "round.border_budget_bytes"
MAX_HALVINGS = 40


def check_budget(job: Job, strategy: Strategy, layout: Layout, num_regions: int) -> None:
    """Refuse a job whose partials could exceed its budget.

    Raises:
        ConfigError: Names the budget, the most that a partial can take, and what would fit.
    """
    budget, caps = job.round.border_budget_bytes, job.arithmetic

    def most_bytes(max_abs: float, total_weight: int) -> int:
        groups = strategy.column_groups(layout, max_abs=max_abs, total_weight=total_weight)
        return packing.most_bytes(groups, total_weight // num_regions)

    most = most_bytes(caps.max_abs, caps.total_weight)
    if not budget or most <= budget:
        return
    least_weight = caps.max_weight * num_regions
    remedies = (
        _largest(_halves(caps.max_abs), lambda value: most_bytes(value, caps.total_weight) <= budget),
        _largest(
            (int(value) for value in _halves(caps.total_weight) if value >= least_weight),
            lambda value: most_bytes(caps.max_abs, int(value)) <= budget,
        ),
    )
    names = ("arithmetic.max_abs", "arithmetic.total_weight")
    would = [f"{name} = {value}" for name, value in zip(names, remedies, strict=True) if value is not None]
    fitting = layout.num_params * budget // most
    would.append(f"model.tensors that have at most {fitting:,} values in all")
    raise ConfigError(
        KEY, budget, f"must be at least {most:,}, which exact sums can take; or one of {', '.join(would)}"
    )


def _halves(value: float) -> Iterator[float]:
    return (value / 2**times for times in range(1, MAX_HALVINGS))


def _largest(values: Iterator[float], fits: Callable[[float], bool]) -> float | None:
    return next((value for value in values if fits(value)), None)
