"""FedAvg against McMahan et al.'s average, one value at a time."""

from __future__ import annotations

import pytest

from hierfl.errors import ConfigError
from hierfl.strategies import get


@pytest.mark.parametrize("learning_rate", [1.0, 0.3])
def test_fedavg_moves_along_the_mean_delta(same_bits_as, learning_rate):
    strategy = get("fedavg", {"learning_rate": learning_rate})
    same_bits_as(strategy, lambda t, x, d, memory: x + learning_rate * d)


def test_fedavg_by_default_is_the_weighted_mean_of_the_clients():
    assert get("fedavg") == get("fedavg", {"learning_rate": 1})
    assert get("fedavg").client_part() == {}


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "1", None])
def test_a_learning_rate_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match=r"strategy\.learning_rate.*above 0"):
        get("fedavg", {"learning_rate": value})
