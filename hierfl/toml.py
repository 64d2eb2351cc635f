"""From a TOML file to frozen dataclasses, strictly: one reading finds everything that is wrong.

A key that the dataclass does not have is an error that names the near one, and so is a value of another
type: nothing is coerced but a whole number into a number. Rules between and about values stay in the
dataclasses' ``__post_init__``; where one is broken the reading goes on with a stand-in, so that the next
broken rule is found too. ``hierfl/config.py`` says which files there are.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hierfl.errors import ConfigError, ConfigErrors, NotFound

__all__ = ["Reading", "build", "near", "open_toml"]

T = TypeVar("T")

_WORDS: Mapping[Any, tuple[str, str]] = {
    str: ("text in quotes", "texts in quotes"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    Path: ("a path in quotes", "paths in quotes"),
    Any: ("text, a number, true or false, a list or a table", "texts, numbers, lists or tables"),
}
"""A type in the user's words: one of it, several of it."""

_STAND_INS: Mapping[Any, Any] = {str: "x", int: 1, float: 1.0, bool: False, Path: Path("x")}
"""Takes the place of a required value that is missing or wrong, only to look for further errors."""

_TWICE = re.compile(r"Cannot declare \((?P<path>.*)\) twice \(at (?P<where>.*)\)")
_AT = re.compile(r"(?P<what>.*) \(at (?P<where>.*)\)")


