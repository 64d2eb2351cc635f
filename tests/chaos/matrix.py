"""``FAULTS.md``: its rows from what is promised here and from the figures that cases have left in ``results/``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.chaos.figures import Figures

__all__ = ["MATRIX", "Promise", "filled_in", "read_figures", "write_figures"]

RESULTS = Path(__file__).with_name("results")
MARKERS = ("<!-- matrix -->\n", "<!-- /matrix -->\n")


@dataclass(frozen=True)
class Promise:
    """One row: the fault and what is promised; how it is measured, or what to say where no figure stands."""

    fault: str
    promise: str
    repeats: int = 0
    """By the chaos suite, for the figures of the matrix."""
    elsewhere: str = ""
    """Another command that shows it."""
    instead: str = "not measured yet"


MATRIX: Mapping[int, Promise] = {
    1: Promise("an acknowledgement is lost, 1 to 5 times", "counted once all the same", repeats=20),
    2: Promise("the same key, other bytes", "refused; the first ones stand", repeats=30),
    3: Promise("a stale round, a future one, another attempt, another run", "refused by name", repeats=25),
    4: Promise(
        "an intake or the Region's actor is killed, at every failpoint",
        "nothing lost; serving again in 10 s",
        repeats=20,
    ),
    5: Promise(
        "the controller is killed, at every failpoint",
        "nothing lost; the round resumed, or abandoned whole, in 15 s",
        repeats=20,
    ),
    6: Promise(
        "a leader that was frozen thaws",
        "nothing from its epoch is accepted by the store or a region; a record that it made first is adopted whole",
        elsewhere="python -m pytest -m slow tests/e2e/test_two_controllers.py -k thaw",
        instead="passes or fails: no figure",
    ),
    7: Promise(
        "a region is cut off for 60 s, both ways or one",
        "the others' rounds go on; it is back within a round",
        repeats=2,
    ),
    8: Promise("200 ms round trip and 5 % loss on one region", "no failed round", repeats=4),
    9: Promise("a region at 8 Mbit/s", "it alone is slow; the others' rounds close by quorum", repeats=2),
    10: Promise(
        "the cohort falls below `k` in mid-round", "that region abstains, nothing leaves, refusals stand", repeats=10
    ),
    11: Promise("50 uploads that hardly move", "the others get in"),
    12: Promise(
        "a transfer is cut at 25, 50, 99 %",
        "goes on from there, counted once, nothing left behind",
        elsewhere="python -m pytest tests/e2e/test_resume.py tests/combiners/test_resume.py",
        instead="passes or fails: no figure",
    ),
    13: Promise(
        "Redis killed, wiped, frozen, full",
        "a clear wait or refusal, never a wrong ledger; a wiped one is rebuilt",
        elsewhere="python -m pytest -m slow tests/e2e/test_two_controllers.py -k 'redis or wiped'",
        instead="passes or fails: no figure",
    ),
    14: Promise(
        "no space, or EIO, in a region or at the controller",
        "nothing acknowledged that is not durable; the others go on",
        repeats=5,
    ),
    15: Promise("a combiner runs out of memory", "one region only, and it says what it needed"),
    16: Promise(
        "a region's clocks are an hour ahead, then two days behind",
        "takes part, and a warning names the clock; before its certificates are valid it is out, alone, and told why",
        repeats=3,
    ),
    17: Promise("a region's Ray dies; it moves to another folder", "goes on from its zone's store", repeats=5),
    18: Promise("144 clients in six regions start at once, and all again", "all in, no cascade", repeats=1),
    19: Promise("a random mix of all that kills and loses", "clean on every seed", repeats=10),
    20: Promise("an hour with clients that come and go", "nothing lost, no memory growing"),
    21: Promise("the same job twice, with other sites alive", "one release for one base and task", repeats=5),
    22: Promise("an intake freezes, is replaced, and thaws", "nothing of what it had is accepted", repeats=20),
}


def write_figures(figures: Figures, folder: Path = RESULTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{figures.row}.json").write_text(json.dumps(asdict(figures), indent=2) + "\n")


def read_figures(folder: Path = RESULTS) -> dict[int, Figures]:
    found = (Figures(**json.loads(path.read_text())) for path in folder.glob("*.json"))
    return {figures.row: figures for figures in found}


def filled_in(text: str, measured: Mapping[int, Figures]) -> str:
    """``text`` with the matrix between its markers."""
    before, _, rest = text.partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    head = ["| # | fault | promise | measured | to see it |", "| --- | --- | --- | --- | --- |"]
    rows = [_row(number, promise, measured.get(number)) for number, promise in MATRIX.items()]
    return "".join((before, MARKERS[0], *(f"{line}\n" for line in (*head, *rows)), MARKERS[1], after))


def _row(number: int, promise: Promise, figures: Figures | None) -> str:
    said = promise.instead if figures is None else _said(figures)
    command = f"python -m tests.chaos {number} --repeats {promise.repeats}" if promise.repeats else promise.elsewhere
    return f"| {number} | {promise.fault} | {promise.promise} | {said} | {f'`{command}`' if command else '-'} |"


def _said(figures: Figures) -> str:
    outcome = "clean" if figures.clean else f"**not clean**: {'; '.join(figures.wrong)}"
    told = [f"{name.replace('_', ' ')} {_shown(value)}" for name, value in figures.figures.items()]
    return f"{outcome} after {figures.repeats}; {', '.join(told)}; {figures.load}"


def _shown(value: float | str) -> str:
    return f"`{value}`" if isinstance(value, str) else f"{value:,}"
