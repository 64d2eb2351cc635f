"""A federation in plain Python, one float at a time: what strategies are held against."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from hierfl.aggregation import Accumulator, PartialAggregate
from hierfl.layout import Layout, Role
from hierfl.strategies import Strategy

Memory = dict[str, float]
SlowRule = Callable[[int, float, float, Memory], float]
"""From (round, x, mean delta, what this value remembers) to the next x, before it becomes float32."""

PARAMS = {
    "w": np.array([0.5, -1.25, 3.0, 0.0, 1e-3, -7.5], np.float32),
    "running": np.array([10.0, -2000.5], np.float32),
}
LAYOUT = Layout.of(PARAMS, {"running": Role.MEAN})
NUM_ROUNDS = 6


def deltas_of(round_number: int) -> list[tuple[dict[str, np.ndarray], int]]:
    """Three clients' deltas and weights; every coordinate changes sign now and then, one never moves."""
    random = np.random.default_rng(round_number)
    cohort = []
    for weight in (1, 400, 65_535):
        train = random.integers(-(2**22), 2**22, 6).astype(np.float32) / np.float32(2**22)
        train[3] = 0
        mean = random.integers(-(2**20), 2**20, 2).astype(np.float32) / np.float32(2**6)
        cohort.append(({"train": train, "mean": mean}, weight))
    return cohort


def total_of(strategy: Strategy, round_number: int) -> PartialAggregate:
    sums = Accumulator(strategy.column_groups(LAYOUT))
    for vectors, weight in deltas_of(round_number):
        sums.fold({name: [values] for name, values in vectors.items()}, weight)
    return sums.partial(3)


def slow_mean(round_number: int, vector: str, index: int) -> float:
    cohort = deltas_of(round_number)
    total = sum(weight * round(Fraction(float(vectors[vector][index])) * 2**32) for vectors, weight in cohort)
    return float(total) / sum(weight for _, weight in cohort) / 2.0**32


def check_against(strategy: Strategy, rule: SlowRule) -> None:
    """Run both for some rounds and compare every bit of every model on the way."""
    params = LAYOUT.flatten(PARAMS)
    state = strategy.init(params)
    memories: list[Memory] = [{} for _ in range(6)]
    for round_number in range(1, NUM_ROUNDS + 1):
        expected = [
            rule(round_number, float(x), slow_mean(round_number, "train", i), memories[i])
            for i, x in enumerate(params["train"])
        ]
        running = [float(x) + slow_mean(round_number, "mean", i) for i, x in enumerate(params["mean"])]
        params, state = strategy.apply(params, total_of(strategy, round_number), state)
        assert params["train"].tobytes() == np.array(expected, np.float32).tobytes()
        assert params["mean"].tobytes() == np.array(running, np.float32).tobytes()
    assert state.step == NUM_ROUNDS


@pytest.fixture
def same_bits_as() -> Callable[[Strategy, SlowRule], None]:
    return check_against


@pytest.fixture
def layout() -> Layout:
    return LAYOUT


@pytest.fixture
def params() -> dict[str, np.ndarray]:
    return LAYOUT.flatten(PARAMS)


@pytest.fixture
def total() -> Callable[[Strategy, int], PartialAggregate]:
    return total_of
