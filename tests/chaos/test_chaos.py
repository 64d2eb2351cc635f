"""CI's share of the chaos suite: one repeat of the rows that fit; and ``FAULTS.md`` says what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import matrix
from tests.chaos.rows import ROWS

ROOT = Path(__file__).parents[2]


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize("row", [2, 3, 4, 21])
async def test_one_repeat_is_clean(row, tmp_path):
    figures = await ROWS[row](tmp_path, 1)
    print(figures)
    assert not figures.wrong


def test_faults_md_has_every_row_and_the_figures_that_were_measured():
    text = (ROOT / "FAULTS.md").read_text()
    assert [int(line.split("|")[1]) for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()] == [
        *range(1, 23)
    ]
    assert matrix.filled_in(text, matrix.read_figures()) == text


def test_every_case_has_its_promise_and_its_number_of_repeats():
    assert set(ROWS) == {row for row, promise in matrix.MATRIX.items() if promise.repeats}
