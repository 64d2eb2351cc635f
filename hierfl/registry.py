"""What a job chooses by name: built in, or registered by an installed package in an entry-point group.

A kind is a frozen, keyword-only dataclass of its options, which checks them in ``__post_init__``. A built-in name
cannot be registered over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast, get_type_hints

from hierfl.errors import ConfigError, ConfigErrors
from hierfl.toml import near

__all__ = ["Registry"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registry(Generic[T]):
    """One sort of choice."""

    noun: str
    """What one is called in an error."""
    group: str
    """Entry-point group of those that packages register."""
    table: str
    """The job's table that the options are keys of."""
    key: str
    """The key of that table with the name."""
    needs: str
    """A method that every kind has."""
    built_in: Mapping[str, type[T]]

    def names(self) -> tuple[str, ...]:
        """All names that ``get`` knows here, sorted."""
        return tuple(sorted({*self.built_in, *self._registered()}))

    def get(self, name: str, options: Mapping[str, object] | None = None) -> T:
        """The one of that name with these options.

        Raises:
            ConfigError: No such name or option (names the near one), or an option breaks its rule;
                ``ConfigErrors`` where it is more than one thing.
        """
        kind = self.built_in[name] if name in self.built_in else self._load(name)
        given = dict(options or {})
        known = get_type_hints(kind)
        fields = [field.name for field in dataclasses.fields(cast("Any", kind)) if field.init]
        has = f"; it has {', '.join(fields) or 'none'}"
        errors = [
            ConfigError(f"{self.table}.{option}", given[option], f"is no option of {name}{near(option, fields) or has}")
            for option in given
            if option not in fields
        ]
        if len(errors) > 1:
            raise ConfigErrors(tuple(errors))
        if errors:
            raise errors[0]
        return kind(**{option: _as_float(value, known[option]) for option, value in given.items()})

    def _registered(self) -> Mapping[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}

    def _load(self, name: str) -> type[T]:
        entries, key = self._registered(), f"{self.table}.{self.key}"
        if name not in entries:
            known = near(name, self.names()) or f"; there are {', '.join(self.names())}"
            raise ConfigError(key, name, f"is no {self.noun}{known}")
        value = entries[name].value
        try:
            kind = entries[name].load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(key, name, f"cannot be imported from {value}: {error}") from error
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and hasattr(kind, self.needs)):
            raise ConfigError(key, name, f"must be a dataclass with {self.needs}: {value} is none")
        return cast("type[T]", kind)


def _as_float(value: object, hint: object) -> object:
    """A whole number where a float is asked for means that float (TOML's ``1`` for ``1.0``)."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    return value
