"""Data on stdout, talk on stderr. Every command says what it found through here.

A JSON document carries ``schema: hierfl.<name>/1``, so that a reader knows what it has. ``NO_COLOR`` is
kept: nothing here colours what is no terminal, or where that variable is set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import click

__all__ = ["emit", "output_option", "say", "table"]

F = TypeVar("F", bound=Callable[..., Any])


def output_option(function: F) -> F:
    """Add ``-o/--output``; the command takes it as ``output`` and hands it to ``emit``."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="Form of what goes to stdout.",
    )(function)


def emit(document: Mapping[str, Any], schema: str, output: str, show: Callable[[], object]) -> None:
    """Print ``document`` as JSON under ``schema``, or call ``show`` to print it for people."""
    if output == "json":
        click.echo(json.dumps({"schema": schema, **document}, indent=2, default=str))
    else:
        show()


def say(text: str) -> None:
    """Talk: one line on stderr."""
    click.echo(text, err=True)


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str = "") -> None:
    """Print rows in columns, numbers to the right; ``empty`` is said where there are none."""
    rows = list(rows)
    if not rows:
        say(empty)
        return
    numeric = [all(isinstance(row[n], int | float) for row in rows) for n in range(len(headings))]
    texts = [[f"{cell:,}" if type(cell) is int else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[n]) for row in (list(headings), *texts)) for n in range(len(headings))]
    for row in (headings, *texts):
        cells = (cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True))
        line = "  ".join(cells).rstrip()
        click.echo(click.style(line, bold=True) if row is headings else line)
