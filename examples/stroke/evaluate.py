"""How good risks are, at each hospital and on average over hospitals, and how sure that is.

Every figure is a mean over hospitals, each counting the same, of what it is at one hospital (a hospital whose
held-out patients all had one outcome has no AUC); only the calibration slope is of all patients together, since a
hospital has too few for a slope of its own.
Intervals are 95 % percentile bootstrap intervals: patients are drawn anew within each hospital, and for
what is to hold at other hospitals too, hospitals are drawn anew as well. All models are measured on the
same draws, so differences between models are paired.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from logistic import log_loss, logit, sigmoid

from hierfl.types import Float64Array

__all__ = ["METRICS", "Estimate", "Judge", "auc", "estimate", "slopes"]

Risks = Mapping[str, Float64Array]
"""Predicted risk of each held-out patient, by site."""

METRICS = ("auc", "log_loss", "calibration_error", "calibration_slope")
"""``auc``: 0.5 is chance, 1 perfect. ``log_loss``: nats a patient, less is better. ``calibration_error``: how far
a hospital's mean predicted risk is from its own rate of bad outcomes, root mean square over hospitals, 0 is best; what
chance alone adds to that, in hospitals of so few patients, is taken off. ``calibration_slope``: 1 is best, below 1 the
risks are too extreme."""

BOUNDS = (2.5, 97.5)
"""Percentiles of an interval."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval."""

    value: float
    low: float
    high: float

    def document(self) -> dict[str, Any]:
        return {"value": round(self.value, 5), "low": round(self.low, 5), "high": round(self.high, 5)}


def auc(risks: Float64Array, outcomes: Float64Array, weights: Float64Array) -> Float64Array:
    """Share of pairs (one bad outcome, one good) in which the bad one has the higher risk; ties count half.

    Args:
        weights: How often each patient is in a draw, shape ``(draws, n)``.
    Returns:
        Shape ``(draws,)``; NaN for a draw with one outcome only.
    """
    bad = outcomes == 1.0
    above = risks[bad][:, None] - risks[~bad][None, :]
    wins = (above > 0) + 0.5 * (above == 0)
    pairs = weights[:, bad].sum(axis=1) * weights[:, ~bad].sum(axis=1)
    won = ((weights[:, bad] @ wins) * weights[:, ~bad]).sum(axis=1)
    found: Float64Array = np.divide(won, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
    return found


class Judge:
    """Measures models on the held-out patients of some hospitals. The first draw is the patients as they are."""

    def __init__(self, outcomes: Mapping[str, Float64Array], *, draws: int, seed: int) -> None:
        self.outcomes = outcomes
        self._patients = {site: _draws(len(own), draws, seed, site) for site, own in outcomes.items()}
        self._hospitals = _draws(len(outcomes), draws, seed, "hospitals")

    def measure(self, risks: Risks, *, other_hospitals: bool = False) -> dict[str, Float64Array]:
        """Every metric in every draw, shape ``(1 + draws,)``; ``other_hospitals``: hospitals are drawn too."""
        counts = self._hospitals if other_hospitals else np.ones_like(self._hospitals)
        by_site = [self._at_site(site, risks[site]) for site in self.outcomes]
        found = {
            name: _mean(np.stack([site[name] for site in by_site], axis=1), counts)
            for name in ("auc", "log_loss", "calibration_error")
        }
        found["calibration_error"] = np.sqrt(np.maximum(found["calibration_error"], 0.0))
        weights = [self._patients[site] * counts[:, [n]] for n, site in enumerate(self.outcomes)]
        all_risks = np.concatenate([risks[site] for site in self.outcomes])
        all_outcomes = np.concatenate(list(self.outcomes.values()))
        return {**found, "calibration_slope": slopes(all_risks, all_outcomes, np.hstack(weights))}

    def _at_site(self, site: str, risks: Float64Array) -> dict[str, Float64Array]:
        outcomes, weights = self.outcomes[site], self._patients[site]
        return {
            "auc": auc(risks, outcomes, weights),
            "log_loss": weights @ log_loss(risks, outcomes) / len(outcomes),
            "calibration_error": _squared_error(risks - outcomes, weights),
        }


def _squared_error(errors: Float64Array, weights: Float64Array) -> Float64Array:
    """Square of the mean error in each draw, without what chance adds: once, and once more by drawing again."""
    chance = errors.var(ddof=1) / len(errors) if len(errors) > 1 else 0.0
    times = np.where(np.arange(len(weights)) == 0, 1.0, 2.0)
    squared: Float64Array = (weights @ errors / len(errors)) ** 2 - times * chance
    return squared


def estimate(draws: Float64Array) -> Estimate:
    """The first draw's value, and the interval of the others."""
    low, high = np.nanpercentile(draws[1:], BOUNDS)
    return Estimate(float(draws[0]), float(low), float(high))


def slopes(risks: Float64Array, outcomes: Float64Array, weights: Float64Array) -> Float64Array:
    """Slope of the logistic regression of outcomes on the logit of risks, in each draw, shape ``(draws,)``."""
    logits = logit(risks)
    intercepts, found = np.zeros(len(weights)), np.ones(len(weights))
    for _ in range(8):  # Newton from (0, 1), which a fair model is close to
        fitted = sigmoid(intercepts[:, None] + found[:, None] * logits)
        errors, curvature = weights * (fitted - outcomes), weights * fitted * (1.0 - fitted)
        g0, g1 = errors.sum(axis=1), errors @ logits
        h00, h01, h11 = curvature.sum(axis=1), curvature @ logits, curvature @ (logits * logits)
        determinant = h00 * h11 - h01 * h01
        intercepts = intercepts - (h11 * g0 - h01 * g1) / determinant
        found = found - (h00 * g1 - h01 * g0) / determinant
    return found


def _draws(size: int, draws: int, seed: int, name: str) -> Float64Array:
    """How often each of ``size`` is drawn, shape ``(1 + draws, size)``: once each in the first."""
    rng = np.random.default_rng([seed, crc32(name.encode())])
    drawn = rng.multinomial(size, np.full(size, 1.0 / size), size=draws)
    return np.vstack([np.ones((1, size)), drawn.astype(np.float64)])


def _mean(values: Float64Array, counts: Float64Array) -> Float64Array:
    """Mean over hospitals by their counts; a hospital without a value in a draw is left out of that draw."""
    there = ~np.isnan(values)
    mean: Float64Array = np.where(there, values * counts, 0.0).sum(axis=1) / (there * counts).sum(axis=1)
    return mean
