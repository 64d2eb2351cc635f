"""What the sites of a chaos case train: noise from the task's seed, so that every update can be made again."""

from __future__ import annotations

import numpy as np

from hierfl.client import Task, Update


def init(config):
    return {"w": np.zeros(int(config.get("values", 10_000)), np.float32)}


def train(task: Task) -> Update:
    rng = np.random.default_rng(task.seed)
    noise = rng.normal(scale=1e-2, size=task.params["w"].shape).astype(np.float32)
    return Update({"w": task.params["w"] + noise}, num_examples=int(rng.integers(500, 1000)))
