"""FedYogi against algorithm 2 of Reddi et al. 2021, one value at a time."""

from __future__ import annotations

import math

import pytest

from hierfl.errors import ConfigError
from hierfl.strategies import get


def sign(value: float) -> float:
    return math.copysign(1.0, value) if value else 0.0


@pytest.mark.parametrize(("bias_correction", "tau"), [(False, 1e-3), (True, 1e-3), (False, 0.5)])
def test_fedyogi_follows_the_paper(same_bits_as, bias_correction, tau):
    def slow(t, x, d, memory):
        before = memory.get("v", 0.0 if bias_correction else tau * tau)
        memory["m"] = 0.9 * memory.get("m", 0.0) + (1 - 0.9) * d
        memory["v"] = before - (1 - 0.99) * (d * d) * sign(before - d * d)
        bias_1, bias_2 = (math.prod([beta] * t, start=1.0) if bias_correction else 0.0 for beta in (0.9, 0.99))
        return x + 0.01 * (memory["m"] / (1 - bias_1)) / (math.sqrt(memory["v"] / (1 - bias_2)) + tau)

    same_bits_as(get("fedyogi", {"bias_correction": bias_correction, "tau": tau}), slow)


def test_options_out_of_range_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"strategy\.beta_2"):
        get("fedyogi", {"beta_2": 1.5})
