"""``hierfl train``: make version 0, submit the run, follow it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hierfl.cli.output import emit, output_option, say
from hierfl.cli.reach import call, operator_options

if TYPE_CHECKING:
    from hierfl.operator import Operator
    from hierfl.wire import hierfl_pb2 as pb

__all__ = ["train"]


@click.command()
@click.argument("job_file", metavar="JOB.toml", type=click.Path(path_type=Path))
@click.option("--app", "app_path", metavar="APP", help="The app's file or module. Default: found by the job's `app`.")
@click.option(
    "--from", "initial", metavar="MODEL.safetensors", type=click.Path(path_type=Path), help="Start from this model."
)
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key: round.min_regions=2.")
@click.option("--detach", is_flag=True, help="Submit and return; the run goes on.")
@operator_options
@output_option
def train(
    job_file: Path,
    app_path: str | None,
    initial: Path | None,
    overrides: tuple[str, ...],
    detach: bool,
    kit: Path | None,
    address: tuple[str, ...],
    output: str,
) -> None:
    """Train a model as JOB.toml says, and follow the run until it ends.

    Ctrl-C detaches: the run goes on, and the last line says how to come back.

    \b
    Examples:
      hierfl train job.toml
      hierfl train job.toml --set job.rounds=50 --detach
      hierfl train job.toml --from best.safetensors
    """
    from hierfl.cli.job import model_of
    from hierfl.cli.runs import follow, message_document, raise_for_outcome
    from hierfl.client import initial_model
    from hierfl.config import load_job
    from hierfl.modelfile import read_safetensors

    job = load_job(job_file, overrides)
    if initial is None and job.model.initial != "app":
        initial = job_file.parent / job.model.initial
    params = None if initial is None else read_safetensors(initial)
    layout, vectors = initial_model(job, app=app_path, folder=job_file.parent, params=params)
    say(f"{job.job.name}: {traffic(model_of(job, layout))}")

    async def work(operator: Operator) -> pb.RunSummary:
        run = await operator.submit(job, await operator.upload_model(layout, vectors))
        say(f"run {run} submitted to the controller at {operator.address}")
        return (await operator.run(run)).summary if detach else await follow(operator, run)

    summary = call(kit, address, work)
    emit(message_document(summary), "hierfl.run/1", output, lambda: click.echo(summary.run))
    raise_for_outcome(summary)


def traffic(model: Mapping[str, Any]) -> str:
    """Parameters, and bytes per round, in words."""
    from rich.filesize import decimal

    down, up, out = (decimal(model[f"bytes_{way}"]) for way in ("to_a_client", "from_a_client", "over_a_border"))
    return (
        f"{model['parameters']:,} parameters; in each round a client fetches {down} and sends {up}, "
        f"a region sends {out} over its border and fetches {down}"
    )
