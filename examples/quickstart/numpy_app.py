"""Logistic regression with NumPy alone, on a CSV file of the site: features, and in the last column 0 or 1.

    hierfl client run numpy_app.py --kit KIT --set data=/srv/patients.csv

With `tensors = ["w"]` under [model] in job.toml the intercept `b` stays at each client: the code is the same.
"""

import numpy as np

from hierfl.client import Metrics, Task, Update

NAME, VERSION = "logistic", "1"


def init(config):
    return {"w": np.zeros(config["num_features"], np.float32), "b": np.zeros((), np.float32)}


def load(task: Task, part: str):
    table = np.loadtxt(task.site_config["data"], delimiter=",", ndmin=2)
    held_out = np.arange(len(table)) % 5 == 4
    rows = table[held_out if part == "test" else ~held_out]
    return rows[:, :-1], rows[:, -1]


def predict(params, x):
    return 1 / (1 + np.exp(-np.clip(x @ params["w"] + params["b"], -30, 30)))


def log_loss(p, y):
    return float(-np.mean(np.log(np.where(y == 1, p, 1 - p))))


def train(task: Task) -> Update:
    x, y = load(task, "train")
    params = task.params
    rng = np.random.default_rng(task.seed)
    for batch in np.array_split(rng.permutation(len(y)), max(len(y) // 32, 1)):
        error = predict(params, x[batch]) - y[batch]
        params["w"] = params["w"] - task.config["learning_rate"] * x[batch].T @ error / len(batch)
        params["b"] = params["b"] - task.config["learning_rate"] * error.mean()
    return Update(params, num_examples=len(y), metrics={"loss": log_loss(predict(params, x), y)})


def evaluate(task: Task) -> Metrics:
    x, y = load(task, "test")
    p = predict(task.params, x)
    return Metrics(log_loss(p, y), num_examples=len(y), accuracy=float(np.mean((p > 0.5) == y)))
