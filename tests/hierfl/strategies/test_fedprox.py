"""FedProx: FedAvg at the server, a proximal term at the clients."""

from __future__ import annotations

import pytest

from hierfl.errors import ConfigError
from hierfl.strategies import get


def test_fedprox_averages_at_the_server(same_bits_as):
    same_bits_as(get("fedprox", {"learning_rate": 0.7}), lambda t, x, d, memory: x + 0.7 * d)


def test_fedprox_tells_the_clients_its_mu():
    assert get("fedprox").client_part() == {"proximal_mu": 0.01}
    assert get("fedprox", {"proximal_mu": 0}).client_part() == {"proximal_mu": 0.0}


def test_a_negative_mu_is_refused():
    with pytest.raises(ConfigError, match=r"strategy\.proximal_mu"):
        get("fedprox", {"proximal_mu": -0.1})
