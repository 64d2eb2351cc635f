"""Strategies by name. A built-in one is a line here; others register in the entry-point group ``hierfl.strategies``."""

from __future__ import annotations

from collections.abc import Mapping

from hierfl.registry import Registry
from hierfl.strategies.adaptive import FedAdagrad, FedAdam, FedYogi
from hierfl.strategies.averaging import FedAvg, FedAvgM, FedProx
from hierfl.strategies.base import Strategy

__all__ = ["get", "names"]

BUILT_IN: Mapping[str, type[Strategy]] = {
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedprox": FedProx,
    "fedyogi": FedYogi,
}

_STRATEGIES: Registry[Strategy] = Registry(
    noun="strategy",
    group="hierfl.strategies",
    table="strategy",
    key="name",
    needs="apply",
    built_in=BUILT_IN,
)

names, get = _STRATEGIES.names, _STRATEGIES.get
