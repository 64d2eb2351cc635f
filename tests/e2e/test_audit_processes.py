"""The audit and the receipts of a site beside real processes, each region with its own Ray, and after their end."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hierfl.client.params import make_layout
from hierfl.config import load_federation
from hierfl.job import Arithmetic, Job, JobHead, RoundRules
from hierfl.local import serving
from hierfl.operator import connect
from hierfl.pki import Kit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

APP = """
import numpy as np

from hierfl.client import Update


def init(config):
    return {"w": np.zeros(10, np.float32)}


def train(task):
    return Update({"w": task.params["w"] + 1}, num_examples=10)
"""
FEDERATION = """
[federation]
name = "test"
[site]
app = "app.py"
[regions.eu]
k = 2
sites = ["eu-a", "eu-b"]
[regions.us]
k = 2
sites = ["us-a", "us-b"]
"""
ROUNDS = 4


async def hierfl(folder: Path, *arguments: str) -> tuple[int | None, dict[str, Any], str]:
    """A command in the federation's folder, as its user runs it."""
    pipe, command = asyncio.subprocess.PIPE, [sys.executable, "-m", "hierfl", *arguments, "-o", "json"]
    process = await asyncio.create_subprocess_exec(*command, cwd=folder, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    return process.returncode, json.loads(out or b"{}"), err.decode()


async def test_a_federation_of_processes_is_audited_while_it_runs_and_when_it_has_ended(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "federation.toml").write_text(FEDERATION)
    wanted = Job(
        job=JobHead(name="test", app="app", rounds=ROUNDS),
        round=RoundRules(min_regions=2, min_clients=2, report_timeout_s=60, silence_s=2, evaluate_every=0),
        arithmetic=Arithmetic(k=2),
    )
    said: list[str] = []
    config = load_federation(tmp_path / "federation.toml")
    async with (
        serving(config, tmp_path / ".hierfl", said.append) as federation,
        connect(Kit.load(federation.operator_kit), federation.controller_address) as admin,
    ):
        layout, vectors = make_layout({"w": np.zeros(10, np.float32)})
        run = await admin.submit(wanted, await admin.upload_model(layout, vectors))
        async with asyncio.timeout(60):
            async for snapshot in admin.follow(run):
                if snapshot.HasField("committed"):
                    break
        code, found, err = await hierfl(tmp_path, "audit", run)
        assert (code, found["ok"]) == (0, True), found["wrong"] or err
        async with asyncio.timeout(60):
            async for _ in admin.follow(run):
                pass
        assert (await admin.run(run)).summary.state == "finished"
        code, told, err = await hierfl(tmp_path, "client", "receipts", run)
        assert code == 0, err
        assert {(one["round"], one["asked"]) for one in told["receipts"]} == {
            (number, "committed") for number in range(1, ROUNDS + 1)
        }
        assert len(told["receipts"]) == 4 * ROUNDS
    code, found, err = await hierfl(tmp_path, "audit", run, "--replay")
    assert (code, found["wrong"]) == (0, []), err
    assert found["controller"]["replayed"] == ROUNDS
    weights = {int(version): weight for version, weight in found["controller"]["weights"].items()}
    assert weights == dict.fromkeys(range(1, ROUNDS + 1), 40)
    code, told, _ = await hierfl(tmp_path, "client", "receipts", run, "--offline")
    assert (code, {one["state"] for one in told["receipts"]}) == (0, {"committed"})
