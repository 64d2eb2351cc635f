"""Strategies that follow the weighted mean delta: FedAvg, FedAvgM, FedProx.

Written ``x`` for the model, ``d`` for the mean delta (clients minus global, weighted), ``lr`` for the server's
learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hierfl.aggregation import ColumnGroup, PartialAggregate
from hierfl.layout import Layout
from hierfl.strategies.base import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Memory,
    State,
    Vectors,
    advance,
    check_options,
    delta_groups,
    zeros_like_train,
)
from hierfl.types import Float32Array, Float64Array

__all__ = ["FedAvg", "FedAvgM", "FedProx"]


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """``x <- x + lr * d``. With the default ``lr`` of 1 the new model is the clients' weighted mean.

    Source: McMahan et al. 2017 (arXiv:1602.05629), algorithm 1; the server's learning rate after Reddi et al. 2021
    (arXiv:2003.00295), section 2.
    """

    exact_in_two_tiers: ClassVar[bool] = True

    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        check_options(self, learning_rate=POSITIVE)

    def column_groups(
        self, layout: Layout, *, max_abs: float = 8.0, total_weight: int = 2**27
    ) -> tuple[ColumnGroup, ...]:
        return delta_groups(layout, max_abs, total_weight)

    def client_part(self) -> Mapping[str, float]:
        return {}

    def init(self, params: Vectors) -> State:
        del params
        return State()

    def apply(self, params: Vectors, total: PartialAggregate, state: State) -> tuple[dict[str, Float32Array], State]:
        return advance(params, total, state, self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class FedAvgM:
    """``v <- momentum * v + d``, then ``x <- x + lr * v``; ``v`` starts at 0.

    Source: Hsu et al. 2019 (arXiv:1909.06335), section 4.1. ``momentum`` 0.9 is the value that Reddi et al. 2021
    compare with; ``lr`` 1 is Hsu's.
    """

    exact_in_two_tiers: ClassVar[bool] = True

    learning_rate: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_options(self, learning_rate=POSITIVE, momentum=FRACTION)

    def column_groups(
        self, layout: Layout, *, max_abs: float = 8.0, total_weight: int = 2**27
    ) -> tuple[ColumnGroup, ...]:
        return delta_groups(layout, max_abs, total_weight)

    def client_part(self) -> Mapping[str, float]:
        return {}

    def init(self, params: Vectors) -> State:
        return State(arrays={"momentum": zeros_like_train(params)})

    def apply(self, params: Vectors, total: PartialAggregate, state: State) -> tuple[dict[str, Float32Array], State]:
        def step(delta: Float64Array, memory: Memory) -> tuple[Float64Array, Memory]:
            velocity = self.momentum * memory["momentum"] + delta
            return self.learning_rate * velocity, {"momentum": velocity}

        return advance(params, total, state, step)


@dataclass(frozen=True, kw_only=True)
class FedProx:
    """FedAvg whose clients add ``proximal_mu / 2 * ||w - x||**2`` to their loss.

    Source: Li et al. 2020 (arXiv:1812.06127), algorithm 2. The paper tunes ``mu`` over 0.001, 0.01, 0.1 and 1; the
    default is one of these.
    """

    exact_in_two_tiers: ClassVar[bool] = True

    proximal_mu: float = 0.01
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        check_options(self, proximal_mu=NOT_NEGATIVE, learning_rate=POSITIVE)

    def column_groups(
        self, layout: Layout, *, max_abs: float = 8.0, total_weight: int = 2**27
    ) -> tuple[ColumnGroup, ...]:
        return delta_groups(layout, max_abs, total_weight)

    def client_part(self) -> Mapping[str, float]:
        return {"proximal_mu": self.proximal_mu}

    def init(self, params: Vectors) -> State:
        del params
        return State()

    def apply(self, params: Vectors, total: PartialAggregate, state: State) -> tuple[dict[str, Float32Array], State]:
        return advance(params, total, state, self.learning_rate)
