"""Strategies: from the sum over all regions to the next global model.

``get(name, options)`` makes one, ``names()`` lists them, ``Strategy`` is what to write for a new one.
"""

from hierfl.strategies.base import Memory, State, Step, Strategy, Vectors, advance, delta_groups, power
from hierfl.strategies.registry import get, names

__all__ = [
    "Memory",
    "State",
    "Step",
    "Strategy",
    "Vectors",
    "advance",
    "delta_groups",
    "get",
    "names",
    "power",
]
