"""``hierfl trace``: one round's waterfall over the regions, and which leg of it was the slowest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hierfl.cli.output import emit, output_option, say
from hierfl.cli.reach import STATE_DIR, state_dir
from hierfl.errors import NotFound

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from hierfl.waterfall import Row, Waterfall

__all__ = ["describe", "draw", "trace"]

COLOURS = {
    "train": "green",
    "evaluate": "green",
    "upload": "cyan",
    "uplink": "magenta",
    "client_wait": "bright_black",
    "merge": "yellow",
    "commit": "yellow",
}
DEFAULT_COLOUR = "blue"
MIN_BAR_WIDTH = 20


@click.command()
@click.argument("run")
@click.argument("round_number", metavar="[ROUND]", required=False, type=click.IntRange(min=1))
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder below which the processes' folders lie. Default: the federation in this folder.",
)
@output_option
def trace(run: str, round_number: int | None, directory: Path | None, output: str) -> None:
    """Draw one round of RUN: which region, which hop and which phase took how long.

    ROUND is the last one of training unless given; the beginning of RUN will do where it is unique.

    \b
    Examples:
      hierfl trace digits-7f3a2b
      hierfl trace digits-7f3a2b 3 --dir demo-kept
    """
    from hierfl import spans
    from hierfl.waterfall import waterfall

    where = directory or state_dir()
    if where is None:
        raise NotFound("federation", STATE_DIR, "name the folder that holds its traces with --dir")
    found, skipped = spans.read(where)
    if not found:
        raise NotFound("trace", str(where), "no process wrote a traces/*.jsonl below it")
    if skipped:
        say(f"{skipped} lines or files could not be read and were left out")
    flow = waterfall(spans.pick_round(found, run, round_number))
    emit(_document(flow), "hierfl.trace/1", output, lambda: _show(flow))


def describe(flow: Waterfall) -> list[str]:
    """The waterfall in words: its slowest leg, what the spans cover, which clocks were moved."""
    lines = []
    if flow.path:
        leg = flow.path[0]
        lines.append(f"slowest leg: {leg.owner} spent {_s(leg.seconds)} of {_s(flow.seconds)} {_words(leg.name)}")
    lines.append(f"named spans cover {100 * flow.covered:.1f} % of the round")
    if flow.clock_offsets_s:
        moved = ", ".join(f"{process} {shift:+.3f} s" for process, shift in flow.clock_offsets_s.items())
        lines.append(f"clocks corrected: {moved}")
    return lines


def draw(flow: Waterfall, width: int) -> RenderableType:
    """The waterfall as a table with one bar a row, ``width`` cells wide in all."""
    from rich.table import Table

    retried = f", {flow.attempts} attempts" if flow.attempts > 1 else ""
    table = Table(
        title=f"run {flow.run}, round {flow.round}: {flow.outcome} in {_s(flow.seconds)}{retried}",
        title_justify="left",
        box=None,
        pad_edge=False,
        width=width,
    )
    text_width = max((len(row.owner) + len(_phase(row.name)) for row in flow.rows), default=10)
    bar_width = max(MIN_BAR_WIDTH, width - text_width - 27)
    for heading, right in (("", False), ("phase", False), ("", False), ("start", True), ("busy", True), ("n", True)):
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    slowest = (flow.path[0].owner, flow.path[0].name) if flow.path else None
    owner = ""
    for row in flow.rows:
        failed = f" ({row.num_failed} failed)" if row.num_failed else ""
        table.add_row(
            row.owner if row.owner != owner else "",
            _phase(row.name) + failed,
            _bar(row, flow.seconds, bar_width),
            _s(row.busy[0][0]),
            _s(row.busy_s),
            str(row.num_spans),
            style="bold" if (row.owner, row.name) == slowest else "",
        )
        owner = row.owner
    return table


def _bar(row: Row, seconds: float, width: int) -> Text:
    """Cells in which the row was busy; what began or ended outside the round is drawn at its edge."""
    from rich.text import Text

    cells = [" "] * width
    scale = width / max(seconds, 1e-9)
    for start, end in row.busy:
        first = min(width - 1, max(0, int(start * scale)))
        last = min(width - 1, max(first, int(end * scale - 1e-9)))
        cells[first : last + 1] = "━" * (last + 1 - first)
    return Text("".join(cells), style=COLOURS.get(_phase(row.name), DEFAULT_COLOUR))


def _show(flow: Waterfall) -> None:
    from rich.console import Console

    console = Console(soft_wrap=False)
    console.print(draw(flow, console.width))
    for line in describe(flow):
        click.echo(line)


def _document(flow: Waterfall) -> dict[str, Any]:
    return {
        "run": flow.run,
        "round": flow.round,
        "outcome": flow.outcome,
        "attempts": flow.attempts,
        "trace": flow.trace,
        "seconds": round(flow.seconds, 6),
        "covered": round(flow.covered, 6),
        "slowest": describe(flow)[0] if flow.path else "",
        "path": [_leg(leg.owner, leg.name, seconds=leg.seconds) for leg in flow.path],
        "rows": list(_row_documents(flow.rows)),
        "clock_offsets_s": dict(flow.clock_offsets_s),
    }


def _row_documents(rows: Iterable[Row]) -> Iterable[dict[str, Any]]:
    for row in rows:
        counts = {"num_spans": row.num_spans, "num_failed": row.num_failed}
        times = {"start_s": row.busy[0][0], "end_s": row.busy[-1][1], "busy_s": row.busy_s}
        yield _leg(row.owner, row.name, **times) | counts


def _leg(owner: str, name: str, **seconds: float) -> dict[str, Any]:
    return {"region": owner, "phase": _phase(name)} | {key: round(value, 6) for key, value in seconds.items()}


def _phase(name: str) -> str:
    from hierfl.observe import KEY_PREFIX

    return name.removeprefix(KEY_PREFIX)


def _words(name: str) -> str:
    from hierfl.observe import SPAN_WORDS

    return SPAN_WORDS.get(name, f"in {_phase(name)}")


def _s(seconds: float) -> str:
    """Seconds as people read them: ``1.9 s``, ``12 ms``."""
    return f"{seconds:.1f} s" if abs(seconds) >= 1 else f"{1000 * seconds:.0f} ms"
