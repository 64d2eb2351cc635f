"""``hierfl status``: regions and runs at a glance, or one run as it happens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hierfl.cli.output import emit, output_option, say, table
from hierfl.cli.reach import call, operator_options
from hierfl.errors import ConfigError

if TYPE_CHECKING:
    from hierfl.wire import hierfl_pb2 as pb

__all__ = ["status"]


@click.command()
@click.argument("run", required=False)
@click.option("-w", "--watch", is_flag=True, help="Follow RUN until it ends.")
@operator_options
@output_option
def status(run: str | None, watch: bool, kit: Path | None, address: tuple[str, ...], output: str) -> None:
    """Show the federation's regions and runs; with RUN and -w, follow that run.

    \b
    Examples:
      hierfl status
      hierfl status digits-7f3a2b -w
    """
    from hierfl.cli.runs import follow, message_document, raise_for_outcome

    if run is None:
        if watch:
            raise ConfigError("--watch", None, "needs the run to follow: `hierfl status RUN -w`")
        found = call(kit, address, lambda operator: operator.status())
        emit(message_document(found), "hierfl.status/1", output, lambda: _status_tables(found))
        return
    if watch:
        summary = call(kit, address, lambda operator: follow(operator, run))
    else:
        summary = call(kit, address, lambda operator: operator.run(run)).summary
    emit(message_document(summary), "hierfl.run/1", output, lambda: click.echo(f"{summary.run} {summary.state}"))
    if watch:
        raise_for_outcome(summary)


def _status_tables(found: pb.GetStatusResponse) -> None:
    say(f"federation {found.federation}, leader epoch {found.leader_epoch}")
    table(
        ("region", "is", "clients", "sites", "from sites", "to sites"),
        [
            (
                region.region,
                region.state if region.state != "silent" else f"silent for {region.silent_for_s:.0f} s",
                region.clients_connected,
                region.sites_connected,
                region.bytes_from_sites,
                region.bytes_to_sites,
            )
            for region in found.regions
        ],
        empty="no regions provisioned: `hierfl provision region NAME`",
    )
    for run in found.runs:
        say(f"run {run.run} {run.name}: {run.state}, round {run.rounds_committed} of {run.rounds_planned} {run.reason}")
