"""``hierfl explain``: what an error code means, whose move it is, what to do next."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from hierfl.cli.output import emit, output_option, table

if TYPE_CHECKING:
    from hierfl.explain import Page

__all__ = ["explain"]


@click.command()
@click.argument("code", required=False)
@output_option
def explain(code: str | None, output: str) -> None:
    """Explain an error CODE, such as HFL-302 or 302; without one, list them all. Needs no network.

    \b
    Examples:
      hierfl explain HFL-302
      hierfl explain 302
    """
    from hierfl import explain as errors

    if code is None:
        found = list(errors.pages().values())
        document = {"errors": [asdict(page) for page in found]}
        rows = [(page.code, page.name, page.title) for page in found]
        emit(document, "hierfl.errors/1", output, lambda: table(("code", "error", "means"), rows))
        return
    page = errors.explain(code)
    emit(asdict(page), "hierfl.error/1", output, lambda: click.echo(_as_text(page)))


def _as_text(page: Page) -> str:
    """The section without its marks, words wrapped as the terminal is wide."""
    parts = [click.style(f"{page.code} {page.name}: {page.title}", bold=True)]
    for paragraph in page.text.replace("\n**", "\n\n**").split("\n\n"):
        plain = " ".join(paragraph.split()).replace("**", "")
        parts.append(click.wrap_text(plain, width=_width(), subsequent_indent="  "))
    return "\n".join(parts)


def _width() -> int:
    import shutil

    return min(shutil.get_terminal_size((100, 24)).columns, 110)
