"""``hierfl up`` and ``hierfl down``: a whole federation on this machine, started and stopped."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click

from hierfl.cli.output import say
from hierfl.cli.reach import STATE_DIR, state_dir
from hierfl.errors import Interrupted, NotFound

__all__ = ["down", "run_until_stopped", "up"]

T = TypeVar("T")

STOP_S = 90.0
"""Longest time that `down` waits for an orderly end."""


def run_until_stopped(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main``; Ctrl-C and SIGTERM cancel it, so that it cleans up.

    Raises:
        Interrupted: It was cancelled by one of them.
    """

    async def run() -> T:
        task = asyncio.ensure_future(main)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        return await task

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        raise Interrupted("stopped; nothing is left running") from None


@click.command()
@click.argument(
    "federation_file", metavar="[FEDERATION.toml]", default="federation.toml", type=click.Path(path_type=Path)
)
def up(federation_file: Path) -> None:
    """Start the controller, every region's combiner and every site's client, and keep them running.

    Ctrl-C, or `hierfl down` in another terminal, stops all of it. What has been trained stays in
    .hierfl beside the file, and the next `up` goes on from there.

    \b
    Examples:
      hierfl up
      hierfl up hospitals/federation.toml
    """
    from hierfl.config import load_federation
    from hierfl.local import serving

    say(f"reading {federation_file}")
    config = load_federation(federation_file)
    state = federation_file.resolve().parent / STATE_DIR

    async def serve() -> None:
        async with serving(config, state, say) as federation:
            say(f"federation {config.name} is up; controller at {federation.controller_address}, files in {state}")
            say("next: `hierfl train job.toml` or `hierfl status` here in another terminal; Ctrl-C stops everything")
            await asyncio.Event().wait()

    run_until_stopped(serve())


@click.command()
@click.argument("directory", default=".", type=click.Path(path_type=Path, file_okay=False))
def down(directory: Path) -> None:
    """Stop the federation that `hierfl up` runs in this folder, and wait until it is gone."""
    from hierfl.statefolder import end_leftovers, stop_running

    state = state_dir(directory)
    stopped = state is not None and stop_running(state, say, STOP_S)
    left = end_leftovers(state) if state else 0
    if not stopped and not left:
        raise NotFound("running federation in", str(directory.resolve()), "nothing to stop")
    say("stopped; nothing is left running")
