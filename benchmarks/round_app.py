"""The client of ``bench_round``: no training, each client adds noise that was drawn before the clock started.

All clients of a process share one draw, each from a place of its own in it, so that many fit into one process.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping

import numpy as np

from hierfl.client import Task, Update

NAME = "bench-round"

DEVIATION = 1e-3
MOST_WEIGHT = 1_000
PLACES = 4_096


def init(config: Mapping[str, object]) -> dict[str, np.ndarray]:
    return {"w": np.zeros(int(config["params"]), np.float32)}  # type: ignore[call-overload]


def train(task: Task) -> Update:
    number = zlib.crc32(f"{task.site}/{task.client}".encode())
    size = task.params["w"].size
    place = number % PLACES
    params = task.params["w"]
    params += noise(int(task.config["seed"]), size + PLACES)[place : place + size]
    return Update({"w": params}, num_examples=1 + number % MOST_WEIGHT)


@functools.cache
def noise(seed: int, size: int) -> np.ndarray:
    """Drawn in the first round, which is reported apart."""
    return np.random.default_rng(seed).standard_normal(size, np.float32) * np.float32(DEVIATION)
