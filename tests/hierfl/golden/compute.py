"""Prints hashes of three rounds of every strategy, as JSON. Run as a program, by itself, under varied CPU features.

Usage: compute.py numpy|numba. Inputs come from integer arithmetic, so that they are the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np

from hierfl import kernels
from hierfl.aggregation import Accumulator, PartialAggregate
from hierfl.layout import Layout, Role, model_hash
from hierfl.strategies import get
from hierfl.types import Float32Array

NUM_TRAIN, NUM_MEAN = 20_011, 1_003
WEIGHTS = (1, 37, 512, 65_535)
RUNS = {
    "fedadagrad": ("fedadagrad", {}),
    "fedadam": ("fedadam", {}),
    "fedadam, bias corrected": ("fedadam", {"bias_correction": True}),
    "fedavg": ("fedavg", {}),
    "fedavgm": ("fedavgm", {}),
    "fedprox": ("fedprox", {"learning_rate": 0.7}),
    "fedyogi": ("fedyogi", {}),
    "fedyogi, bias corrected": ("fedyogi", {"bias_correction": True}),
}


def noise(seed: int, size: int, span: float) -> Float32Array:
    """Values within ``±span``, from a multiplicative hash of their index; every 97th is tiny."""
    x = (np.arange(size, dtype=np.uint64) + np.uint64(seed * 1_000_003)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    values = ((x >> np.uint64(40)).astype(np.int64) - 2**23).astype(np.float32) * np.float32(span / 2**23)
    values[::97] *= np.float32(2.0**-120)
    return values


def main() -> None:
    if sys.argv[1] == "numba" and not kernels.warm_up():
        raise SystemExit("numba is not installed")
    start = {"w": noise(1, NUM_TRAIN, 0.5), "bn": noise(2, NUM_MEAN, 9.0)}
    layout = Layout.of(start, {"bn": Role.MEAN})
    hashes = {name: run(layout, start, *chosen) for name, chosen in RUNS.items()}
    json.dump(hashes, sys.stdout, indent=2)


def run(layout: Layout, start: dict[str, Float32Array], name: str, options: dict[str, object]) -> dict[str, str]:
    strategy, params = get(name, options), layout.flatten(start)
    state = strategy.init(params)
    sums = hashlib.sha256()
    for round_number in range(1, 4):
        total = total_of(strategy.column_groups(layout), round_number)
        for group in total.groups:
            sums.update(total.sums[group.name].astype("<i8").tobytes())
            sums.update(total.finish()[group.name].astype("<f8").tobytes())
        params, state = strategy.apply(params, total, state)
    memory = hashlib.sha256()
    for key, array in sorted(state.to_arrays().items()):
        memory.update(key.encode() + array.astype(array.dtype.newbyteorder("<")).tobytes())
    return {"sums": sums.hexdigest(), "model": model_hash(layout, params), "state": memory.hexdigest()}


def total_of(groups: tuple, round_number: int) -> PartialAggregate:
    sums = Accumulator(groups)
    for client, weight in enumerate(WEIGHTS):
        seed = 10 * round_number + client
        vectors = {"train": [noise(seed, NUM_TRAIN, 0.01)], "mean": [noise(seed + 5, NUM_MEAN, 1000.0)]}
        sums.fold(vectors, weight)
    return sums.partial(len(WEIGHTS))


if __name__ == "__main__":
    main()