@dataclass
class Reading:
    """One file being read: its table, the keys that ``--set`` gave, and what is wrong so far."""

    path: Path
    table: dict[str, Any]
    overridden: frozenset[str] = frozenset()
    errors: list[ConfigError] = field(default_factory=list)

    def add(self, key: str, value: object, rule: str) -> None:
        """Note that ``key`` is wrong, and where it came from."""
        self.errors.append(ConfigError(key, value, rule, self._source(key)))

    def _source(self, key: str) -> str:
        parts = key.split(".")
        above = {".".join(parts[: n + 1]) for n in range(len(parts))}
        return "--set" if above & self.overridden else str(self.path)

    def finish(self) -> None:
        """Raise what was found: one ``ConfigError``, or all of them as ``ConfigErrors``."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise ConfigErrors(tuple(self.errors))


def near(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` where one of ``known`` is close to ``word``, else the empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


# --- files and overrides


def open_toml(path: Path, overrides: Iterable[str] = ()) -> Reading:
    """Parse ``path`` and lay the ``KEY=VALUE`` of ``--set`` over it; checks no schema yet.

    Raises:
        NotFound: There is no such file.
        ConfigError: It cannot be read, is no TOML (with the line), or an override is none.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise NotFound("configuration file", str(path), "`hierfl init` writes one to start from") from None
    except OSError as error:
        raise ConfigError("file", None, f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError("file", None, f"is not UTF-8 text (byte {error.start})", str(path)) from None
    reading = Reading(path, _parse(text, path))
    for override in overrides:
        patch = _parse_override(override)
        _merge(reading.table, patch)
        reading.overridden |= set(_leaves(patch))
    return reading


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(str(error), str(path)) from None
    except RecursionError:
        raise ConfigError("file", None, "is nested too deeply", str(path)) from None


def _syntax_error(message: str, source: str) -> ConfigError:
    if twice := _TWICE.fullmatch(message):
        name = ".".join(re.findall(r"'([^']*)'", twice["path"]))
        return ConfigError(twice["where"], None, f"has [{name}] a second time; each needs a name of its own", source)
    if at := _AT.fullmatch(message):
        return ConfigError(at["where"], None, f"is not TOML: {at['what'][:1].lower()}{at['what'][1:]}", source)
    return ConfigError("file", None, f"is not TOML: {message}", source)


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, value = (part.strip() for part in override.partition("="))
    if not equals or not key or "\n" in override:
        raise ConfigError(override, None, "must be KEY=VALUE, such as round.min_regions=2", "--set")
    for literal in (value, json.dumps(value)):  # a bare word is text: shells eat quotes
        try:
            return tomllib.loads(f"{key} = {literal}")
        except tomllib.TOMLDecodeError:
            if value[:1] in {'"', "'", "[", "{"}:
                break
    raise ConfigError(override, None, "must be KEY=VALUE with a TOML value, such as round.min_regions=2", "--set")


def _merge(table: dict[str, Any], patch: Mapping[str, Any]) -> None:
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value


def _leaves(patch: Mapping[str, Any], path: str = "") -> Iterable[str]:
    for key, value in patch.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield path + key


# --- building


def build(
    kind: type[T], table: Mapping[str, Any], reading: Reading, rest: Mapping[type, str] | None = None
) -> T | None:
    """Make ``kind`` of ``table``; whatever is wrong goes to ``reading``.

    Args:
        kind: A frozen keyword-only dataclass; its fields are the keys. Its rules raise ``ConfigError``
            with a key that is relative to it, or counted from the top of the file.
        rest: For a dataclass, the field that takes all keys which are no fields.
    Returns:
        The value, to be used only after ``reading.finish()``; ``None`` where none could be made.
    """
    made: T | None = _Builder(reading, rest or {}).table(kind, table, "")
    return made


class _Mismatch(Exception):
    """A value of another type; the text says in words what was expected."""


@dataclass(frozen=True)
class _Builder:
    """``path`` is the dotted path of a table with its dot at the end, empty for the whole file."""

    reading: Reading
    rest: Mapping[type, str]

    def table(self, kind: Any, table: Mapping[str, Any], path: str) -> Any:
        hints = get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        table = self._gather_rest(kind, table, fields)
        for key in [key for key in table if key not in fields]:
            self.reading.add(path + key, None, "is unknown" + (near(key, fields) or _known(path, fields)))
        values: dict[str, Any] = {}
        for name, spec in fields.items():
            if name in table:
                self._put(values, name, table[name], hints[name], path + name)
            elif _is_required(spec) and dataclasses.is_dataclass(hints[name]):
                self._put(values, name, {}, hints[name], path + name)
            elif _is_required(spec):
                self.reading.add(path + name, None, f"is missing; it must be {_words(hints[name])}")
        return self._construct(kind, values, path)

    def _gather_rest(self, kind: type, table: Mapping[str, Any], fields: Iterable[str]) -> Mapping[str, Any]:
        name = self.rest.get(kind)
        if name is None:
            return table
        own = set(fields) - {name}
        gathered = {key: value for key, value in table.items() if key in own}
        return {**gathered, name: {key: value for key, value in table.items() if key not in own}}

    def _put(self, made: dict[Any, Any], name: Any, value: Any, hint: Any, key: str) -> None:
        """Set ``made[name]``, or note why not."""
        try:
            built = self._value(hint, value, key)
        except _Mismatch as mismatch:
            self.reading.add(key, value, f"must be {mismatch}")
        else:
            if built is not None:
                made[name] = built

    def _value(self, hint: Any, value: Any, key: str) -> Any:
        """``value`` as the type ``hint`` asks for; ``None`` where what is wrong has been noted already."""
        hint = getattr(hint, "__supertype__", hint)  # NewType
        origin = get_origin(hint)
        if origin in (Union, types.UnionType):
            return self._first_fit(hint, value, key)
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            return self.table(hint, value, key + ".")
        made: dict[Any, Any] = {}
        if origin is tuple and isinstance(value, list):
            for index, item in enumerate(value):
                self._put(made, index, item, get_args(hint)[0], f"{key}[{index}]")
            return tuple(made.values()) if len(made) == len(value) else None
        if origin is Mapping and isinstance(value, dict):
            for name, item in value.items():
                self._put(made, name, item, get_args(hint)[1], f"{key}.{name}")
            return made
        if origin is not None or dataclasses.is_dataclass(hint) or not _fits(hint, value):
            raise _Mismatch(_words(hint))
        return _scalar(hint, value, self.reading.path)

    def _first_fit(self, hint: Any, value: Any, key: str) -> Any:
        for choice in get_args(hint):
            try:
                return self._value(choice, value, key)
            except _Mismatch:
                continue
        raise _Mismatch(_words(hint))

    def _construct(self, kind: Any, values: dict[str, Any], path: str) -> Any:
        """Call ``kind``; note each broken rule once, a stand-in taking the offender's place."""
        stand_ins = _stand_ins(kind)
        replaced = {name for name in stand_ins if name not in values and _is_required(_field(kind, name))}
        while True:
            try:
                return kind(**{**{name: stand_ins[name] for name in replaced}, **values})
            except TypeError:
                return None  # a required value has no stand-in; it has been noted
            except ConfigError as error:
                names = {self._note(broken, path, replaced) for broken in getattr(error, "errors", (error,))}
                if names & replaced or not names <= stand_ins.keys():
                    return None  # no stand-in, or the rule broke over one
                replaced |= names
                for name in names:
                    values.pop(name, None)

    def _note(self, broken: ConfigError, path: str, replaced: set[str]) -> str:
        """Note a broken rule, unless it broke over a stand-in; returns the name of the field."""
        key = broken.key.removeprefix(path)
        name = re.split(r"[.\[]", key)[0]
        if name not in replaced:
            self.reading.add(path + key, broken.value, broken.rule)
        return name


def _field(kind: Any, name: str) -> dataclasses.Field[Any]:
    return next(f for f in dataclasses.fields(kind) if f.name == name)


def _is_required(spec: dataclasses.Field[Any]) -> bool:
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING


def _stand_ins(kind: Any) -> dict[str, Any]:
    """A harmless value for each field that has one: its default, or one of its type."""
    made = {}
    hints = get_type_hints(kind)
    for spec in dataclasses.fields(kind):
        hint = getattr(hints[spec.name], "__supertype__", hints[spec.name])
        if spec.default is not dataclasses.MISSING:
            made[spec.name] = spec.default
        elif spec.default_factory is not dataclasses.MISSING:
            made[spec.name] = spec.default_factory()
        elif hint in _STAND_INS:
            made[spec.name] = _STAND_INS[hint]
    return made


def _fits(hint: Any, value: Any) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Any:
        return _is_plain(value)
    return isinstance(value, str if hint is Path else hint)


def _is_plain(value: Any) -> bool:
    """Whether a free value can go into a document: no dates, no NaN, no infinity."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _scalar(hint: Any, value: Any, file: Path) -> Any:
    if hint is Path:
        return file.parent / value
    return float(value) if hint is float else value


def _words(hint: Any, *, several: bool = False) -> str:
    """What a type is called in an error."""
    hint = getattr(hint, "__supertype__", hint)
    if hint in _WORDS:
        return _WORDS[hint][several]
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {_words(get_args(hint)[0], several=True)}"
    return "tables" if several else "a table"


def _known(path: str, fields: Iterable[str]) -> str:
    where = f"[{path.rstrip('.')}]" if path else "this file"
    return f"; {where} knows {', '.join(fields)}"
