"""``hierfl combiner serve``: one region's combiner as a process.

Prints one JSON line when it serves; drains on SIGTERM and Ctrl-C; all else that it has to say goes to stderr.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hierfl.cli.serving import catch_signals, directory_option, ready, ready_file_option, until_stopped

if TYPE_CHECKING:
    from combiners.supervisor import CombinerSettings

__all__ = ["serve"]


UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
LEAST_MEMORY = 2**29


def _bytes(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """A size in bytes; 0 where none is given."""
    if not value:
        return 0
    number, unit = value[:-3].strip(), value[-3:]
    if unit not in UNITS or not number.isdecimal():
        raise click.BadParameter(f"{value!r} is no size: give a whole number of {', '.join(UNITS)}, such as 8GiB")
    if int(number) * UNITS[unit] < LEAST_MEMORY:
        raise click.BadParameter(f"{value!r} is too little: the program itself takes 256MiB; at least 512MiB")
    return int(number) * UNITS[unit]


@click.command()
@click.option("--kit", required=True, envvar="HIERFL_KIT", type=click.Path(path_type=Path), help="The combiner's kit.")
@directory_option("the zone store is")
@click.option(
    "--controller",
    "controllers",
    multiple=True,
    envvar="HIERFL_CONTROLLER",
    metavar="HOST:PORT",
    help="The controller; may be repeated. Default: as the kit says.",
)
@click.option(
    "--listen",
    multiple=True,
    default=("127.0.0.1:0",),
    show_default="127.0.0.1:0",
    envvar="HIERFL_LISTEN",
    metavar="HOST:PORT",
    help="Address for clients; port 0: any free one. Repeat it to give each intake its own.",
)
@click.option(
    "--advertise",
    multiple=True,
    envvar="HIERFL_ADVERTISE",
    metavar="HOST:PORT",
    help="Address that clients are told, where it is another (0.0.0.0, NAT); port 0: the same. Repeated like --listen.",
)
@click.option("--intakes", default=1, show_default=True, envvar="HIERFL_INTAKES", help="Servers for clients.")
@click.option(
    "--memory",
    default="",
    envvar="HIERFL_MEMORY",
    metavar="SIZE",
    callback=_bytes,
    help="What each intake, and each shard, may use, such as 8GiB: it bounds the updates in flight. Default: their"
    " share of 60 % of the machine's memory, or of the container's limit; updates in flight then take at most 512 MiB,"
    " or four of them.",
)
@click.option(
    "--shards",
    type=click.IntRange(0, 64),
    envvar="HIERFL_SHARDS",
    help="Processes that share the sums of each intake, for models larger than its memory; 0: none. Default: in a"
    " cluster that was joined, as many as a model takes that does not fit; else none.",
)
@click.option("--k", default=3, show_default=True, envvar="HIERFL_K", help="Fewest sites in a sum that leaves.")
@click.option(
    "--max-share",
    default=0.8,
    show_default=True,
    envvar="HIERFL_MAX_SHARE",
    help="Largest part of a sum's weight that one site may carry.",
)
@click.option(
    "--max-following",
    default=4000,
    show_default=True,
    type=click.IntRange(min=1),
    envvar="HIERFL_MAX_FOLLOWING",
    metavar="N",
    help="Clients connected to an intake at once; the others are told when to come back, and are waited for.",
)
@click.option(
    "--ray-address",
    default="",
    envvar="HIERFL_RAY_ADDRESS",
    metavar="ADDRESS",
    help="A Ray cluster of this region to join. Default: a local one of its own.",
)
@ready_file_option
def serve(
    kit: Path,
    directory: Path,
    controllers: tuple[str, ...],
    listen: tuple[str, ...],
    advertise: tuple[str, ...],
    intakes: int,
    memory: int,
    shards: int | None,
    k: int,
    max_share: float,
    max_following: int,
    ray_address: str,
    ready_file: Path | None,
) -> None:
    """Serve as the combiner of the kit's region, until SIGTERM or Ctrl-C.

    Stopped, it takes no more updates, seals what is enough, hands back the rest and leaves nothing behind.
    Started again on the same --dir it goes on where it was. One JSON line on stdout says where it listens.

    \b
    Examples:
      hierfl combiner serve --kit kits/regions/eu/combiner --dir /var/lib/hierfl
      hierfl combiner serve --kit KIT --dir DIR --intakes 2 --listen 0.0.0.0:4433 --listen 0.0.0.0:4434
      hierfl combiner serve --kit KIT --dir DIR --ray-address auto --listen 0.0.0.0:4433
    """
    from combiners.settings import IntakeSettings, RegionSettings
    from combiners.supervisor import CombinerSettings
    from hierfl.residency import ZonePolicy

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    settings = CombinerSettings(
        kit=kit,
        directory=directory,
        controllers=controllers,
        listen=listen,
        advertise=advertise,
        intakes=intakes,
        ray_address=ray_address,
        intake=IntakeSettings(max_following=max_following, memory_bytes=memory, shards=shards),
        region=RegionSettings(policy=ZonePolicy(k=k, max_share=max_share)),
    )
    asyncio.run(_serve(settings, ready_file))


async def _serve(settings: CombinerSettings, ready_file: Path | None) -> None:
    from combiners.supervisor import load_kit, run_combiner

    region = load_kit(settings.kit).identity.region
    click.echo(f"starting the combiner of {region}: its Ray, its Region and {settings.intakes} intake(s)", err=True)
    stopped = asyncio.Event()
    catch_signals(stopped)
    with ready("combiner", ready_file) as say_ready:
        async with run_combiner(settings, lambda: catch_signals(stopped)) as combiner:
            say_ready(combiner.addresses, region=region)
            await until_stopped(combiner.failed(), stopped)
            click.echo("stopping: no more updates; sealing what is enough, handing back the rest", err=True)
