"""Benchmarks: what the result files say, and the table that README.md takes from them. No figure is judged here."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MARKED = "before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.harness")


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.syspath_prepend(str(ROOT))
    return tuple(importlib.import_module("benchmarks.__main__").BENCHES)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.syspath_prepend(str(ROOT))
    return tuple(importlib.import_module("benchmarks.__main__").ALONE)


@pytest.fixture
def result(harness):
    return harness.Result(
        schema="hierfl.bench_start/1",
        machine=harness.Machine(cpu="A Processor", cores=2, memory_bytes=8 * 2**30),
        load=0.25,
        versions={"python": "3.11.7", "numpy": "2.4.6"},
        seed=7,
        figures=(
            harness.Figure(name="starting", cpu_s=0.15, beside="nothing", beside_cpu_s=0.02, limit_s=0.3, goal_s=0.15),
            harness.Figure(name="folding", cpu_s=0.0125, beside="copying", beside_cpu_s=0.01),
        ),
    )


def test_every_bench_has_its_result_file_and_no_file_is_without_a_bench(harness, benches, alone):
    assert set(benches) <= {path.stem for path in harness.RESULTS.iterdir()} <= {*benches, *alone}
    assert list(harness.read_results(harness.RESULTS, benches)) == list(benches)


def test_a_result_says_on_what_machine_with_what_versions_and_which_seed(harness, benches):
    for path in harness.RESULTS.glob("*.json"):
        document = json.loads(path.read_text())
        assert document["schema"] == f"hierfl.bench_{path.stem}/1"
        assert bool(document.get("figures")) == (path.stem in benches)
        for one in document.get("points", [document]):
            assert set(one["machine"]) == {"cpu", "cores", "memory_bytes"}
            assert set(one["versions"]) >= {"python", "numpy", "numba", "hierfl"}
            assert isinstance(one["seed"], int)


def test_a_result_names_no_path_of_the_machine_that_made_it(harness):
    for path in harness.RESULTS.glob("*.json"):
        assert "/home" not in path.read_text()
        assert str(ROOT) not in path.read_text()


def test_the_table_has_a_row_a_figure_and_a_line_on_where_it_ran(harness, result):
    assert harness.table({"start": result}).splitlines() == [
        "| CPU time, median | measured | beside it, in the same run | ratio | limit |",
        "| --- | ---: | --- | ---: | --- |",
        "| starting | 150 ms | nothing: 20.0 ms | 7.50 | 300 ms (goal 150 ms) |",
        "| folding | 12.5 ms | copying: 10.0 ms | 1.25 |  |",
        "",
        "- `start`: A Processor, 2 cores, 8 GiB, load 0.25 before it; python 3.11.7, numpy 2.4.6; seed 7",
    ]


def test_table_prints_the_table_of_the_result_files(harness, benches):
    ended = python("-m", "benchmarks", "table")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == importlib.import_module("benchmarks.__main__").tables() + "\n"


def test_table_write_replaces_what_stands_between_the_markers_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(MARKED)
    assert python("-m", "benchmarks", "table", "--write", str(page)).returncode == 0
    made = python("-m", "benchmarks", "table").stdout
    assert page.read_text() == f"before\n<!-- benchmarks -->\n{made}<!-- /benchmarks -->\nafter\n"


def test_writing_the_table_twice_changes_nothing_the_second_time(harness, result):
    once = harness.replace_table(MARKED, harness.table({"start": result}))
    assert harness.replace_table(once, harness.table({"start": result})) == once


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no markers\n",
        "<!-- benchmarks -->\nno end\n",
        "<!-- /benchmarks -->\n<!-- benchmarks -->\n",
        MARKED + MARKED,
    ],
)
def test_a_page_without_one_pair_of_markers_is_left_as_it_is(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    ended = python("-m", "benchmarks", "table", "--write", str(page))
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"{page}: no place for the table")
    assert page.read_text() == text


def test_a_result_file_of_another_bench_is_refused(harness, tmp_path):
    shutil.copy(harness.RESULTS / "start.json", tmp_path / "fold.json")
    with pytest.raises(ValueError, match=r"fold\.json has schema hierfl\.bench_start/1"):
        harness.read_results(tmp_path, ["fold"])


def test_a_figure_is_held_against_its_limit(harness, result):
    assert [figure.is_within_limit for figure in result.figures] == [True, True]
    slow = harness.Figure(name="slow", cpu_s=0.31, beside="nothing", beside_cpu_s=0.02, limit_s=0.3)
    assert not slow.is_within_limit


def test_every_bench_still_runs():
    """On a small model and once each, in a process of its own: it swaps the kernels."""
    code = """
from benchmarks import bench_fold, bench_start
figures = bench_start.measure(1, repeats=1) + bench_fold.measure(1, num_values=300_000, repeats=1)
assert all(figure.cpu_s > 0 and figure.beside_cpu_s > 0 for figure in figures), figures
"""
    ended = python("-W", "error", "-c", code)
    assert ended.returncode == 0, ended.stderr


def test_the_readme_has_the_table_of_the_result_files(harness, benches):
    text = README.read_text()
    assert harness.replace_table(text, importlib.import_module("benchmarks.__main__").tables()) == text, (
        "python -m benchmarks table --write README.md"
    )
