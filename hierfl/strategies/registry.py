"""Strategies by name. A built-in one is a line here; others register in the entry-point group ``hierfl.strategies``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast, get_type_hints

from hierfl.errors import ConfigError, ConfigErrors
from hierfl.strategies.adaptive import FedAdagrad, FedAdam, FedYogi
from hierfl.strategies.averaging import FedAvg, FedAvgM, FedProx
from hierfl.strategies.base import Strategy
from hierfl.toml import near

__all__ = ["get", "names"]

GROUP = "hierfl.strategies"

BUILT_IN: Mapping[str, type[Strategy]] = {
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedprox": FedProx,
    "fedyogi": FedYogi,
}


def names() -> tuple[str, ...]:
    """All names that ``get`` knows here, sorted."""
    return tuple(sorted({*BUILT_IN, *_registered()}))


def get(name: str, options: Mapping[str, object] | None = None) -> Strategy:
    """The strategy of that name with these options. A built-in name cannot be registered over.

    Raises:
        ConfigError: No such strategy or option (names the near one), or an option breaks its rule;
            ``ConfigErrors`` where it is more than one thing.
    """
    kind = BUILT_IN[name] if name in BUILT_IN else _load(name)
    given = dict(options or {})
    known = get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(cast("Any", kind)) if field.init]
    has = f"; it has {', '.join(fields) or 'none'}"
    errors = [
        ConfigError(f"strategy.{option}", given[option], f"is no option of {name}{near(option, fields) or has}")
        for option in given
        if option not in fields
    ]
    if len(errors) > 1:
        raise ConfigErrors(tuple(errors))
    if errors:
        raise errors[0]
    return kind(**{option: _as_float(value, known[option]) for option, value in given.items()})


def _as_float(value: object, hint: object) -> object:
    """A whole number where a float is asked for means that float (TOML's ``1`` for ``1.0``)."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    return value


def _registered() -> Mapping[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _load(name: str) -> type[Strategy]:
    entries = _registered()
    if name not in entries:
        raise ConfigError("strategy.name", name, f"is no strategy{near(name, names()) or f'; there are {_listed()}'}")
    try:
        kind = entries[name].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError("strategy.name", name, f"cannot be imported from {entries[name].value}: {error}") from error
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and hasattr(kind, "apply")):
        raise ConfigError("strategy.name", name, f"must be a dataclass with apply: {entries[name].value} is none")
    return cast("type[Strategy]", kind)


def _listed() -> str:
    return ", ".join(names())
