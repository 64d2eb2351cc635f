"""A user's app: a Python file or module with plain functions. It is imported, and called, through this file only.

    init(config)   -> named arrays, a torch module, or its state_dict: version 0 of the model
    train(task)    -> Update
    evaluate(task) -> Metrics     (optional)
    NAME, VERSION                 (optional; the file's name, and no version)

The functions may also be attributes of an object called ``app``, as the torch helper makes one.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import random
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hierfl.client.task import Metrics, Task, Update
from hierfl.errors import AppError

__all__ = ["App", "AppNotFound", "find_app", "load_app", "seed_generators"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class AppNotFound(AppError):
    """No app of that name is here. A site may still have it."""


@dataclass(frozen=True, kw_only=True)
class App:
    """An app, ready to be called. ``load_app`` makes one from a file; Python code may make one directly."""

    name: str
    init: Callable[[Mapping[str, Any]], Any]
    train: Callable[[Task], Update]
    evaluate: Callable[[Task], Metrics] | None = None
    version: str = ""
    source: str = ""
    """File or module that it came from, for people."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise AppError(
                f"the app's name {self.name!r} must be letters, digits, '.', '_' or '-'; set NAME in the app"
            )

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name

    def serves(self, name: str, version: str) -> bool:
        """Whether a plan for this app name and version (empty: any) is meant for it."""
        return name == self.name and version in ("", self.version)


def load_app(spec: str) -> App:
    """Import the app at ``spec``: a path ending in ``.py``, or the dotted name of an installed module.

    Raises:
        AppError: It cannot be imported, or lacks a function; the message says which, and where.
    """
    is_file = spec.endswith(".py")
    module = _import(spec, _import_file if is_file else _import_module)
    return _from_namespace(module, Path(spec).stem if is_file else spec.rpartition(".")[2], spec)


def find_app(name: str, folder: Path) -> App:
    """The app called ``name``: ``<name>.py`` or ``app.py`` in ``folder``, or an installed module of that name.

    Raises:
        AppNotFound: There is none; the message says what was tried.
        AppError: It cannot be loaded.
    """
    files = [folder / f"{name}.py", folder / "app.py"]
    for path in files:
        if path.is_file():
            app = load_app(str(path))
            if app.name == name:
                return app
    if re.fullmatch(r"[A-Za-z_][\w.]*", name) and _is_installed(name):
        return load_app(name)
    tried = " or ".join(str(path) for path in files)
    raise AppNotFound(f"there is no app {name!r}: no {tried} with NAME = {name!r}, and no module {name}; give --app")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _import_file(spec: str) -> ModuleType:
    path = Path(spec).resolve()
    if not path.is_file():
        raise AppError(f"there is no app file {spec}")
    _put_on_path(path.parent)  # its neighbours can be imported, as when Python runs a script
    name = "hierfl_app_" + re.sub(r"\W", "_", path.stem)
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise AppError(f"{spec} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # before it runs: dataclasses and DataLoader workers look their module up
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(spec: str) -> ModuleType:
    _put_on_path(Path.cwd())
    return importlib.import_module(spec)


def _put_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _import(spec: str, importer: Callable[[str], ModuleType]) -> ModuleType:
    try:
        return importer(spec)
    except AppError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).name == Path(spec).name]
        where = f" (line {own[-1].lineno})" if own else ""
        raise AppError(f"{spec} could not be imported: {type(error).__name__}: {error}{where}") from error


def _from_namespace(module: ModuleType, default_name: str, spec: str) -> App:
    holder: Any = module if hasattr(module, "train") else getattr(module, "app", module)
    evaluate = getattr(holder, "evaluate", None)
    return App(
        name=str(getattr(module, "NAME", default_name)),
        version=str(getattr(module, "VERSION", "")),
        init=_function(holder, "init", "config", spec),
        train=_function(holder, "train", "task", spec),
        evaluate=None if evaluate is None else _function(holder, "evaluate", "task", spec),
        source=spec,
    )


def _function(holder: Any, name: str, argument: str, spec: str) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] | None = getattr(holder, name, None)
    if function is None or not callable(function):
        raise AppError(f"{spec} has no function {name}({argument})")
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise AppError(f"{spec}: {name} must take one argument: {name}({argument})") from None
    except ValueError:
        pass  # a builtin without a signature: calling it will tell
    return function


def seed_generators(seed: int) -> None:
    """Seed the generators an app is likely to draw from: ``random``, ``numpy.random``, and torch once imported.

    With several workers in one process (``--workers``) they are shared: an app that wants the same bits then
    draws from a generator of its own, seeded with ``task.seed``.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if "torch" in sys.modules:
        from hierfl.client.torch import seed_torch

        seed_torch(seed)
