"""``hierfl job check``: everything that is wrong with a job, before anyone is asked to run it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hierfl.cli.output import emit, output_option, say, table

if TYPE_CHECKING:
    from hierfl.columns import ColumnGroup
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
    from hierfl.rounding import encoding_name

    read = load_job(job_file, overrides)
    layout = _layout(read, app_path, job_file.parent)
    document: dict[str, Any] = {"job": read.job.name, "app": read.job.app, "strategy": read.strategy.name}
    document |= {"updates": read.updates.encoding, "partials": encoding_name(read.partials.drop_bits)}
    document |= {"model": None} if layout is None else {"model": model_of(read, layout)}
    emit(document, "hierfl.job_check/1", output, lambda: _show(document))
    say(f"{job_file} is fine")


def model_of(read: Job, layout: Layout) -> dict[str, Any]:
    """Parameters and bytes per round; raises ``ConfigError`` where the job's caps do not suit the strategy."""
    from hierfl import encodings, rounding, strategies

    strategy = strategies.get(read.strategy.name, read.strategy.options)
    caps = read.arithmetic
    groups = strategy.column_groups(layout, max_abs=caps.max_abs, total_weight=caps.total_weight)
    drop_bits = read.partials.drop_bits
    rounding.require_room(groups, caps.total_weight, read.round.min_regions, drop_bits)
    encoding = encodings.get(read.updates.encoding, read.updates.options)
    found: dict[str, Any] = {
        "tensors": len(layout.tensors),
        "parameters": layout.num_params,
        "exact_in_two_tiers": strategy.exact_in_two_tiers and not drop_bits,
        "bytes_to_a_client": 4 * layout.num_params,
        "bytes_from_a_client": encodings.length_bytes(encoding, groups),
        "bytes_over_a_border": sum(_bytes_of(group, drop_bits) for group in groups),
    }
    if drop_bits:
        found["error_of_a_regions_sum"] = max(rounding.error_of_a_sum(group, drop_bits) for group in groups)
    return found


def _bytes_of(group: ColumnGroup, drop_bits: int) -> int:
    from hierfl.rounding import is_rounded

    bits = 64 - (drop_bits if is_rounded(group) else 0)
    return -(-bits * math.prod(group.shape) // 8)


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
        rows.append((key.replace("_", " "), _words(value)))
    table(("key", "value"), rows)
    if document["partials"] != "packed":
        say(
            "approximate across regions: each region rounds its sums, and what is left over goes into its next round;"
            " in a mean over weight W all rounds together are off by at most the error of a region's sum times the"
            " regions, over W, and a single round by twice that"
        )


def _words(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
