"""Span files to one round's waterfall: clocks, coverage, and what made the round as long as it was."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hierfl import spans
from hierfl.errors import NotFound
from hierfl.observe import (
    SPAN_CHECK,
    SPAN_CLIENT_WAIT,
    SPAN_COMMIT,
    SPAN_FOLD,
    SPAN_MERGE,
    SPAN_PLAN,
    SPAN_RECEIVE,
    SPAN_ROUND,
    SPAN_SEAL,
    SPAN_TRAIN,
    SPAN_UPLINK,
    SPAN_UPLOAD,
)
from hierfl.spans import SpanLine
from hierfl.waterfall import Leg, waterfall

T0 = 1_700_000_000_000_000_000
S = 1_000_000_000


class Tape:
    """Writes down spans, in seconds of true time, as processes with wrong clocks would."""

    def __init__(self, trace: str = "a" * 32, clocks: Mapping[str, float] | None = None) -> None:
        self.trace, self.clocks, self.lines = trace, clocks or {}, list[SpanLine]()

    def add(
        self, process: str, name: str, start: float, end: float, parent: str = "", kind: str = "internal", **keys: Any
    ) -> str:
        shift = self.clocks.get(process, 0.0)
        span = f"{int(self.trace[:4], 16) * 1000 + len(self.lines) + 1:016x}"
        self.lines.append(
            SpanLine(
                trace=self.trace,
                span=span,
                parent=parent,
                name=name,
                kind=kind,
                process=process,
                start_unix_ns=T0 + round((start + shift) * S),
                end_unix_ns=T0 + round((end + shift) * S),
                ok=keys.pop("ok", True),
                attributes=keys,
            )
        )
        return span


def a_round(tape: Tape, *, run: str = "run-1", number: int = 1, train_s: Mapping[str, float] | None = None) -> Tape:
    """Two regions of one client each; a round of (1 + longest training) seconds."""
    train_s = train_s or {"eu": 0.4, "us": 1.4}
    longest = max(train_s.values())
    top = tape.add("controller", SPAN_ROUND, 0, longest + 1.0, run=run, task="train", round=number, attempt=1)
    tape.add("controller", SPAN_PLAN, 0, 0.1, top)
    for region, seconds in train_s.items():
        combiner, client = f"combiner.{region}", f"client.{region}"
        done = 0.2 + seconds
        tape.add(combiner, SPAN_CLIENT_WAIT, 0.1, done + 0.2, top, "consumer", region=region)
        tape.add(client, SPAN_TRAIN, 0.2, done, top, "consumer", region=region, site=f"site-{region}")
        upload = tape.add(client, SPAN_UPLOAD, done, done + 0.2, top, "consumer", region=region)
        tape.add(combiner, SPAN_CHECK, done + 0.05, done + 0.1, upload, "server", region=region)
        tape.add(combiner, SPAN_FOLD, done + 0.1, done + 0.15, upload, "server", region=region)
        tape.add(combiner, SPAN_SEAL, done + 0.2, done + 0.3, top, "consumer", region=region)
        uplink = tape.add(combiner, SPAN_UPLINK, done + 0.3, done + 0.5, top, "consumer", region=region)
        tape.add("controller", SPAN_RECEIVE, done + 0.35, done + 0.45, uplink, "server", region=region)
    tape.add("controller", SPAN_MERGE, longest + 0.7, longest + 0.9, top)
    tape.add("controller", SPAN_COMMIT, longest + 0.9, longest + 1.0, top)
    return tape


def test_the_slowest_leg_is_the_longest_stretch_of_the_critical_path() -> None:
    flow = waterfall(a_round(Tape()).lines)
    assert flow.seconds == pytest.approx(2.4)
    assert flow.path[0] == Leg(owner="us", name=SPAN_TRAIN, seconds=pytest.approx(1.4))
    assert (flow.outcome, flow.attempts, flow.run, flow.round) == ("committed", 1, "run-1", 1)


def test_the_critical_path_adds_up_to_the_round() -> None:
    flow = waterfall(a_round(Tape()).lines)
    assert sum(leg.seconds for leg in flow.path) == pytest.approx(flow.seconds)
    assert {leg.owner for leg in flow.path} == {"controller", "us"}
    assert {leg.name: round(leg.seconds, 3) for leg in flow.path} == {
        SPAN_TRAIN: 1.4,
        SPAN_MERGE: 0.2,
        SPAN_PLAN: 0.1,
        SPAN_COMMIT: 0.1,
        SPAN_CLIENT_WAIT: 0.1,  # from the plan to the start of training
        SPAN_UPLOAD: 0.1,  # check and fold inside it are their own
        SPAN_CHECK: 0.05,
        SPAN_FOLD: 0.05,
        SPAN_SEAL: 0.1,
        SPAN_UPLINK: 0.1,
        SPAN_RECEIVE: 0.1,
    }


def test_without_the_clients_files_their_region_waits_for_them() -> None:
    lines = [line for line in a_round(Tape()).lines if not line.process.startswith("client")]
    flow = waterfall(lines)
    assert flow.path[0].owner == "us"
    assert flow.path[0].name == SPAN_CLIENT_WAIT
    assert flow.path[0].seconds == pytest.approx(1.6)


def test_with_the_controllers_file_alone_the_rest_is_unnamed() -> None:
    flow = waterfall([line for line in a_round(Tape()).lines if line.process == "controller"])
    assert flow.path[0].name == SPAN_ROUND
    assert flow.covered == pytest.approx(0.6 / 2.4)


def test_without_the_controllers_file_what_is_there_is_drawn() -> None:
    lines = [line for line in a_round(Tape()).lines if line.process != "controller"]
    with pytest.raises(NotFound, match="no trace of run 'run-1'"):
        spans.pick_round(lines, "run-1")  # nothing says which run it was
    tape = a_round(Tape())
    tape.add("combiner.eu", SPAN_PLAN, 0.1, 0.1, region="eu", run="run-1", round=1)
    flow = waterfall(spans.pick_round([x for x in tape.lines if x.process != "controller"], "run-1"))
    assert flow.seconds == pytest.approx(2.0)
    assert flow.outcome == "not committed"


def test_rows_stand_region_by_region_in_the_order_they_began() -> None:
    rows = waterfall(a_round(Tape()).lines).rows
    owners = [owner for owner, _ in itertools.groupby(row.owner for row in rows)]
    assert owners == ["controller", "eu", "us"]
    assert [row.name for row in rows if row.owner == "eu"] == [
        SPAN_CLIENT_WAIT,
        SPAN_TRAIN,
        SPAN_UPLOAD,
        SPAN_CHECK,
        SPAN_FOLD,
        SPAN_SEAL,
        SPAN_UPLINK,
        SPAN_RECEIVE,
    ]


def test_a_row_adds_up_its_spans_without_counting_a_moment_twice() -> None:
    tape = a_round(Tape())
    for start, end in ((0.2, 0.5), (0.4, 0.7), (1.0, 1.1)):
        tape.add("client.x", SPAN_TRAIN, start, end, region="eu", ok=start < 1)
    row = next(row for row in waterfall(tape.lines).rows if (row.owner, row.name) == ("eu", SPAN_TRAIN))
    assert (row.num_spans, row.num_failed, len(row.busy)) == (4, 1, 2)
    assert row.busy_s == pytest.approx(0.6)


CLOCKS = {"combiner.us": 7.5, "client.us": -3.0, "combiner.eu": -40.0, "client.eu": 0.001}


def test_clocks_that_differ_are_corrected_to_within_the_slack_of_an_rpc() -> None:
    true = waterfall(a_round(Tape()).lines)
    moved = waterfall(a_round(Tape(clocks=CLOCKS)).lines)
    assert true.clock_offsets_s == {}
    for process, shift in CLOCKS.items():
        assert moved.clock_offsets_s.get(process, 0.0) == pytest.approx(-shift, abs=0.11)
    assert moved.path[0].owner == "us"
    assert moved.path[0].seconds == pytest.approx(1.4, abs=0.1)
    assert moved.covered > 0.95


@given(shifts=st.fixed_dictionaries({process: st.floats(-3600, 3600) for process in CLOCKS}))
def test_after_correction_every_answer_lies_inside_its_call(shifts: dict[str, float]) -> None:
    lines = a_round(Tape(clocks=shifts)).lines
    offsets = spans.clock_offsets(lines)
    by_id = {line.span: line for line in lines}
    for child in lines:
        parent = by_id.get(child.parent)
        if parent is None:
            continue
        move = offsets[child.process] - offsets[parent.process]
        assert child.start_unix_ns + move >= parent.start_unix_ns - 1
        if child.kind == "server":
            assert child.end_unix_ns + move <= parent.end_unix_ns + 1


def test_an_answer_that_outlived_its_call_moves_no_clock() -> None:
    tape = Tape()
    top = tape.add("controller", SPAN_ROUND, 0, 2, run="r", round=1)
    upload = tape.add("client.a", SPAN_UPLOAD, 0.5, 1.0, top, "consumer", region="eu")
    tape.add("combiner.eu", SPAN_CHECK, 0.6, 1.5, upload, "server", region="eu")
    assert set(spans.clock_offsets(tape.lines).values()) == {0}


def test_the_default_round_is_the_last_committed_one_of_training() -> None:
    first, second = a_round(Tape("a" * 32)), a_round(Tape("b" * 32), number=2)
    open_one = Tape("c" * 32)
    open_one.add("controller", SPAN_ROUND, 0, 1, run="run-1", round=3)
    evaluation = Tape("d" * 32)
    top = evaluation.add("controller", SPAN_ROUND, 0, 1, run="run-1", round=3, task="evaluate")
    evaluation.add("controller", SPAN_COMMIT, 0.5, 1, top)
    lines = first.lines + second.lines + open_one.lines
    assert {line.trace for line in spans.pick_round(lines + evaluation.lines, "run-1")} == {"b" * 32}
    assert {line.trace for line in spans.pick_round(lines, "run-1")} == {"b" * 32}
    assert {line.trace for line in spans.pick_round(lines, "run-1", 3)} == {"c" * 32}
    assert {line.trace for line in spans.pick_round(open_one.lines, "run-1")} == {"c" * 32}
    with pytest.raises(NotFound, match="no trace of round '9'; there are 1 to 3"):
        spans.pick_round(lines, "run-1", 9)


def test_a_span_that_lost_its_parent_still_belongs_to_its_round() -> None:
    stray = Tape("d" * 32)
    stray.add("client.eu", SPAN_TRAIN, 0.2, 0.3, run="run-1", round=1)
    lines = a_round(Tape()).lines + stray.lines
    assert len(spans.pick_round(lines, "run-1", 1)) == len(lines)


def test_a_sites_span_without_a_region_stands_in_the_one_it_uploaded_to() -> None:
    tape = Tape()
    top = tape.add("controller", SPAN_ROUND, 0, 2, run="r", round=1)
    tape.add("client.a", SPAN_TRAIN, 0.1, 0.5, top, "consumer")
    upload = tape.add("client.a", SPAN_UPLOAD, 0.5, 1.0, top, "consumer")
    tape.add("combiner.eu.intake-1", SPAN_CHECK, 0.6, 0.7, upload, "server")
    tape.add("client.b", SPAN_TRAIN, 0.1, 0.5, top, "consumer")
    rows = waterfall(tape.lines).rows
    assert [(row.owner, row.name) for row in rows] == [
        ("client", SPAN_TRAIN),
        ("eu", SPAN_TRAIN),
        ("eu", SPAN_UPLOAD),
        ("eu", SPAN_CHECK),
    ]


def test_a_run_is_found_by_its_beginning_if_that_is_unique() -> None:
    lines = a_round(Tape("a" * 32), run="7f3a").lines + a_round(Tape("b" * 32), run="7f99").lines
    assert {line.trace for line in spans.pick_round(lines, "7f3")} == {"a" * 32}
    with pytest.raises(NotFound, match="begins several: 7f3a, 7f99"):
        spans.pick_round(lines, "7f")
    with pytest.raises(NotFound, match="traced runs: 7f3a, 7f99"):
        spans.pick_round(lines, "x")


def test_damaged_lines_and_unreadable_files_are_skipped_and_counted(tmp_path: Path) -> None:
    lines = [msgspec.json.encode(line) for line in a_round(Tape()).lines]
    folder = tmp_path / "combiner" / "traces"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(b"\n".join(lines[:5]) + b"\n" + lines[5][:40])
    (folder / "b.jsonl").write_bytes(b"\n".join([*lines[5:], b"{}", b"\xff\xfe", b'{"span": 3}']))
    (folder / "c.jsonl").mkdir()
    found, skipped = spans.read(tmp_path)
    assert len(found) == len(lines)
    assert skipped == 5
    assert spans.read(tmp_path / "combiner" / "missing") == ([], 0)


def test_spans_whose_parents_form_a_circle_do_no_harm() -> None:
    tape = Tape()
    tape.add("controller", SPAN_ROUND, 0, 1, run="r", round=1)
    tape.add("controller", SPAN_MERGE, 0.1, 0.9, parent=f"{0xAAAA * 1000 + 3:016x}")
    tape.add("controller", SPAN_COMMIT, 0.2, 0.8, parent=f"{0xAAAA * 1000 + 2:016x}")
    assert waterfall(tape.lines).covered == pytest.approx(0.8)


span_times = st.tuples(st.floats(-1, 5), st.floats(0, 3))


@given(st.lists(st.tuples(st.sampled_from(["controller", "eu", "us"]), span_times), min_size=1, max_size=30))
def test_any_spans_give_a_path_that_adds_up_and_a_coverage_of_at_most_one(
    drawn: list[tuple[str, tuple[float, float]]],
) -> None:
    tape = Tape()
    top = tape.add("controller", SPAN_ROUND, 0, 4, run="r", round=1)
    names = itertools.cycle([SPAN_TRAIN, SPAN_CLIENT_WAIT, SPAN_SEAL, SPAN_CHECK])
    parent = top
    for owner, (start, seconds) in drawn:
        keys = {} if owner == "controller" else {"region": owner}
        parent = tape.add("controller", next(names), start, start + seconds, parent, **keys)
    flow = waterfall(tape.lines)
    assert 0 <= flow.covered <= 1 + 1e-9
    assert sum(leg.seconds for leg in flow.path) == pytest.approx(flow.seconds)
