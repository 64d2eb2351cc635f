"""Strategies: from the sum over all regions to the next global model.

``get(name, options)`` makes one, ``names()`` lists them, ``Strategy`` is what to write for a new one.
"""

from hierfl.strategies.base import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Memory,
    State,
    Step,
    Strategy,
    Vectors,
    advance,
    check_options,
    delta_groups,
    power,
    zeros_like_train,
)
from hierfl.strategies.registry import get, names

__all__ = [
    "FRACTION",
    "NOT_NEGATIVE",
    "POSITIVE",
    "Memory",
    "State",
    "Step",
    "Strategy",
    "Vectors",
    "advance",
    "check_options",
    "delta_groups",
    "get",
    "names",
    "power",
    "zeros_like_train",
]
