"""FedAdagrad against algorithm 2 of Reddi et al. 2021, one value at a time."""

from __future__ import annotations

import math

import pytest

from hierfl.errors import ConfigError
from hierfl.strategies import get


@pytest.mark.parametrize(("beta_1", "bias_correction"), [(0.0, False), (0.9, False), (0.9, True), (0.0, True)])
def test_fedadagrad_follows_the_paper(same_bits_as, beta_1, bias_correction):
    def slow(t, x, d, memory):
        memory["m"] = beta_1 * memory.get("m", 0.0) + (1 - beta_1) * d
        memory["v"] = memory.get("v", 1e-3 * 1e-3) + d * d
        bias = math.prod([beta_1] * t, start=1.0) if bias_correction else 0.0
        return x + 0.1 * (memory["m"] / (1 - bias)) / (math.sqrt(memory["v"]) + 1e-3)

    same_bits_as(get("fedadagrad", {"beta_1": beta_1, "bias_correction": bias_correction}), slow)


def test_fedadagrad_has_no_second_beta():
    with pytest.raises(ConfigError, match=r"strategy\.beta_2 = 0\.9 is no option of fedadagrad; did you mean 'beta_1'"):
        get("fedadagrad", {"beta_2": 0.9})
