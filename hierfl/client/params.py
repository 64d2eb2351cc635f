"""What an app returns, as named arrays held against the run's layout: nothing leaves that is not in it.

The layout decides, at both ends: tensors with the roles ``local`` and ``fixed`` are in no vector, so a
run over adapters never ships its base model, whatever ``train`` returns.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from hierfl.client.app import App, find_app, load_app, seed_generators
from hierfl.errors import AppError, ConfigError, LayoutMismatch
from hierfl.job import Job
from hierfl.layout import Layout, Role, TensorSpec, default_role
from hierfl.types import Float32Array

__all__ = [
    "call_init",
    "check_app_model",
    "deltas_of",
    "initial_model",
    "local_arrays",
    "make_layout",
    "returned_arrays",
]


def initial_model(
    job: Job, *, app: App | str | None = None, folder: Path = Path(), params: Mapping[str, Any] | None = None
) -> tuple[Layout, dict[str, Float32Array]]:
    """Version 0 of a run, made where the operator is: layout, and flat vectors.

    Args:
        job: Its ``[model]`` says which tensors take part.
        app: The app, its file or its module; else it is looked for by the job's ``app`` name in ``folder``.
        params: Start from these named arrays, of a file. The app's ``init`` still gives roles, order and what
            they lack (a frozen base).
    Raises:
        AppError: There is no such app, ``init`` failed, or gave what is no model.
        ConfigError: The job's ``[model]``, or ``params``, does not fit the app's model.
    """
    name = job.job.app.partition("@")[0]
    app = app if isinstance(app, App) else load_app(app) if app else find_app(name, folder)
    if app.name != name:
        raise ConfigError("job.app", job.job.app, f"must name the app in {app.source or 'use'}: {app.name!r}")
    layout, vectors = make_layout(call_init(app, job.app, job.job.seed), job.model.tensors)
    if params is None:
        return layout, vectors
    specs = {spec.name: spec for spec in layout.tensors}
    try:
        return layout, layout.flatten({n: _conform(n, a, specs[n]) for n, a in _arrays(params).items() if n in specs})
    except (AppError, LayoutMismatch) as error:
        raise ConfigError("model.initial", None, f"(or --from) must fit the app's model: {error}") from None


def call_init(app: App, config: Mapping[str, Any], seed: int) -> Any:
    """``app.init`` with the job's ``[app]`` keys and ``seed`` among them, generators seeded with it too."""
    seed_generators(seed)
    try:
        made = app.init({"seed": seed, **config})
    except Exception as error:
        raise AppError(f"init of the app {app} failed: {type(error).__name__}: {error}") from error
    if not _tensors_of(made):
        raise AppError(f"init of the app {app} returned {type(made).__name__}, not a model with tensors")
    return made


def make_layout(params: Any, tensors: str | Sequence[str] = "all") -> tuple[Layout, dict[str, Float32Array]]:
    """Layout and flat vectors of a model.

    Args:
        params: Named arrays, a torch module (which knows its buffers), or a ``state_dict`` (which does not).
        tensors: ``"all"``; ``"trainable"``: frozen ones are fixed; or patterns of names (``fnmatch``): of the
            others frozen ones are fixed, and all else stays local to each client.
    Raises:
        AppError, ConfigError: Names the tensor that cannot take part, or the pattern that fits none.
    """
    named = _tensors_of(params)
    if not named:
        raise AppError(f"a model is named arrays, a torch module or its state_dict, not {type(params).__name__}")
    arrays = _arrays(named)
    layout = Layout.of(arrays, _roles(params, arrays, tensors))
    return layout, layout.flatten(arrays)


def _roles(params: Any, arrays: Mapping[str, np.ndarray], tensors: str | Sequence[str]) -> dict[str, Role]:
    everything = _helper_roles(params, trainable_only=False) or {n: default_role(n, a) for n, a in arrays.items()}
    trainable = _helper_roles(params, trainable_only=True) or everything
    if tensors in ("all", "trainable"):
        return everything if tensors == "all" else trainable
    patterns = (tensors,) if isinstance(tensors, str) else tuple(tensors)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in arrays):
            near = difflib.get_close_matches(pattern, arrays, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(list(arrays)[:8])}"
            raise ConfigError("model.tensors", pattern, f"fits no tensor of the app's model{hint}")
    left_out = {name: Role.FIXED if trainable[name] is Role.FIXED else Role.LOCAL for name in arrays}
    chosen = {name for name in arrays if any(fnmatchcase(name, pattern) for pattern in patterns)}
    return {name: everything[name] if name in chosen else left_out[name] for name in arrays}


