"""``python -m tests.chaos ROW...``: run rows of the matrix, print their figures as JSON; 1 where one is not clean.

``python -m tests.chaos --write`` puts what was measured into ``FAULTS.md``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.chaos import matrix
from tests.chaos.rows import ROWS

FAULTS = Path(__file__).parents[2] / "FAULTS.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    known = ", ".join(map(str, ROWS))
    parser.add_argument("rows", nargs="*", type=int, metavar="ROW", help=f"of {known}; default: all")
    parser.add_argument("--repeats", type=int, default=0, help="how often each fault is made (default: as FAULTS.md)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep stores and logs there")
    parser.add_argument("--save", action="store_true", help="keep the figures, for FAULTS.md")
    parser.add_argument("--write", action="store_true", help="only write FAULTS.md from the figures that are kept")
    asked = parser.parse_args()
    unknown = sorted(set(asked.rows) - ROWS.keys())
    if unknown:
        parser.error(f"there is no row {unknown[0]}; there are {known}")
    if asked.write:
        FAULTS.write_text(matrix.filled_in(FAULTS.read_text(), matrix.read_figures()))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    outcomes = [run(row, asked) for row in asked.rows or ROWS]
    return 0 if all(outcomes) else 1


def run(row: int, asked: argparse.Namespace) -> bool:
    """One row; whether it was clean."""
    with tempfile.TemporaryDirectory(prefix="hierfl-chaos-") as scratch:
        folder = Path(asked.keep or scratch) / f"row-{row}"
        folder.mkdir(parents=True)
        figures = asyncio.run(ROWS[row](folder, asked.repeats or matrix.MATRIX[row].repeats))
    print(json.dumps(asdict(figures)), flush=True)
    if asked.save:
        matrix.write_figures(figures)
    return figures.clean


if __name__ == "__main__":
    sys.exit(main())
