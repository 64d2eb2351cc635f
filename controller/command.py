"""``hierfl controller serve``: one controller as a process.

Prints one JSON line when it serves, ends cleanly on SIGTERM and Ctrl-C; everything else it has to say goes to stderr.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Coroutine
from pathlib import Path

import click

__all__ = ["serve"]


@click.command()
@click.option(
    "--kit", required=True, envvar="HIERFL_KIT", type=click.Path(path_type=Path), help="The controller's kit."
)
@click.option(
    "--dir",
    "directory",
    required=True,
    envvar="HIERFL_DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where it keeps runs and models; made if it is not there.",
)
@click.option(
    "--listen",
    default="127.0.0.1:0",
    show_default=True,
    envvar="HIERFL_LISTEN",
    help="Address to serve on; port 0: any free one.",
)
@click.option(
    "--ready-file",
    envvar="HIERFL_READY_FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Written when it serves, with what is printed.",
)
def serve(kit: Path, directory: Path, listen: str, ready_file: Path | None) -> None:
    """Serve as the federation's controller, until SIGTERM or Ctrl-C.

    Started again on the same --dir it goes on with its runs. One JSON line on stdout says where it listens.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(_serve(kit, directory, listen, ready_file))


async def _serve(kit: Path, directory: Path, listen: str, ready_file: Path | None) -> None:
    from controller.app import ControllerApp
    from controller.blobs import durable_directory
    from hierfl import observe
    from hierfl.pki import Kit

    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    loaded = Kit.load(kit)
    durable_directory(directory)
    observe.configure("controller", directory)
    try:
        async with ControllerApp(loaded, directory, listen) as app:
            _say_ready(app.address, ready_file)
            await _until_stopped(app.failed(), stopped)
    finally:
        observe.shutdown()
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)


async def _until_stopped(failed: Coroutine[None, None, None], stopped: asyncio.Event) -> None:
    """Wait for a signal; raise what ends the controller before one comes."""
    waiters = [asyncio.ensure_future(failed), asyncio.ensure_future(stopped.wait())]
    try:
        done, _ = await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        for waiter in done:
            waiter.result()
    finally:
        for waiter in waiters:
            waiter.cancel()


def _say_ready(address: str, ready_file: Path | None) -> None:
    document = {"schema": "hierfl.ready/1", "role": "controller", "addresses": [address], "pid": os.getpid()}
    line = json.dumps(document, separators=(",", ":"), sort_keys=True)
    if ready_file is not None:
        ready_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = ready_file.with_name(ready_file.name + ".part")
        temporary.write_text(line + "\n")
        temporary.replace(ready_file)
    click.echo(line)
