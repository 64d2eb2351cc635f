"""SCALE.md and what makes it: the fit, the simulation's invariants, the arithmetic, the page. Nothing is measured."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
path_of_benchmarks = pytest.MonkeyPatch()
path_of_benchmarks.syspath_prepend(str(ROOT))
constants = importlib.import_module("benchmarks.scale.constants")
paper = importlib.import_module("benchmarks.scale.paper")
result = importlib.import_module("benchmarks.scale.result")
round_ = importlib.import_module("benchmarks.scale.round")
scale = importlib.import_module("benchmarks.simulate_scale")
text = importlib.import_module("benchmarks.scale.text")
documents = importlib.import_module("hierfl.documents")
path_of_benchmarks.undo()

Size = constants.Size
TRUE = constants.Constants(
    cpu_s={
        "client": {"client": 0.008, "virtual_client": 0.003, "client_mb": 0.006},
        "intake": {"region": 0.01, "client": 0.002, "client_mb": 0.005, "region_mb": 0.002},
        "region": {"region": 0.01, "client": 0.0004, "region_mb": 0.01},
        "controller": {"round": 0.005, "region": 0.004, "round_mb": 0.003, "region_mb": 0.006},
        "ray": {"region": 0.002, "client": 0.0},
    },
    wait_s=0.03,
)
CORES = 2
UNSEEN = Size(clients=16, params=2_500_000)
sizes = st.builds(
    Size,
    clients=st.integers(4, 20),
    params=st.sampled_from([1000, 100_000, 400_000]),
    regions=st.integers(1, 2),
    intakes=st.integers(1, 2),
    virtual=st.booleans(),
)


def made_run(size, truth=TRUE):
    """What a machine with these constants would measure."""
    seconds, _ = round_.simulate(size, truth, CORES)
    model = 4 * size.params
    moved = {"client_up": size.clients * model, "border_up": 2 * size.regions * model}
    return constants.Run(size=size, round_s=seconds, cpu_s=truth.cpu_of(size), bytes=moved, load=0.1)


def made_result():
    runs = {size: made_run(size) for size in (*scale.CALIBRATE[:6], UNSEEN)}
    return scale.make(runs)


def document_of(run, **changed):
    size = run.size
    whole = {
        "schema": "hierfl.bench_round/1",
        "encoding": "float32",
        "round_s": {"median": run.round_s},
        "cpu_s_by_part": run.cpu_s,
        "bytes": run.bytes,
        "load": run.load,
        **{name: getattr(size, name) for name in ("clients", "params", "regions", "intakes", "virtual")},
    }
    return {**whole, **changed}


# ---------------------------------------------------------------- the fit


def test_the_fit_finds_the_constants_that_made_the_measurements():
    runs = [made_run(size) for size in (*scale.CALIBRATE, *scale.PREDICT[:4], UNSEEN)]
    found = constants.fit(runs)
    for run in runs:
        assert sum(found.cpu_of(run.size).values()) == pytest.approx(sum(run.cpu_s.values()), rel=0.02)


def test_no_cost_is_negative_whatever_was_measured():
    rng = np.random.default_rng(1)
    for _ in range(20):
        matrix, wanted = rng.normal(size=(6, 4)), rng.normal(size=6)
        x = constants.nonnegative_least_squares(matrix, wanted)
        assert (x >= 0).all()
        slope = matrix.T @ (matrix @ x - wanted)
        assert (slope >= -1e-6).all()  # no coordinate can grow to advantage, ...
        assert np.abs(slope[x > 1e-9]).max(initial=0) < 1e-6  # ... nor one above 0 shrink


def test_an_unknown_that_no_run_shows_costs_nothing():
    found = constants.nonnegative_least_squares(np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([3.0, 6.0]))
    assert found.tolist() == pytest.approx([3.0, 0.0])


def test_too_few_runs_are_refused():
    with pytest.raises(ValueError, match="4 runs are needed to calibrate, there are 3"):
        constants.fit([made_run(size) for size in scale.CALIBRATE[:3]])


@pytest.mark.parametrize("changed", [{"schema": "hierfl.bench_round/2"}, {"encoding": "int8"}, {"client_disk": True}])
def test_results_of_something_else_are_left_out(changed):
    assert constants.read_run(document_of(made_run(scale.CALIBRATE[0]), **changed)) is None


def test_the_run_under_the_least_load_is_taken_from_files_and_from_lists_in_them(tmp_path):
    run = made_run(scale.CALIBRATE[0])
    other = made_run(scale.CALIBRATE[1])
    (tmp_path / "a.json").write_text(json.dumps(document_of(run, load=3.0)))
    (tmp_path / "b.json").write_text(json.dumps({"points": [document_of(run), document_of(other)]}))
    (tmp_path / "c.json").write_text("no JSON")
    assert scale.read_runs([tmp_path]) == {run.size: run, other.size: other}


# ---------------------------------------------------------------- the simulation


@settings(max_examples=15, deadline=None)
@given(sizes, st.integers(1, 4))
def test_all_work_is_done_and_no_round_is_faster_than_its_cores(size, cores):
    seconds, worked_s = round_.simulate(size, TRUE, cores)
    asked_s = sum(TRUE.cpu_of(size).values())
    ray_s = TRUE.cpu_of(size)["ray"]  # goes on beside a round, and need not be over at its end
    assert asked_s - ray_s - 1e-6 <= worked_s <= asked_s + 1e-6
    assert TRUE.wait_s + worked_s / cores - 1e-9 <= seconds <= TRUE.wait_s + asked_s + 1e-6


@settings(max_examples=10, deadline=None)
@given(sizes)
def test_a_round_is_the_same_each_time_and_more_cores_do_no_harm(size):
    seconds, _ = round_.simulate(size, TRUE, 1)
    assert round_.simulate(size, TRUE, 1)[0] == seconds
    slices_s = 10 * round_.SLICE_S  # the order of slices may cost a few of them
    assert round_.simulate(size, TRUE, 64)[0] <= seconds + slices_s


@settings(max_examples=10, deadline=None)
@given(sizes)
def test_a_round_with_more_clients_takes_longer(size):
    more = replace(size, clients=2 * size.clients)
    assert round_.simulate(more, TRUE, CORES)[0] > round_.simulate(size, TRUE, CORES)[0]


def test_one_core_does_the_work_of_one_round_and_nothing_else():
    size = Size(clients=8, params=1000)
    seconds, worked_s = round_.simulate(size, TRUE, 1)
    assert seconds == pytest.approx(TRUE.wait_s + worked_s, rel=0.01)


# ---------------------------------------------------------------- calibration and prediction


def test_what_obeys_the_constants_is_predicted_and_what_does_not_is_off():
    runs = [made_run(size) for size in scale.CALIBRATE]
    found = scale.calibrate(runs, CORES)
    unseen = made_run(UNSEEN)
    assert abs(scale.predict(unseen, found, CORES).error) < 0.05
    assert found.slowdown == pytest.approx(1.0, abs=0.05)
    slow = replace(unseen, round_s=2 * unseen.round_s)
    assert not scale.predict(slow, found, CORES).is_within_goal


def test_memory_of_a_client_comes_from_the_fewest_and_the_most_of_them():
    few, many = (
        replace(made_run(Size(clients=clients, params=1000, virtual=True)), intake_mib=mib)
        for clients, mib in ((16, 100.0), (1040, 200.0))
    )
    assert scale.kib_a_client([many, few]) == 100.0
    assert scale.kib_a_client([few, replace(few, intake_mib=0.0)]) is None


def test_a_machine_that_is_slower_all_over_shows_in_the_slowdown_and_is_predicted_too():
    busy = replace(TRUE, slowdown=1.5)
    found = scale.calibrate([made_run(size, busy) for size in scale.CALIBRATE], CORES)
    assert found.slowdown == pytest.approx(1.5, rel=0.05)
    assert abs(scale.predict(made_run(UNSEEN, busy), found, CORES).error) < 0.05


def test_no_round_both_calibrates_and_is_predicted():
    assert not set(scale.CALIBRATE) & set(scale.PREDICT)
    assert len({*scale.CALIBRATE, *scale.PREDICT}) == len(scale.CALIBRATE) + len(scale.PREDICT)


# ---------------------------------------------------------------- on paper


def test_the_busiest_resource_comes_first_and_every_part_is_counted():
    found = paper.needs(paper.GLOBAL, 100.0, TRUE, 1.2)
    assert [need.seconds for need in found] == sorted((need.seconds for need in found), reverse=True)
    assert len({need.resource for need in found}) == 8


def test_the_totals_are_those_of_the_constants():
    on = replace(paper.GLOBAL, regions=2, intakes=1, clients=12)
    size = Size(clients=12, params=2_500_000, regions=2)
    cost = paper.totals(on, size.model_mb, TRUE, 1.5)
    assert cost.core_s == pytest.approx(TRUE.cpu_of(size))
    assert (cost.client_bytes, cost.border_up_bytes, cost.border_down_bytes) == (2.4e8, 3e7, 2e7)


def test_the_controllers_work_does_not_depend_on_the_number_of_clients():
    few = paper.totals(replace(paper.GLOBAL, clients=1000), 1.0, TRUE, 1.2)
    many = paper.totals(paper.GLOBAL, 1.0, TRUE, 1.2)
    assert few.core_s["controller"] == many.core_s["controller"]
    assert few.border_up_bytes == many.border_up_bytes


# ---------------------------------------------------------------- the page


def test_the_page_says_which_rounds_were_predicted_and_how_far_off():
    page = text.document(made_result())
    assert "1 of 1 predicted rounds are within 25 %" in page
    assert "| 16 clients x 10 MB, 1 region | **predicted** |" in page
    assert page.count("calibrates |") == 6


def test_a_prediction_that_is_off_is_named():
    off = made_result()
    (*others, last) = off.predictions
    page = text.document(replace(off, predictions=(*others, replace(last, measured_s=2 * last.measured_s))))
    assert "**0 of 1 predicted rounds" in page
    assert "Outside it: 16 clients x 10 MB, 1 region (-" in page


def test_a_result_is_a_document_that_reads_back():
    made = made_result()
    assert documents.decode(documents.encode(made), result.ScaleResult, "simulation") == made


def test_the_page_in_the_repository_is_the_one_that_its_result_makes():
    file = ROOT / "benchmarks" / "results" / "simulation.json"
    made = documents.decode(file.read_bytes(), result.ScaleResult, file.name)
    page = (ROOT / "benchmarks" / "SCALE.md").read_text()
    assert page == text.document(made), "python benchmarks/simulate_scale.py --page-only"


def test_help_has_examples():
    command = [sys.executable, str(ROOT / "benchmarks" / "simulate_scale.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "examples:" in shown.stdout
