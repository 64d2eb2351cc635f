"""What an app is given, and what it gives back. Values only: nothing here knows of files, links or torch.

def train(task: Task) -> Update:
    params = my_training(task.params, epochs=task.config.get("epochs", 1))
    return Update(params, num_examples=120, metrics={"loss": 0.41})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hierfl.layout import Layout
from hierfl.types import ClientId, RegionId, RunId, SiteId

__all__ = ["Declined", "Metrics", "Task", "Update"]


class Declined(Exception):
    """Raise it from ``train`` or ``evaluate`` to sit this round out: no data today, a machine in other use.

    The combiner learns the code ``declined``; the text stays in the site's own log.
    """


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work for one client, with everything that it may depend on."""

    params: dict[str, np.ndarray]
    """The model as named arrays, the app's own to change: the global tensors, and this client's local ones.

    Tensors with the role ``fixed`` (a frozen base model) are not among them: they never travel."""
    config: Mapping[str, Any]
    """The job's ``[app]`` keys: the same at every site."""
    site_config: Mapping[str, str]
    """What this site set for itself: ``hierfl client run app.py --set data=/srv/scans``."""
    strategy: Mapping[str, float]
    """The strategy's part at the client, such as ``{"proximal_mu": 0.01}``; often empty."""
    local: Mapping[str, np.ndarray]
    """Those of ``params`` that never leave this client, as its last round left them."""
    layout: Layout
    """Names, shapes, dtypes and roles of the run's tensors."""
    seed: int
    """0 to 2**63 - 1, the same whenever this round's work is asked again; already set in ``random``,
    ``numpy.random`` and torch when the app is called."""
    round: int
    """Counts from 1. An evaluation after the last round is one more."""
    run: RunId
    region: RegionId
    site: SiteId
    client: ClientId


@dataclass(frozen=True)
class Update:
    """What training gave. The SDK subtracts the global model itself and sends the difference.

    Args:
        params: The trained tensors: named arrays, a torch ``state_dict``, or the module itself. All that
            travel must be there; local ones are kept for the next round where given.
        num_examples: Examples trained on: this client's weight in the mean.
        metrics: ``loss`` (mean over the examples) is summed over the federation; others stay in this site's log.
    """

    params: Any
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Metrics:
    """What evaluation gave: means over ``num_examples`` held-out examples.

    Args:
        loss: Mean loss.
        num_examples: Examples evaluated on.
        accuracy: Fraction predicted correctly, 0 to 1, where that is a question to ask.
    """

    loss: float
    num_examples: int
    accuracy: float | None = None
