"""The client SDK: what an app is written with, and how it is run at a site.

    from hierfl.client import Metrics, Task, Update

    def init(config): ...                          # version 0 of the model
    def train(task: Task) -> Update: ...           # on this site's data only
    def evaluate(task: Task) -> Metrics: ...       # optional

``hierfl client run app.py --kit KIT`` serves it. The PyTorch helper is ``hierfl.client.torch``. Neither torch,
Ray, Redis nor numba is needed here; each name is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hierfl.client.app import App, load_app
    from hierfl.client.params import initial_model, make_layout
    from hierfl.client.runner import run
    from hierfl.client.task import Declined, Metrics, Task, Update

__all__ = ["App", "Declined", "Metrics", "Task", "Update", "initial_model", "load_app", "make_layout", "run"]

_HOMES = {
    "app": ("App", "load_app"),
    "params": ("initial_model", "make_layout"),
    "runner": ("run",),
    "task": ("Declined", "Metrics", "Task", "Update"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hierfl.client' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hierfl.client.{_HOME_OF[name]}"), name)
