"""FedAdam against algorithm 2 of Reddi et al. 2021, one value at a time."""

from __future__ import annotations

import math

import pytest

from hierfl.errors import ConfigError
from hierfl.strategies import get


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.3, "beta_1": 0.5, "beta_2": 0.999, "tau": 1e-8}])
def test_fedadam_follows_the_paper(same_bits_as, options):
    lr, beta_1, beta_2, tau = (
        ({"learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3} | options)[key]
        for key in ("learning_rate", "beta_1", "beta_2", "tau")
    )

    def slow(t, x, d, memory):
        memory["m"] = beta_1 * memory.get("m", 0.0) + (1 - beta_1) * d
        memory["v"] = beta_2 * memory.get("v", tau * tau) + (1 - beta_2) * (d * d)
        return x + lr * memory["m"] / (math.sqrt(memory["v"]) + tau)

    same_bits_as(get("fedadam", options), slow)


def test_fedadam_corrects_bias_when_asked(same_bits_as):
    def slow(t, x, d, memory):
        memory["m"] = 0.9 * memory.get("m", 0.0) + (1 - 0.9) * d
        memory["v"] = 0.99 * memory.get("v", 0.0) + (1 - 0.99) * (d * d)
        bias_1, bias_2 = math.prod([0.9] * t, start=1.0), math.prod([0.99] * t, start=1.0)
        return x + 0.01 * (memory["m"] / (1 - bias_1)) / (math.sqrt(memory["v"] / (1 - bias_2)) + 1e-3)

    same_bits_as(get("fedadam", {"bias_correction": True}), slow)


@pytest.mark.parametrize(
    ("option", "value"), [("beta_1", 1.0), ("beta_2", -0.1), ("tau", 0), ("learning_rate", 0), ("bias_correction", 1)]
)
def test_options_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(ConfigError, match=rf"strategy\.{option}"):
        get("fedadam", {option: value})
