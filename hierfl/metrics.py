"""Declared metrics: numbers that ride with updates and leave a region only as sums.

A metric is a sum over a client's examples (``loss_sum``, ``num_correct``), declared in the plan with its scale
and range; strings and undeclared names do not exist. It becomes an integer at the client, so that its sums, too,
do not depend on order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from hierfl.errors import ConfigError, ValueOutOfRange

__all__ = [
    "STANDARD_METRICS",
    "MetricSpec",
    "add_metrics",
    "check_metric_sums",
    "metric_values",
    "quantise_metrics",
    "with_means",
]

MAX_BITS = 48
"""Of one update's metric; sums are kept within int64, so that 2**15 updates always fit."""

MAX_SUM = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """One metric: values within ``±max_abs``, kept to the nearest ``2**-scale``."""

    name: str
    scale: int = 20
    """Fraction bits: 20 for sums of losses, 0 for counts."""
    max_abs: int
    """Largest magnitude of one client's value."""

    def __post_init__(self) -> None:
        key = f"metrics.{self.name}"
        if not self.name or len(self.name) > 100:
            raise ConfigError(key, self.name, "must have a name of 1 to 100 characters")
        if not 0 <= self.scale <= 40:
            raise ConfigError(f"{key}.scale", self.scale, "must be from 0 to 40")
        if self.max_abs < 1 or self.max_q > 2**MAX_BITS:
            raise ConfigError(f"{key}.max_abs", self.max_abs, f"must be from 1 to 2**({MAX_BITS} - scale)")

    @property
    def max_q(self) -> int:
        """Largest magnitude of one update's integer."""
        return self.max_abs << self.scale


def quantise_metrics(specs: Iterable[MetricSpec], values: Mapping[str, float]) -> dict[str, int]:
    """One client's metrics as integers, ``rint(value * 2**scale)``. A declared metric may be left out.

    Raises:
        ValueOutOfRange: A name that is not declared, or a value that is NaN or above its ``max_abs``.
    """
    declared = {spec.name: spec for spec in specs}
    quantised: dict[str, int] = {}
    for name, value in values.items():
        if name not in declared:
            raise ValueOutOfRange(f"metric {name!r} is not declared in the plan")
        spec = declared[name]
        if not abs(value) <= spec.max_abs:
            raise ValueOutOfRange(f"metric {name!r} is {value}: must be at most {spec.max_abs} in magnitude")
        quantised[name] = round(math.ldexp(value, spec.scale))
    return quantised


def check_metric_sums(specs: Iterable[MetricSpec], sums: Mapping[str, int], num_updates: int) -> None:
    """Raise ``ValueOutOfRange`` for a sum that ``num_updates`` updates cannot have, or that is not declared."""
    declared = {spec.name: spec for spec in specs}
    for name, total in sums.items():
        if name not in declared:
            raise ValueOutOfRange(f"metric {name!r} is not declared in the plan")
        if abs(total) > declared[name].max_q * num_updates:
            raise ValueOutOfRange(f"metric {name!r} sums to more than {num_updates} updates can")


def add_metrics(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    """Sums of both, name by name, in the order of the names.

    Raises:
        ValueOutOfRange: A sum outside int64.
    """
    total = {name: left.get(name, 0) + right.get(name, 0) for name in sorted({*left, *right})}
    for name, value in total.items():
        if abs(value) > MAX_SUM:
            raise ValueOutOfRange(f"metric {name!r} sums to more than 64 bits hold")
    return total


def metric_values(specs: Iterable[MetricSpec], sums: Mapping[str, int]) -> dict[str, float]:
    """Sums in the metrics' own units, each correctly rounded to float64."""
    return {spec.name: float(Fraction(sums[spec.name], 2**spec.scale)) for spec in specs if spec.name in sums}


STANDARD_METRICS = (
    MetricSpec(name="num_examples", scale=0, max_abs=2**40),
    MetricSpec(name="train_loss_sum", scale=20, max_abs=2**28),
    MetricSpec(name="eval_examples", scale=0, max_abs=2**40),
    MetricSpec(name="eval_loss_sum", scale=20, max_abs=2**28),
    MetricSpec(name="eval_correct", scale=0, max_abs=2**40),
)
"""What every plan declares. Losses are sums over examples: a client's mean loss times its examples."""

MEANS = {
    "train_loss": ("train_loss_sum", "num_examples"),
    "eval_loss": ("eval_loss_sum", "eval_examples"),
    "eval_accuracy": ("eval_correct", "eval_examples"),
}
"""Mean: (sum, number of examples that it is over)."""


def with_means(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over all regions, and the means that can be made from them: what is shown of a round."""
    means = {
        mean: values[total] / values[count]
        for mean, (total, count) in MEANS.items()
        if total in values and values.get(count, 0) > 0
    }
    return {**values, **means}
