"""Adaptive server optimisers: FedAdam, FedYogi, FedAdagrad.

Source: Reddi et al. 2021, Adaptive Federated Optimization (arXiv:2003.00295), algorithm 2. Written ``x`` for the
model, ``d`` for the mean delta, ``lr`` for the server's learning rate, one round is::

    m <- beta_1 * m + (1 - beta_1) * d                             m starts at 0
    v <- v + d*d                                   FedAdagrad      v starts at tau*tau
    v <- v - (1 - beta_2) * d*d * sign(v - d*d)    FedYogi
    v <- beta_2 * v + (1 - beta_2) * d*d           FedAdam
    x <- x + lr * m / (sqrt(v) + tau)

The paper fixes beta_1 = 0.9, beta_2 = 0.99 (FedAdagrad: beta_1 = 0) and mostly tau = 0.001; these are the defaults.
It tunes ``lr`` for each task: the defaults here only start that search. Algorithm 2 corrects no bias, so
``bias_correction`` is off unless asked for; then, after Kingma & Ba 2015 (arXiv:1412.6980), v starts at 0 and round
t uses ``m / (1 - beta_1**t)`` and ``v / (1 - beta_2**t)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hierfl.aggregation import ColumnGroup, PartialAggregate
from hierfl.layout import Layout
from hierfl.strategies.base import (
    FLAG,
    FRACTION,
    POSITIVE,
    Memory,
    State,
    Vectors,
    advance,
    check_options,
    delta_groups,
    power,
    zeros_like_train,
)
from hierfl.types import Float32Array, Float64Array

__all__ = ["FedAdagrad", "FedAdam", "FedYogi"]

SecondMoment = Callable[[Float64Array, Float64Array], Float64Array]
"""From v and d*d to the next v."""


@dataclass(frozen=True, kw_only=True)
class FedAdam:
    """Adam at the server: v forgets at a fixed rate. Formulae, defaults and source: see the module."""

    exact_in_two_tiers: ClassVar[bool] = True

    learning_rate: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 0.001
    """Degree of adaptivity: the smaller, the more each value has a step size of its own."""
    bias_correction: bool = False

    def __post_init__(self) -> None:
        _check_adam_options(self)

    def column_groups(
        self, layout: Layout, *, max_abs: float = 8.0, total_weight: int = 2**27
    ) -> tuple[ColumnGroup, ...]:
        return delta_groups(layout, max_abs, total_weight)

    def client_part(self) -> Mapping[str, float]:
        return {}

    def init(self, params: Vectors) -> State:
        return _start(params, 0.0 if self.bias_correction else self.tau * self.tau)

    def apply(self, params: Vectors, total: PartialAggregate, state: State) -> tuple[dict[str, Float32Array], State]:
        def second_moment(v: Float64Array, square: Float64Array) -> Float64Array:
            return self.beta_2 * v + (1.0 - self.beta_2) * square

        t = state.step + 1
        divisors = _bias_divisors(self.beta_1, self.beta_2, t) if self.bias_correction else (1.0, 1.0)
        return _apply(params, total, state, self.learning_rate, self.beta_1, self.tau, second_moment, divisors)


@dataclass(frozen=True, kw_only=True)
class FedYogi:
    """Yogi at the server: v grows fast and falls slowly. Formulae, defaults and source: see the module."""

    exact_in_two_tiers: ClassVar[bool] = True

    learning_rate: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 0.001
    """Degree of adaptivity: the smaller, the more each value has a step size of its own."""
    bias_correction: bool = False

    def __post_init__(self) -> None:
        _check_adam_options(self)

    def column_groups(
        self, layout: Layout, *, max_abs: float = 8.0, total_weight: int = 2**27
    ) -> tuple[ColumnGroup, ...]:
        return delta_groups(layout, max_abs, total_weight)

    def client_part(self) -> Mapping[str, float]:
        return {}

    def init(self, params: Vectors) -> State:
        return _start(params, 0.0 if self.bias_correction else self.tau * self.tau)

    def apply(self, params: Vectors, total: PartialAggregate, state: State) -> tuple[dict[str, Float32Array], State]:
        def second_moment(v: Float64Array, square: Float64Array) -> Float64Array:
            sign = (v > square).astype(np.float64) - (v < square)
            return v - (1.0 - self.beta_2) * square * sign

        t = state.step + 1
        divisors = _bias_divisors(self.beta_1, self.beta_2, t) if self.bias_correction else (1.0, 1.0)
        return _apply(params, total, state, self.learning_rate, self.beta_1, self.tau, second_moment, divisors)


@dataclass(frozen=True, kw_only=True)
class FedAdagrad:
    """Adagrad at the server: v only grows, so steps only shrink. Formulae, defaults and source: see the module."""

    exact_in_two_tiers: ClassVar[bool] = True

    learning_rate: float = 0.1
    beta_1: float = 0.0
    tau: float = 0.001
    """Degree of adaptivity: the smaller, the more each value has a step size of its own."""
    bias_correction: bool = False
    """Of m only: v is a sum and has no bias."""

    def __post_init__(self) -> None:
        check_options(self, learning_rate=POSITIVE, beta_1=FRACTION, tau=POSITIVE, bias_correction=FLAG)

    def column_groups(
        self, layout: Layout, *, max_abs: float = 8.0, total_weight: int = 2**27
    ) -> tuple[ColumnGroup, ...]:
        return delta_groups(layout, max_abs, total_weight)

    def client_part(self) -> Mapping[str, float]:
        return {}

    def init(self, params: Vectors) -> State:
        return _start(params, self.tau * self.tau)

    def apply(self, params: Vectors, total: PartialAggregate, state: State) -> tuple[dict[str, Float32Array], State]:
        divisor = 1.0 - power(self.beta_1, state.step + 1) if self.bias_correction else 1.0
        return _apply(params, total, state, self.learning_rate, self.beta_1, self.tau, np.add, (divisor, 1.0))


def _check_adam_options(strategy: FedAdam | FedYogi) -> None:
    check_options(
        strategy, learning_rate=POSITIVE, beta_1=FRACTION, beta_2=FRACTION, tau=POSITIVE, bias_correction=FLAG
    )


def _start(params: Vectors, first_v: float) -> State:
    zeros = zeros_like_train(params)
    return State(arrays={"m": zeros, "v": zeros + first_v})


def _bias_divisors(beta_1: float, beta_2: float, t: int) -> tuple[float, float]:
    return 1.0 - power(beta_1, t), 1.0 - power(beta_2, t)


def _apply(
    params: Vectors,
    total: PartialAggregate,
    state: State,
    learning_rate: float,
    beta_1: float,
    tau: float,
    second_moment: SecondMoment,
    divisors: tuple[float, float],
) -> tuple[dict[str, Float32Array], State]:
    """One round of algorithm 2. ``divisors`` of m and v correct their bias; dividing by 1 changes no bit."""

    def step(delta: Float64Array, memory: Memory) -> tuple[Float64Array, Memory]:
        m = beta_1 * memory["m"] + (1.0 - beta_1) * delta
        v = second_moment(memory["v"], delta * delta)
        return learning_rate * (m / divisors[0]) / (np.sqrt(v / divisors[1]) + tau), {"m": m, "v": v}

    return advance(params, total, state, step)
