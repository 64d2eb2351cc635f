"""``hierfl controller serve``: one controller as a process.

Prints one JSON line when it serves, ends cleanly on SIGTERM and Ctrl-C; everything else it has to say goes to stderr.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from controller.redis_options import RedisOptions, read_password
from hierfl.cli.serving import catch_signals, directory_option, ready, ready_file_option, until_stopped
from hierfl.errors import ConfigError

__all__ = ["serve"]

F = TypeVar("F", bound=Callable[..., Any])


def _file_option(name: str, words: str) -> Callable[[F], F]:
    variable = f"HIERFL_{name.removeprefix('--').replace('-', '_').upper()}"
    return click.option(name, envvar=variable, type=click.Path(path_type=Path, dir_okay=False), help=words)


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
@click.option(
    "--advertise",
    default="",
    envvar="HIERFL_ADVERTISE",
    metavar="HOST:PORT",
    help="Address that others are told, where it is another (0.0.0.0, NAT). Default: that of --listen.",
)
@click.option(
    "--store",
    default="",
    envvar="HIERFL_STORE",
    metavar="URL",
    help="A Redis for runs, rounds and the lead: redis://[USER@]HOST:PORT[/DB], rediss:// with TLS, or "
    "unix://[USER@]/PATH. Default: a SQLite file in --dir, for one controller.",
)
@_file_option("--store-password-file", "File with the Redis password; or HIERFL_STORE_PASSWORD in the environment.")
@_file_option("--store-ca", "CA of the Redis, PEM. Default: the system's.")
@_file_option("--store-cert", "Client certificate for the Redis, PEM.")
@_file_option("--store-key", "Its key, PEM.")
@click.option(
    "--recover",
    is_flag=True,
    help="Rebuild a Redis that was wiped from --dir first: committed versions come back, runs that go on come back "
    "paused. Stop all other controllers before.",
)
@ready_file_option
def serve(
    kit: Path,
    directory: Path,
    listen: str,
    advertise: str,
    store: str,
    store_password_file: Path | None,
    store_ca: Path | None,
    store_cert: Path | None,
    store_key: Path | None,
    recover: bool,
    ready_file: Path | None,
) -> None:
    """Serve as the federation's controller, until SIGTERM or Ctrl-C.

    Started again on the same --dir it goes on with its runs. One JSON line on stdout says where it listens.

    Two or more that share a Redis (--store) and the folder --dir, on a volume that both mount, are one controller that
    outlives a machine: one leads, the others stand by, and one of them goes on within seconds where it stopped.

    \b
    Examples:
      hierfl controller serve --kit kits/controller --dir /var/lib/hierfl --listen 0.0.0.0:7443
      hierfl controller serve --kit kits/controller --dir /mnt/shared --listen 0.0.0.0:7443 \\
          --store rediss://hierfl@redis.example:6379 --store-ca redis-ca.pem --store-password-file redis-password
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    options = None
    if store:
        options = RedisOptions(
            url=store,
            password=read_password(store_password_file, os.environ),
            ca=store_ca,
            certificate=store_cert,
            key=store_key,
        )
    elif recover:
        raise ConfigError("--recover", None, "is for a store in Redis: name it with --store")
    asyncio.run(_serve(kit, directory, listen, advertise, options, recover, ready_file))


async def _serve(
    kit: Path,
    directory: Path,
    listen: str,
    advertise: str,
    options: RedisOptions | None,
    recover: bool,
    ready_file: Path | None,
) -> None:
    from controller.app import ControllerApp, open_redis
    from controller.blobs import durable_directory
    from hierfl import buffers, observe
    from hierfl.pki import Kit

    buffers.keep_freed_memory()
    stopped = asyncio.Event()
    catch_signals(stopped)
    loaded = Kit.load(kit)
    open_store = None if options is None else open_redis(options, recovering=loaded if recover else None)
    app = ControllerApp(loaded, directory, listen, open_store=open_store, advertise=advertise)
    durable_directory(directory)
    observe.configure(_process_name(listen, options), directory)
    try:
        with ready("controller", ready_file) as say_ready:
            async with app:
                say_ready([app.address], **({} if app.leads else {"stands": "by"}))
                await until_stopped(app.failed(), stopped)
    finally:
        observe.shutdown()


def _process_name(listen: str, options: RedisOptions | None) -> str:
    """Name of this process's trace file: of its own, where several controllers share a folder."""
    if options is None:
        return "controller"
    port = int(listen.rpartition(":")[2] or 0)
    return f"controller.{socket.gethostname()}-{port or os.getpid()}"
