"""FedAvgM against Hsu et al.'s server momentum, one value at a time."""

from __future__ import annotations

import pytest

from hierfl.errors import ConfigError, ConfigErrors
from hierfl.strategies import get


@pytest.mark.parametrize(("learning_rate", "momentum"), [(1.0, 0.9), (0.5, 0.7), (1.0, 0.0)])
def test_fedavgm_gathers_speed(same_bits_as, learning_rate, momentum):
    def slow(t, x, d, memory):
        memory["v"] = momentum * memory.get("v", 0.0) + d
        return x + learning_rate * memory["v"]

    same_bits_as(get("fedavgm", {"learning_rate": learning_rate, "momentum": momentum}), slow)


def test_fedavgm_without_momentum_is_fedavg(same_bits_as):
    same_bits_as(get("fedavgm", {"momentum": 0}), lambda t, x, d, memory: x + d)


def test_momentum_must_be_below_one_and_all_errors_are_told_at_once():
    with pytest.raises(ConfigError, match=r"strategy\.momentum = 1\.0 must be a number from 0 to below 1"):
        get("fedavgm", {"momentum": 1})
    with pytest.raises(ConfigErrors) as caught:
        get("fedavgm", {"momentum": -0.1, "learning_rate": 0})
    assert [error.key for error in caught.value.errors] == ["strategy.learning_rate", "strategy.momentum"]
