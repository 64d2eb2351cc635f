"""Death or dependency six months after a stroke: what runs at each hospital. NumPy only.

    hierfl client run app.py --kit KIT --set data=/srv/stroke

The hospital's own file is ``SITE.csv`` in that folder, with the trial's columns. With
``tensors = ["coefficients"]`` under [model] in job.toml the intercept never leaves the hospital; the code
is the same.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from logistic import descend, log_loss, predict
from prepare import INPUTS, Sample, read_hospital, split

from hierfl.client import Metrics, Task, Update

NAME, VERSION = "stroke", "1"


def init(config: Mapping[str, object]) -> dict[str, np.ndarray]:
    return {"coefficients": np.zeros(len(INPUTS), np.float32), "intercept": np.zeros((), np.float32)}


@cache
def patients(folder: str, site: str, held_out: float, split_seed: int) -> tuple[Sample, Sample]:
    """Training and held-out patients; read once, since all rounds of all runs are over the same."""
    return split(read_hospital(Path(folder), site), held_out, split_seed, site)


def patients_of(task: Task) -> tuple[Sample, Sample]:
    return patients(task.site_config["data"], task.site, task.config["held_out"], task.config["split_seed"])


def train(task: Task) -> Update:
    sample, _ = patients_of(task)
    coefficients, intercept = descend(
        sample,
        task.params["coefficients"].astype(np.float64),
        float(task.params["intercept"]),
        steps=task.config["steps"],
        learning_rate=task.config["learning_rate"],
    )
    loss = log_loss(predict(sample.inputs, coefficients, intercept), sample.outcomes).mean()
    params = {"coefficients": coefficients.astype(np.float32), "intercept": np.float32(intercept)}
    return Update(params, num_examples=len(sample), metrics={"loss": float(loss)})


def evaluate(task: Task) -> Metrics:
    _, sample = patients_of(task)
    risks = predict(sample.inputs, task.params["coefficients"].astype(np.float64), float(task.params["intercept"]))
    correct = float(((risks > 0.5) == sample.outcomes).mean())
    return Metrics(float(log_loss(risks, sample.outcomes).mean()), num_examples=len(sample), accuracy=correct)