def _helper_roles(params: Any, *, trainable_only: bool) -> dict[str, Role]:
    """Roles that only a torch module can tell; empty for anything else."""
    if not _is_module(params):
        return {}
    from hierfl.client.torch import roles_of

    return roles_of(params, trainable_only=trainable_only)


# ---------------------------------------------------------------- after a task


def returned_arrays(layout: Layout, params: Any) -> dict[str, np.ndarray]:
    """What ``train`` returned, in the layout's dtypes: all that travels, and local tensors where given.

    A fixed tensor is dropped before anything of it is copied. Ties may come under one name or under both.

    Raises:
        AppError: Names a tensor that is missing, unknown, of another shape, or of another kind of number.
    """
    named = _tensors_of(params)
    specs = {spec.name: spec for spec in layout.tensors}
    aliases = {alias.name: alias.of for alias in layout.aliases}
    for name in named:
        if name not in specs and name not in aliases:
            near = difflib.get_close_matches(name, specs, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise AppError(f"train returned a tensor {name!r} that the run's model does not have{hint}")
    for name in layout.slots:
        if name not in named:
            raise AppError(f"train did not return the tensor {name!r} of the run's model")
    wanted = {n: t for n, t in named.items() if specs[aliases.get(n, n)].role is not Role.FIXED}
    arrays = _arrays(wanted)
    return {name: _conform(name, array, specs[aliases.get(name, name)]) for name, array in arrays.items()}


def _conform(name: str, array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    if array.shape != spec.shape:
        raise AppError(f"tensor {name!r} came in shape {array.shape}; the run's model has {spec.shape}")
    if not np.can_cast(array.dtype, spec.dtype, "same_kind"):
        raise AppError(f"tensor {name!r} came as {array.dtype}; the run's model has {spec.dtype}")
    with np.errstate(over="ignore"):  # becomes infinity, which the range check names
        return array.astype(spec.dtype, copy=False)


def deltas_of(
    layout: Layout, arrays: Mapping[str, np.ndarray], base: Mapping[str, Float32Array]
) -> dict[str, Float32Array]:
    """``float32(new) - float32(base)``, one flat vector a vector of the layout.

    Args:
        arrays: From ``returned_arrays``.
        base: The vectors of the model that the task gave, as float32, each in its tensors' own precision.
    """
    try:
        return layout.flatten(arrays, minus=base)
    except LayoutMismatch as error:  # tied tensors that came apart
        raise AppError(f"train: {error}") from None


def local_arrays(layout: Layout, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those with the role ``local``."""
    return {s.name: arrays[s.name] for s in layout.tensors if s.role is Role.LOCAL and s.name in arrays}


def check_app_model(layout: Layout, made: Any) -> dict[str, np.ndarray]:
    """Hold an app's own model (from ``call_init``) against the run's layout; returns its local tensors.

    Raises:
        LayoutMismatch: Names the first tensor that differs, a fixed one's values included.
    """
    arrays = _arrays(_tensors_of(made))
    layout.check(arrays)
    return {name: array.copy() for name, array in local_arrays(layout, arrays).items()}


# ---------------------------------------------------------------- arrays, tensors, modules


def _is_module(value: Any) -> bool:
    return hasattr(value, "named_parameters") and hasattr(value, "state_dict")


def _tensors_of(value: Any) -> dict[str, Any]:
    """Tensors by name, nothing copied; empty where ``value`` is no model."""
    if _is_module(value):
        from hierfl.client.torch import named_tensors

        return dict(named_tensors(value))
    return {str(name): item for name, item in value.items()} if isinstance(value, Mapping) else {}


def _arrays(named: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """As arrays. Only what is a torch tensor already brings torch in."""
    tensors = {name: item for name, item in named.items() if hasattr(item, "detach")}
    converted: dict[str, np.ndarray] = {}
    if tensors:
        from hierfl.client.torch import to_arrays

        converted = to_arrays(tensors)
    return {name: converted[name] if name in converted else _plain_array(name, item) for name, item in named.items()}


def _plain_array(name: str, item: Any) -> np.ndarray:
    array = np.asarray(item)
    if array.dtype.kind not in "fcbiu":
        raise AppError(f"tensor {name!r} is {type(item).__name__}, not an array of numbers")
    return array
