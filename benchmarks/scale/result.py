"""The result file of ``simulate_scale``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks import harness
from benchmarks.scale.constants import Constants, Size

__all__ = ["GOAL", "SCHEMA", "Prediction", "ScaleResult"]

SCHEMA = "hierfl.bench_simulation/1"
GOAL = 0.25
"""Largest relative error of a prediction that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One measured round beside the simulated one."""

    size: Size
    calibrates: bool
    measured_s: float
    predicted_s: float
    measured_cpu_s: float
    predicted_cpu_s: float
    load: float
    """Of the machine before it was measured: what others took is not simulated."""

    @property
    def error(self) -> float:
        """Relative: -0.1 is ten per cent too fast."""
        return self.predicted_s / self.measured_s - 1

    @property
    def is_within_goal(self) -> bool:
        return abs(self.error) <= GOAL


@dataclass(frozen=True, kw_only=True)
class ScaleResult:
    """``results/simulation.json``."""

    schema: str
    machine: harness.Machine
    load: float
    """Median over the rounds."""
    versions: Mapping[str, str]
    seed: int
    constants: Constants
    partial_ratio: float
    """Bytes of a partial over bytes of the model, of the largest model measured."""
    kib_a_client: float | None
    """Private memory of an intake for each client that is connected to it; None where too few rounds show it."""
    predictions: tuple[Prediction, ...]
