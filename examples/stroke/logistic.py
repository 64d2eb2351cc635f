"""Logistic regression in NumPy: predict, descend a few steps, or fit to the end. Pure; float64 inside."""

from __future__ import annotations

import numpy as np
from prepare import Sample

from hierfl.types import Float64Array

__all__ = ["descend", "fit", "fit_intercept", "log_loss", "logit", "predict", "sigmoid"]

MOST_LOGIT = 30.0
LEAST_RISK = 1e-6
MOST_STEPS = 100
CLOSE_ENOUGH = 1e-10
FREE = 0.1
"""Ridge of an intercept: next to none, but where all patients had one outcome there still is an optimum."""


def sigmoid(logits: Float64Array) -> Float64Array:
    risks: Float64Array = 1.0 / (1.0 + np.exp(-np.clip(logits, -MOST_LOGIT, MOST_LOGIT)))
    return risks


def logit(risks: Float64Array) -> Float64Array:
    clipped = np.clip(risks, LEAST_RISK, 1.0 - LEAST_RISK)
    logits: Float64Array = np.log(clipped / (1.0 - clipped))
    return logits


def predict(inputs: Float64Array, coefficients: Float64Array, intercept: float) -> Float64Array:
    """Risk of each patient, 0 to 1, shape ``(n,)``."""
    return sigmoid(inputs @ coefficients + intercept)


def log_loss(risks: Float64Array, outcomes: Float64Array) -> Float64Array:
    """Of each patient, in nats, shape ``(n,)``; finite also for a risk of 0 or 1."""
    clipped = np.clip(risks, LEAST_RISK, 1.0 - LEAST_RISK)
    losses: Float64Array = -np.log(np.where(outcomes == 1.0, clipped, 1.0 - clipped))
    return losses


def descend(
    sample: Sample, coefficients: Float64Array, intercept: float, *, steps: int, learning_rate: float
) -> tuple[Float64Array, float]:
    """So many steps of plain gradient descent on the mean log loss, over all patients at once."""
    for _ in range(steps):
        errors = predict(sample.inputs, coefficients, intercept) - sample.outcomes
        coefficients = coefficients - learning_rate * (errors @ sample.inputs) / len(sample)
        intercept = intercept - learning_rate * float(errors.mean())
    return coefficients, intercept


def fit(sample: Sample, ridge: float, groups: np.ndarray | None = None) -> tuple[Float64Array, Float64Array]:
    """Minimise the summed log loss plus ``ridge / 2`` times the squared coefficients, by Newton's method.

    Args:
        ridge: Above 0. A normal prior of variance ``1 / ridge`` on each coefficient; intercepts are next to free.
        groups: Group of each patient, 0 to g - 1, each with an intercept of its own. Without: one for all.
    Returns:
        Coefficients, and intercepts of shape ``(g,)``.
    """
    groups = np.zeros(len(sample), int) if groups is None else groups
    num_groups, num_inputs = int(groups.max()) + 1, sample.inputs.shape[1]
    design = np.hstack([sample.inputs, np.eye(num_groups)[groups]])
    penalty = np.array([ridge] * num_inputs + [FREE] * num_groups)
    start = np.append(np.zeros(num_inputs), logit(_rates(sample.outcomes, groups)))
    values = _newton(design, sample.outcomes, penalty, start, np.zeros(len(sample)))
    return values[:num_inputs], values[num_inputs:]


def fit_intercept(sample: Sample, coefficients: Float64Array) -> float:
    """What a hospital does with a model that came without an intercept: fit that alone, on its own patients."""
    ones, offset = np.ones((len(sample), 1)), sample.inputs @ coefficients
    return float(_newton(ones, sample.outcomes, np.array([FREE]), np.zeros(1), offset)[0])


def _rates(outcomes: Float64Array, groups: np.ndarray) -> Float64Array:
    rates: Float64Array = (np.bincount(groups, outcomes) + 0.5) / (np.bincount(groups) + 1.0)
    return rates


def _newton(
    design: Float64Array, outcomes: Float64Array, penalty: Float64Array, values: Float64Array, offset: Float64Array
) -> Float64Array:
    """Newton's method, a step halved while the loss would rise."""

    def loss(at: Float64Array) -> float:
        risks = sigmoid(design @ at + offset)
        return float(log_loss(risks, outcomes).sum() + 0.5 * (penalty * at * at).sum())

    for _ in range(MOST_STEPS):
        risks = sigmoid(design @ values + offset)
        gradient = (risks - outcomes) @ design + penalty * values
        hessian = (design.T * (risks * (1.0 - risks))) @ design + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        before = loss(values)
        while loss(values - step) > before and np.abs(step).max() > CLOSE_ENOUGH:
            step = step / 2.0
        values = values - step
        if np.abs(step).max() <= CLOSE_ENOUGH:
            break
    return values
