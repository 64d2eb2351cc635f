"""``hierfl job check``: everything that is wrong with a job, before anyone is asked to run it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hierfl.cli.output import emit, output_option, say, table

if TYPE_CHECKING:
    from hierfl.job import Job
    from hierfl.layout import Layout

__all__ = ["job"]


@click.group()
def job() -> None:
    """Check a job before it is submitted."""


@job.command()
@click.argument("job_file", metavar="JOB.toml", type=click.Path(path_type=Path))
@click.option("--app", "app_path", metavar="APP", help="The app's file or module. Default: found by the job's `app`.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key: round.min_regions=2.")
@output_option
def check(job_file: Path, app_path: str | None, overrides: tuple[str, ...], output: str) -> None:
    """Check JOB.toml: keys, types, rules, options of strategy and encoding, all mistakes at once.

    Where the app can be imported here, its `init` is called, the job's caps are held against the model,
    and the bytes of a round are told.

    \b
    Examples:
      hierfl job check job.toml
      hierfl job check job.toml --app my_app.py --set strategy.name=fedadam
    """
    from hierfl.config import load_job

    read = load_job(job_file, overrides)
    layout = _layout(read, app_path, job_file.parent)
    document: dict[str, Any] = {"job": read.job.name, "app": read.job.app, "strategy": read.strategy.name}
    document |= {"updates": read.updates.encoding}
    document |= {"model": None} if layout is None else {"model": model_of(read, layout)}
    emit(document, "hierfl.job_check/1", output, lambda: _show(document))
    say(f"{job_file} is fine")


def model_of(read: Job, layout: Layout) -> dict[str, Any]:
    """Parameters and bytes per round; raises ``ConfigError`` where the job's caps do not suit the strategy."""
    from hierfl import encodings, strategies

    strategy = strategies.get(read.strategy.name, read.strategy.options)
    caps = read.arithmetic
    groups = strategy.column_groups(layout, max_abs=caps.max_abs, total_weight=caps.total_weight)
    encoding = encodings.get(read.updates.encoding, read.updates.options)
    return {
        "tensors": len(layout.tensors),
        "parameters": layout.num_params,
        "exact_in_two_tiers": strategy.exact_in_two_tiers,
        "bytes_to_a_client": 4 * layout.num_params,
        "bytes_from_a_client": encodings.length_bytes(encoding, groups),
        "bytes_over_a_border": sum(8 * math.prod(group.shape) for group in groups),
    }


def _layout(read: Job, app_path: str | None, folder: Path) -> Layout | None:
    """The model's layout by the app's ``init``; ``None`` where no app was named and none is here."""
    from hierfl.client import initial_model
    from hierfl.client.app import AppNotFound

    try:
        return initial_model(read, app=app_path, folder=folder)[0]
    except AppNotFound as error:
        say(f"the model was not checked: {error}")
        return None


def _show(document: dict[str, Any]) -> None:
    rows = [(key, value) for key, value in document.items() if key != "model"]
    for key, value in (document["model"] or {}).items():
        words = f"{value:,}" if type(value) is int else {True: "yes", False: "no"}[value]
        rows.append((key.replace("_", " "), words))
    table(("key", "value"), rows)
