"""What an error code means, from ``ERRORS.md``, which is part of the package: no network is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources

from hierfl.errors import HierFLError, NotFound
from hierfl.toml import near

__all__ = ["Page", "error_classes", "explain", "pages"]

_HEADING = re.compile(r"^## (?P<code>HFL-\d{3}) (?P<name>\w+): (?P<title>.+) \(exit (?P<exit>\d+)\)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Page:
    """One section of ``ERRORS.md``."""

    code: str
    name: str
    """Of the class in ``hierfl/errors.py``."""
    title: str
    exit_code: int
    """What the command line returns for it."""
    text: str
    """The section as it stands in the file, Markdown."""


def pages() -> Mapping[str, Page]:
    """Every section by its code, in the order of the file."""
    text = (resources.files("hierfl") / "ERRORS.md").read_text(encoding="utf-8")
    headings = list(_HEADING.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    return {
        heading["code"]: Page(
            code=heading["code"],
            name=heading["name"],
            title=heading["title"],
            exit_code=int(heading["exit"]),
            text=text[heading.end() : end].strip(),
        )
        for heading, end in zip(headings, ends, strict=True)
    }


def explain(code: str) -> Page:
    """The page of ``HFL-312``, ``hfl-312``, ``312`` or a class's name.

    Raises:
        NotFound: There is no such code; the near one is named.
    """
    known = pages()
    digits = re.sub(r"^hfl[-_ ]?", "", code.strip().lower())
    for page in known.values():
        if digits in (page.code.lower(), page.code[4:], page.name.lower()):
            return page
    hint = near(code, [page.name for page in known.values()])
    if digits.isdecimal():
        nearest = min(known, key=lambda one: abs(int(one[4:]) - int(digits)))
        hint = f"; did you mean {nearest!r}?"
    raise NotFound("error code", code, "`hierfl explain` lists them all" + hint)


def error_classes(root: type[HierFLError] = HierFLError) -> Iterator[type[HierFLError]]:
    """``root`` and all that derives from it, once each."""
    yield root
    for child in root.__subclasses__():
        yield from error_classes(child)
