"""The figures of one case: what was done how often, with which load, and what came of it. Printed as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

__all__ = ["Figures", "spread"]


@dataclass(kw_only=True)
class Figures:
    """Of one row of the matrix."""

    row: int
    load: str
    repeats: int
    """How often the fault was made."""
    clean: bool
    """Whether nothing was lost, counted twice, or told wrongly."""
    wrong: Sequence[str] = ()
    figures: Mapping[str, float | int | str] = field(default_factory=dict)
    """What the row promises, measured; names end in their unit."""


def spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Median and largest of several durations."""
    return {f"{name}_median_s": round(median(seconds), 2), f"{name}_max_s": round(max(seconds), 2)}
