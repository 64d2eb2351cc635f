"""``hierfl trace`` on files as processes write them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from hierfl import observe, spans
from hierfl.cli import run
from hierfl.cli.trace import describe, draw
from hierfl.observe import SPAN_COMMIT, SPAN_MERGE, SPAN_ROUND, SPAN_TRAIN, SPAN_UPLOAD
from hierfl.waterfall import waterfall

REGION = """
import sys
from pathlib import Path
from hierfl import observe
region, directory, offer = sys.argv[1:]
observe.configure(f"combiner.{region}", Path(directory))
for name in (observe.SPAN_CLIENT_WAIT, observe.SPAN_SEAL):
    with observe.remote_parent(offer), observe.span(name, region=region, num_sites=4):
        pass
observe.shutdown()
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One committed round of run 7f3a over eu and us, written by three processes."""
    directory = tmp_path_factory.mktemp("traces")
    observe.configure("controller", directory / "controller")
    with observe.span(SPAN_ROUND, run="7f3a", task="train", round=2, attempt=1) as whole:
        for region in ("eu", "us"):
            args = [sys.executable, "-c", REGION, region, str(directory / region), whole.traceparent]
            subprocess.run(args, check=True)
        with observe.span(SPAN_MERGE), observe.span(SPAN_COMMIT, model_version=2):
            pass
    observe.shutdown()
    return directory


@pytest.fixture
def directory(recorded: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(recorded, tmp_path / "traces")


def test_it_draws_every_region_and_says_the_slowest_leg_in_words(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["trace", "7f", "--dir", str(directory)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("run 7f3a, round 2: committed in ")
    assert err == ""
    for word in ("controller", "eu", "us", "client_wait", "seal", "merge", "commit", "━", "slowest leg: "):
        assert word in out
    assert "named spans cover " in out


def test_as_json_it_is_one_document(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trace", "7f3a", "2", "--dir", str(directory), "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "hierfl.trace/1"
    assert (document["run"], document["round"], document["outcome"]) == ("7f3a", 2, "committed")
    rows = {(row["region"], row["phase"]): row for row in document["rows"]}
    assert set(rows) == {(region, phase) for region in ("eu", "us") for phase in ("client_wait", "seal")} | {
        ("controller", "merge"),
        ("controller", "commit"),
    }
    assert all(0 <= row["start_s"] <= row["end_s"] <= document["seconds"] for row in rows.values())
    assert sum(leg["seconds"] for leg in document["path"]) == pytest.approx(document["seconds"], abs=1e-4)


def test_a_half_written_line_is_left_out_and_said(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (directory / "eu" / "traces" / "combiner.eu.jsonl").open("a") as file:
        file.write('{"trace": "0')
    assert run(["trace", "7f3a", "--dir", str(directory)]) == 0
    assert "1 lines or files could not be read and were left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["beef"], "no trace of run 'beef'; traced runs: 7f3a"),
        (["7f3a", "9"], "no trace of round '9'; there are 2 to 2"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(
    directory: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    assert run(["trace", *args, "--dir", str(directory)]) == 4
    assert words in capsys.readouterr().err


def test_without_any_traces_it_says_where_they_would_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["trace", "7f3a"]) == 4
    assert "name the folder that holds its traces with --dir" in capsys.readouterr().err
    assert run(["trace", "7f3a", "--dir", str(tmp_path)]) == 4
    assert "no process wrote a traces/*.jsonl below it" in capsys.readouterr().err


def line(name: str, start: float, end: float, **keys: str | int) -> spans.SpanLine:
    """A span of a round of 2.4 s."""
    region = keys.get("region")
    return spans.SpanLine(
        trace="a" * 32,
        span=f"{abs(hash((name, region))) % 2**60:016x}",
        parent="",
        name=name,
        kind="internal",
        process=f"client.{region}" if region else "controller",
        start_unix_ns=round(start * 1e9),
        end_unix_ns=round(end * 1e9),
        attributes=keys,
    )


def test_the_words_name_region_phase_and_time() -> None:
    flow = waterfall(
        [
            line(SPAN_ROUND, 0, 2.4, run="r", round=1),
            line(SPAN_TRAIN, 0.1, 2.0, region="us-east"),
            line(SPAN_UPLOAD, 2.0, 2.2, region="us-east"),
            line(SPAN_TRAIN, 0.1, 0.5, region="eu-west"),
            line(SPAN_MERGE, 2.2, 2.4),
        ]
    )
    assert describe(flow) == [
        "slowest leg: us-east spent 1.9 s of 2.4 s training",
        "named spans cover 95.8 % of the round",
    ]


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_bars_stand_where_the_time_went_and_fit_the_terminal(width: int) -> None:
    flow = waterfall(
        [
            line(SPAN_ROUND, 0, 10, run="r", round=1),
            line(SPAN_TRAIN, 0, 5, region="eu-west"),
            line(SPAN_UPLOAD, 5, 10, region="eu-west"),
            line(SPAN_MERGE, 9, 12),
        ]
    )
    console = Console(width=width, record=True, color_system=None)
    with console.capture() as capture:
        console.print(draw(flow, width))
    merge, train, upload = (row for row in capture.get().splitlines() if "━" in row)
    assert all(len(row) <= width for row in (merge, train, upload))
    assert train.index("━") < upload.index("━") < merge.index("━")
    assert train.rindex("━") < upload.index("━")
    assert abs(train.count("━") - upload.count("━")) <= 1
    assert merge.rindex("━") == upload.rindex("━")
