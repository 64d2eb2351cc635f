"""Federated learning for organisations whose data may not leave its jurisdiction.

The public names of the core; ``hierfl.client`` has those for a site's app. Each is imported when first
asked for, so that ``import hierfl`` costs nothing (the command line starts with it).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hierfl.aggregation import ColumnGroup, PartialAggregate
    from hierfl.config import FederationConfig, RegionConfig, SiteConfig, load_federation, load_job
    from hierfl.errors import ConfigError, HierFLError
    from hierfl.job import Job
    from hierfl.layout import Layout, Role, TensorSpec, model_hash
    from hierfl.strategies import Strategy

__all__ = [
    "ColumnGroup",
    "ConfigError",
    "FederationConfig",
    "HierFLError",
    "Job",
    "Layout",
    "PartialAggregate",
    "RegionConfig",
    "Role",
    "SiteConfig",
    "Strategy",
    "TensorSpec",
    "__version__",
    "load_federation",
    "load_job",
    "model_hash",
]

__version__ = "0.1.0"

_HOMES = {
    "aggregation": ("ColumnGroup", "PartialAggregate"),
    "config": ("FederationConfig", "RegionConfig", "SiteConfig", "load_federation", "load_job"),
    "errors": ("ConfigError", "HierFLError"),
    "job": ("Job",),
    "layout": ("Layout", "Role", "TensorSpec", "model_hash"),
    "strategies": ("Strategy",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hierfl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hierfl.{_HOME_OF[name]}"), name)
