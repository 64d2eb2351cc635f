"""`hierfl client` as a process: it ends cleanly on a signal, and says what is wrong in one line."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

APP = """
import numpy as np, sys, time
from hierfl.client import Update
NAME = "linear"
def init(config):
    return {"w": np.ones(3, np.float32), "b": np.zeros((), np.float32), "steps": np.array(10)}
def train(task):
    if "block" in task.site_config:
        print("blocking", flush=True)
        time.sleep(3600)  # user code that nobody can interrupt
    return Update({"w": task.params["w"] + 1, "b": task.params["b"]}, num_examples=7)
"""


@pytest.fixture
def app(tmp_path: Path) -> str:
    (tmp_path / "app.py").write_text(APP)
    return str(tmp_path / "app.py")


async def hierfl(*arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hierfl", *arguments, stdout=pipe, stderr=pipe, stdin=asyncio.subprocess.DEVNULL
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_a_client_process_serves_rounds_and_leaves_after_the_last(
    combiner: Any, plan: Callable[..., Any], app: str, tmp_path: Path
) -> None:
    from hierfl.receipts import ReceiptState

    combiner.offer(plan())
    kit = str(combiner.federation.client_kit())
    process = await hierfl("client", "run", app, "--kit", kit, "--dir", str(tmp_path / "d"), "--max-rounds", "1")
    await combiner.until(lambda: combiner.received)
    combiner.tell_all(ReceiptState.COMMITTED, version=1)
    code, out, err = await ended(process)
    assert (code, out) == (0, "")
    assert "round 1: trained on 7 examples" in err
    assert "counted in model version 1" in err
    assert list((tmp_path / "d" / "traces").glob("client.site-00.client-00*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_client_that_trains_and_tells_the_combiner_not_to_wait(
    combiner: Any, plan: Callable[..., Any], app: str, tmp_path: Path, number: signal.Signals
) -> None:
    combiner.offer(plan())
    kit = str(combiner.federation.client_kit())
    process = await hierfl("client", "run", app, "--kit", kit, "--dir", str(tmp_path / "d"), "--set", "block=1")
    assert process.stdout is not None
    async with asyncio.timeout(20):
        assert await process.stdout.readline() == b"blocking\n"
    process.send_signal(number)
    code, _, err = await ended(process)
    assert code == 130
    assert [code for _, code in combiner.declined] == ["stopping"]
    assert "Traceback" not in err


async def test_check_tells_what_is_fine_and_what_is_not(combiner: Any, app: str, tmp_path: Path) -> None:
    kit = str(combiner.federation.client_kit())
    code, out, err = await ended(await hierfl("client", "check", app, "--kit", kit))
    assert (code, err) == (0, "")
    assert [line.split(":")[0].split() for line in out.splitlines()] == [
        ["ok", name] for name in ("app", "model", "round", "kit", "combiner")
    ]
    await combiner.stop()
    code, out, _ = await ended(await hierfl("client", "check", app, "--kit", kit, "-o", "json", "--no-train"))
    assert code == 6
    document = json.loads(out)
    assert document["schema"] == "hierfl.client_check/1"
    assert [(finding["name"], finding["ok"]) for finding in document["findings"]][-1] == ("combiner", False)
    assert "127.0.0.1" in document["findings"][-1]["words"]


async def test_what_the_operator_got_wrong_is_said_in_a_line(app: str, tmp_path: Path) -> None:
    kit = str(tmp_path / "nothing")
    for arguments, code, words in [
        (("check", str(tmp_path / "none.py")), 3, "there is no app file"),
        (("run", app, "--kit", kit), 3, "is no kit"),
        (("run", app, "--kit", kit, "--set", "data"), 3, "must be KEY=VALUE"),
        (("run", app), 2, "Missing option '--kit'"),
    ]:
        found, out, err = await ended(await hierfl("client", *arguments))
        assert (found, words in out + err) == (code, True), out + err


async def test_check_shows_the_author_where_the_app_fails(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(APP.replace("NAME =", "X =").replace("num_examples=7", "num_examples=oops"))
    code, out, _ = await ended(await hierfl("client", "check", str(tmp_path / "bad.py")))
    assert code == 3
    assert "train raised NameError: name 'oops' is not defined" in out
    assert 'bad.py", line 11, in train' in out
