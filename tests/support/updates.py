"""Encoded updates for tests: groups, vectors, and a stranger's bytes in their place."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hierfl.columns import ColumnGroup, GroupKind, Weighting
from hierfl.encodings import Encoding, WireVector, get

CHOICES: Mapping[str, Mapping[str, object]] = {
    "float32": {},
    "bfloat16": {},
    "int8": {"block": 16},
    "int8-stochastic": {"block": 32, "rounding": "stochastic"},
    "topk": {"fraction": 0.1},
    "randomk": {"fraction": 0.2},
}
"""What every encoding's tests run over: names of encodings, some with a second set of options."""


def chosen(choice: str) -> Encoding:
    return get(choice.partition("-")[0], CHOICES[choice])


def group(num_values: int, name: str = "train", **change: object) -> ColumnGroup:
    options = {"kind": GroupKind.FIXED, "s": 32, "max_abs": 8.0, "weighting": Weighting.WEIGHT}
    return ColumnGroup(name=name, num_values=num_values, **(options | change))  # type: ignore[arg-type]  # by name


def values(num_values: int, seed: int, scale: float = 0.5) -> np.ndarray:
    """Within ±8, of many magnitudes, some of them 0."""
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.integers(-12, 4, num_values)).astype(np.float32)
    drawn = rng.uniform(-scale, scale, num_values).astype(np.float32) * spread
    return np.where(rng.random(num_values) < 0.1, np.float32(0), drawn)


def from_bytes(vectors: tuple[WireVector, ...], data: bytes, cut: int = 0) -> dict[str, list[np.ndarray]]:
    """``data``, repeated as often as it takes, as wire vectors of the right sizes: in two chunks where ``cut``."""
    received = {}
    for name, dtype, num_values in vectors:
        size = num_values * np.dtype(dtype).itemsize
        whole = np.frombuffer((data * (size // len(data) + 1))[:size], dtype)
        received[name] = [whole[:cut], whole[cut:]] if 0 < cut < num_values else [whole]
    return received
