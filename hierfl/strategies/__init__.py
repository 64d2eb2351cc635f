"""Strategies: from the sum over all regions to the next global model.

``get(name, options)`` makes one, ``names()`` lists them, ``Strategy`` is what to write for a new one.
"""

from hierfl.strategies.base import State, Strategy, Vectors, delta_groups, moved, power, train_part
from hierfl.strategies.registry import get, names

__all__ = ["State", "Strategy", "Vectors", "delta_groups", "get", "moved", "names", "power", "train_part"]
