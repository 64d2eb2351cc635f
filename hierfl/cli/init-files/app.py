"""A small model with NumPy alone: logistic regression on made-up patients. Replace it with your own.

`init` makes version 0 of the model; `train` and `evaluate` run at each site, on that site's data only.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hierfl.client import Metrics, Task, Update

NUM_FEATURES = 8


def init(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {"coefficients": np.zeros(NUM_FEATURES, np.float32), "intercept": np.zeros(1, np.float32)}


def load_data(site: str) -> tuple[np.ndarray, np.ndarray]:
    """This site's patients: features, shape (n, NUM_FEATURES), and outcomes, 0 or 1. Read your own data here."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(site.encode()).digest()[:4], "big"))
    features = rng.normal(loc=rng.normal(scale=0.5), size=(400, NUM_FEATURES))
    chance = 1 / (1 + np.exp(-(features @ np.linspace(-2.0, 2.0, NUM_FEATURES) + 0.5)))
    return features, (rng.random(400) < chance).astype(np.float64)


def predict(params: Mapping[str, np.ndarray], features: np.ndarray) -> np.ndarray:
    logits = features @ params["coefficients"] + params["intercept"]
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -30, 30))))


def log_loss(chance: np.ndarray, outcome: np.ndarray) -> float:
    return float(-np.mean(np.log(np.where(outcome == 1, chance, 1 - chance))))


def train(task: Task) -> Update:
    features, outcome = load_data(task.site)
    features, outcome = features[:300], outcome[:300]  # the rest is held out
    params = {name: values.astype(np.float64) for name, values in task.params.items()}
    rng = np.random.default_rng(task.seed)
    for _ in range(task.config.get("epochs", 1)):
        for batch in np.array_split(rng.permutation(len(outcome)), 10):
            error = predict(params, features[batch]) - outcome[batch]
            params["coefficients"] -= task.config["learning_rate"] * features[batch].T @ error / len(batch)
            params["intercept"] -= task.config["learning_rate"] * error.mean()
    loss = log_loss(predict(params, features), outcome)
    trained = {name: values.astype(np.float32) for name, values in params.items()}
    return Update(trained, num_examples=len(outcome), metrics={"loss": loss})


def evaluate(task: Task) -> Metrics:
    features, outcome = load_data(task.site)
    chance, outcome = predict(task.params, features[300:]), outcome[300:]
    accuracy = float(np.mean((chance > 0.5) == outcome))
    return Metrics(loss=log_loss(chance, outcome), num_examples=len(outcome), accuracy=accuracy)
