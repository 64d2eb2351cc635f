"""The main job, by its own command line: real processes, real Ray, PyTorch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@contextmanager
def demo(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hierfl", "demo", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.terminate()  # it ends what it started; over already, this does nothing


def report_of(folder: Path, *options: str) -> dict:
    with demo(folder, "-o", "json", *options) as process:
        out, talk = process.communicate(timeout=250)
    assert process.returncode == 0, talk
    return json.loads(out)


def test_every_grouping_of_the_same_sites_prints_the_same_hash(tmp_path):
    groupings = ((1, 12, 1), (3, 4, 1), (6, 2, 1), (3, 4, 2))
    found = {}
    for regions, clients, intakes in groupings:
        options = (f"--regions={regions}", f"--clients-per-region={clients}", f"--intakes={intakes}", "--rounds=2")
        report = report_of(tmp_path, *options, "--no-baselines")
        assert report["rounds"] == {"committed": 2, "abandoned": 0}
        assert [region["clients"] for region in report["regions"]] == [clients] * regions
        found[regions, clients, intakes] = report["model_sha256"]
    assert len(set(found.values())) == 1, found


def test_the_demo_comes_within_two_points_of_pooled_training_and_beats_every_region(tmp_path):
    report = report_of(tmp_path, "--keep", "kept")
    accuracy = report["accuracy"]
    assert report["schema"] == "hierfl.demo/1"
    assert accuracy["federated"] >= accuracy["pooled"] - 0.02
    assert all(accuracy["federated"] > alone for alone in accuracy["regions"].values())
    assert (tmp_path / "kept" / "curves.png").read_bytes().startswith(b"\x89PNG")
    drawn = subprocess.run(
        [sys.executable, "-m", "hierfl", "trace", report["run"], "--dir", "kept"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(region["name"] in drawn.stdout for region in report["regions"])


def test_one_client_a_region_is_refused_with_exit_5(tmp_path):
    with demo(tmp_path, "--clients-per-region=1") as process:
        _, talk = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "HFL-211" in talk


def test_ctrl_c_leaves_no_process_no_folder_and_exits_130(tmp_path):
    with demo(tmp_path, "--keep", "kept") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "combiners starting" in line:
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 130
    left = [p for p in psutil.process_iter() if str(tmp_path) in " ".join(_command(p))]
    assert left == []
    assert not (tmp_path / "kept").exists()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
