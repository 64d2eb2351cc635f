"""What every ``serve`` command shares: its options, its ready line, and how it waits for its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click

from hierfl.folders import whole_file

__all__ = ["catch_signals", "directory_option", "ready", "ready_file_option", "until_stopped"]

F = TypeVar("F", bound=Callable[..., Any])


def directory_option(what: str) -> Callable[[F], F]:
    """``--dir``, where the server keeps ``what``; the command takes it as ``directory``."""
    return click.option(
        "--dir",
        "directory",
        required=True,
        envvar="HIERFL_DIR",
        type=click.Path(path_type=Path, file_okay=False),
        help=f"Where {what} kept; made if it is not there.",
    )


def ready_file_option(function: F) -> F:
    """``--ready-file``."""
    return click.option(
        "--ready-file",
        envvar="HIERFL_READY_FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Written when it serves, with what is printed; removed when it stops.",
    )(function)


def catch_signals(stopped: asyncio.Event) -> None:
    """SIGTERM and Ctrl-C set ``stopped``. Called again it takes back handlers that a library replaced."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)


async def until_stopped(failed: Coroutine[Any, Any, None], stopped: asyncio.Event) -> None:
    """Wait for a signal; raise what ends the server before one comes."""
    waiters = [asyncio.ensure_future(failed), asyncio.ensure_future(stopped.wait())]
    try:
        done, _ = await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        for waiter in done:
            waiter.result()
    finally:
        for waiter in waiters:
            waiter.cancel()


@contextmanager
def ready(role: str, file: Path | None) -> Iterator[Callable[..., None]]:
    """``with ready("controller", file) as say_ready: say_ready(addresses, region="eu")``.

    One JSON line, on stdout as it was on entering, and in ``file`` for as long as the block lasts.
    """
    stdout = sys.stdout

    def say_ready(addresses: Sequence[str], **more: str) -> None:
        document = {"schema": "hierfl.ready/1", "role": role, "addresses": list(addresses), "pid": os.getpid(), **more}
        _announce(json.dumps(document, separators=(",", ":"), sort_keys=True), file, stdout)

    try:
        yield say_ready
    finally:
        if file is not None:
            file.unlink(missing_ok=True)


def _announce(line: str, file: Path | None, stdout: TextIO) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary:
            temporary.write_text(line + "\n")
    click.echo(line, file=stdout)
    stdout.flush()
