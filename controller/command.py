"""``hierfl controller serve``: one controller as a process.

Prints one JSON line when it serves, ends cleanly on SIGTERM and Ctrl-C; everything else it has to say goes to stderr.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import click

from hierfl.cli.serving import catch_signals, directory_option, ready, ready_file_option, until_stopped

__all__ = ["serve"]


@click.command()
@click.option(
    "--kit", required=True, envvar="HIERFL_KIT", type=click.Path(path_type=Path), help="The controller's kit."
)
@directory_option("runs and models are")
@click.option(
    "--listen",
    default="127.0.0.1:0",
    show_default=True,
    envvar="HIERFL_LISTEN",
    help="Address to serve on; port 0: any free one.",
)
@ready_file_option
def serve(kit: Path, directory: Path, listen: str, ready_file: Path | None) -> None:
    """Serve as the federation's controller, until SIGTERM or Ctrl-C.

    Started again on the same --dir it goes on with its runs. One JSON line on stdout says where it listens.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(_serve(kit, directory, listen, ready_file))


async def _serve(kit: Path, directory: Path, listen: str, ready_file: Path | None) -> None:
    from controller.app import ControllerApp
    from controller.blobs import durable_directory
    from hierfl import buffers, observe
    from hierfl.pki import Kit

    buffers.keep_freed_memory()
    stopped = asyncio.Event()
    catch_signals(stopped)
    app = ControllerApp(Kit.load(kit), directory, listen)
    durable_directory(directory)
    observe.configure("controller", directory)
    try:
        with ready("controller", ready_file) as say_ready:
            async with app:
                say_ready([app.address])
                await until_stopped(app.failed(), stopped)
    finally:
        observe.shutdown()
