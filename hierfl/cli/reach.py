"""How an operator's command finds the controller: ``--kit``, ``--controller``, or the federation in this folder."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hierfl.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from hierfl.operator import Operator
    from hierfl.pki import Kit

__all__ = ["STATE_DIR", "call", "operator_options", "state_dir"]

STATE_DIR = ".hierfl"
"""Where ``hierfl up`` keeps a federation, in the folder of its ``federation.toml``."""

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def state_dir(start: Path | None = None) -> Path | None:
    """The nearest ``.hierfl`` in this folder or one above it."""
    folder = (start or Path.cwd()).resolve()
    return next((d / STATE_DIR for d in (folder, *folder.parents) if (d / STATE_DIR).is_dir()), None)


def operator_options(function: F) -> F:
    """Add ``--kit`` and ``--controller`` to a command."""
    kit = click.option(
        "--kit",
        type=click.Path(path_type=Path),
        envvar="HIERFL_KIT",
        help="Folder of the operator's kit. Default: the one of the federation in this folder.",
    )
    address = click.option(
        "--controller",
        "address",
        multiple=True,
        metavar="HOST:PORT",
        envvar="HIERFL_CONTROLLER",
        help="Address of the controller; may be repeated: the one that leads is asked. Default: the kit's, or that of "
        "`hierfl up` here.",
    )
    return kit(address(function))


def _find_kit(path: Path | None) -> Path:
    if path is not None:
        return path
    state = state_dir()
    if state is not None:
        kits = sorted((state / "kits" / "operators").glob("*/kit.toml"))
        if kits:
            return kits[0].parent
    raise NotFound("federation in", str(Path.cwd()), "start one here with `hierfl up`, or name an operator's --kit")


def _find_addresses(given: tuple[str, ...], kit: Kit, kit_dir: Path) -> tuple[str, ...]:
    if given:
        return given
    state = next((parent for parent in kit_dir.resolve().parents if parent.name == STATE_DIR), None)
    ready = sorted((state / "ready").glob("controller*.json")) if state else []
    if ready:
        import json

        return tuple(str(json.loads(file.read_text())["addresses"][0]) for file in ready)
    if kit.addresses:
        return kit.addresses
    raise ConfigError("--controller", None, "is needed: neither the kit nor this folder names the controller's address")


def call(kit_dir: Path | None, address: tuple[str, ...], work: Callable[[Operator], Awaitable[T]]) -> T:
    """Connect to the controller that leads, do ``work``, and disconnect."""
    from hierfl.operator import connect
    from hierfl.pki import Kit

    found = _find_kit(kit_dir)
    kit = Kit.load(found)
    where = _find_addresses(address, kit, found)

    async def run() -> T:
        async with connect(kit, *where) as operator:
            return await work(operator)

    return asyncio.run(run())
