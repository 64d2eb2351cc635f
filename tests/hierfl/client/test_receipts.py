"""`hierfl client receipts`: what became of each update, as the site keeps it and as its combiner says now."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hierfl.client.receiptlog import FILE, HELD_TOO_LONG, UNKNOWN_THERE, read_log
from hierfl.failpoints import VARIABLE
from hierfl.plan import Plan
from hierfl.receipts import ReceiptState

MakePlan = Callable[..., Plan]
SEALED, COMMITTED, NOT_COUNTED = ReceiptState.SEALED, ReceiptState.COMMITTED, ReceiptState.NOT_COUNTED


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something on the client's side that the combiner does not see."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def receipts(run: str, *arguments: object) -> tuple[int | None, str, str]:
    pipe, command = asyncio.subprocess.PIPE, [sys.executable, "-m", "hierfl", "client", "receipts", run]
    process = await asyncio.create_subprocess_exec(*command, *map(str, arguments), stdout=pipe, stderr=pipe)
    async with asyncio.timeout(40):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


def log_of(directory: Path) -> list[tuple[int, int, str, int, str]]:
    """Round, attempt, state, version and reason of every line."""
    lines = [one for path in directory.glob(f"*/{FILE}") for one in read_log(path)]
    return [(one.key.round, one.key.attempt, one.state, one.version, one.reason) for one in lines]


async def counted(combiner: Any, plan: Plan, version: int) -> None:
    """One round, from the offer to the last word."""
    combiner.offers.clear()
    before = len(combiner.received)
    combiner.offer(plan)
    await combiner.until(lambda: len(combiner.received) > before)
    combiner.tell(replace(combiner.book[combiner.received[-1].key], state=COMMITTED, version=version))


async def test_each_update_is_there_with_its_last_word_also_those_that_are_gone(
    combiner: Any, running: Any, plan: MakePlan
) -> None:
    kit, directory = combiner.federation.client_kit(), running.directory
    async with running():
        await combiner.until(lambda: "Follow" in combiner.calls)
        await counted(combiner, plan(), 1)
        await counted(combiner, plan(round=2), 2)
        await until(lambda: "counted in model version 2" in running.said)
        combiner.offers.clear()
        combiner.offer(plan(round=3))
        await combiner.until(lambda: len(combiner.received) == 3)
        combiner.tell(replace(combiner.book[combiner.received[-1].key], state=SEALED))
        await until(lambda: "sealed" in running.said)
        code, out, _ = await receipts("run-1", "--kit", kit, "--dir", directory, "-o", "json")  # beside the client
    assert code == 0
    document = json.loads(out)
    assert document["schema"] == "hierfl.client_receipts/1"
    found = [(one["round"], one["state"], one["version"], one["held"], one["asked"]) for one in document["receipts"]]
    assert found == [
        (1, "committed", 1, False, "committed"),
        (2, "committed", 2, False, "committed"),
        (3, "sealed", 0, True, "sealed"),
    ]
    assert [one["digest"] for one in document["receipts"]] == [update.digest for update in combiner.received]
    code, out, _ = await receipts("run-1", "--offline", "--dir", directory)
    assert (code, "committed 2" in out, "offered" in out) == (0, True, True)


async def test_a_run_that_left_nothing_here_is_said_with_those_that_did(
    combiner: Any, running: Any, plan: MakePlan, tmp_path: Path
) -> None:
    async with running():
        await combiner.until(lambda: "Follow" in combiner.calls)
        await counted(combiner, plan(), 1)
        await until(lambda: "counted" in running.said)
    code, _, err = await receipts("digits-000000", "--offline", "--dir", running.directory)
    assert (code, "HFL-110" in err, "run-1" in err) == (4, True, True)
    code, _, err = await receipts("run-1", "--offline", "--dir", tmp_path / "nothing")
    assert code == 4


async def test_a_combiner_that_cannot_be_reached_is_said_and_what_is_kept_is_shown(
    combiner: Any, running: Any, plan: MakePlan
) -> None:
    async with running():
        await combiner.until(lambda: "Follow" in combiner.calls)
        await counted(combiner, plan(), 1)
        await until(lambda: "counted" in running.said)
    await combiner.stop()
    kit = combiner.federation.client_kit()
    code, out, err = await receipts("run-1", "--kit", kit, "--dir", running.directory)
    assert (code, "committed 1" in out, "was not asked" in err) == (0, True, True)


async def test_a_combiner_that_takes_its_last_word_back_is_a_mismatch(
    combiner: Any, running: Any, plan: MakePlan
) -> None:
    async with running():
        await combiner.until(lambda: "Follow" in combiner.calls)
        await counted(combiner, plan(), 1)
        await until(lambda: "counted" in running.said)
    key = combiner.received[0].key
    combiner.book[key] = replace(combiner.book[key], state=NOT_COUNTED, version=0, reason="late")
    kit = combiner.federation.client_kit()
    code, _, err = await receipts("run-1", "--kit", kit, "--dir", running.directory)
    assert (code, "the combiner says not_counted late, it had said committed 1" in err) == (8, True)


async def test_an_update_that_was_not_counted_in_one_attempt_and_was_in_the_next_has_a_line_for_each(
    combiner: Any, running: Any, plan: MakePlan
) -> None:
    async with running():
        await combiner.until(lambda: "Follow" in combiner.calls)
        combiner.offer(plan())
        await combiner.until(lambda: combiner.received)
        combiner.tell_all(NOT_COUNTED, reason="too_few_sites")
        await until(lambda: "not counted" in running.said)
        await counted(combiner, plan(attempt=2), 1)
        await until(lambda: "counted in model version 1" in running.said)
    assert log_of(running.directory) == [(1, 1, "not_counted", 0, "too_few_sites"), (1, 2, "committed", 1, "")]


async def test_an_update_that_the_region_never_had_is_given_up_once_the_run_has_moved_on(
    combiner: Any, running: Any, plan: MakePlan
) -> None:
    async with running():
        await combiner.until(lambda: "Follow" in combiner.calls)
        combiner.offer(plan())
        await combiner.until(lambda: combiner.received)
        combiner.book.clear()  # its intake died with it, and the attempt was over before it was asked again
        await counted(combiner, plan(round=2), 2)
        await until(lambda: "counted in model version 2" in running.said)
        await until(lambda: "has no receipt of its update; dropped" in running.said)
    assert sorted(log_of(running.directory)) == [(1, 1, "offered", 0, UNKNOWN_THERE), (2, 1, "committed", 2, "")]
    assert not list(running.directory.rglob("updates/*"))


@pytest.mark.parametrize("state", [SEALED, COMMITTED])
async def test_an_update_that_the_region_has_is_not_given_up(
    combiner: Any, running: Any, plan: MakePlan, state: ReceiptState
) -> None:
    async with running():
        await combiner.until(lambda: "Follow" in combiner.calls)
        combiner.offer(plan())
        await combiner.until(lambda: combiner.received)
        key = combiner.received[0].key
        version = 1 if state is COMMITTED else 0
        combiner.book[key] = replace(combiner.book[key], state=state, version=version)  # said to nobody yet
        await counted(combiner, plan(round=2), 2)
        words = "counted in model version 1" if version else "round 1: sealed"
        await until(lambda: words in running.said)
    assert (1, 1, "offered", 0, UNKNOWN_THERE) not in log_of(running.directory)


async def test_an_update_held_too_long_leaves_a_line_that_says_so(combiner: Any, running: Any, plan: MakePlan) -> None:
    combiner.offer(plan(hold_s=0.0))
    async with running():
        await combiner.until(lambda: combiner.received)
    combiner.offers.clear()
    async with running():
        await until(lambda: "without a last word; dropped" in running.said)
    assert [(one[0], one[4]) for one in log_of(running.directory)] == [(1, HELD_TOO_LONG)]


async def test_a_client_that_dies_between_its_log_and_its_update_acts_on_the_last_word_again(
    combiner: Any, plan: MakePlan, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "client.logged").write_text("kill")
    kit, directory = combiner.federation.client_kit(), tmp_path / "d"
    options = ("--kit", kit, "--dir", directory, "--max-rounds", "1")
    combiner.offer(plan())
    died = await started(tmp_path, "client", "run", tmp_path / "app.py", *options)
    await combiner.until(lambda: combiner.received)
    combiner.tell_all(COMMITTED, version=1)
    async with asyncio.timeout(30):
        assert await died.wait() == -signal.SIGKILL
    assert log_of(directory) == [(1, 1, "committed", 1, "")]
    assert list(directory.rglob("updates/*.json"))
    combiner.offers.clear()
    again = await started(tmp_path, "client", "run", tmp_path / "app.py", *options)
    async with asyncio.timeout(30):
        assert await again.wait() == 0
    assert not list(directory.rglob("updates/*"))
    code, out, _ = await receipts("run-1", "--kit", kit, "--dir", directory, "-o", "json")
    found = [(one["round"], one["state"], one["version"], one["held"]) for one in json.loads(out)["receipts"]]
    assert (code, found) == (0, [(1, "committed", 1, False)])


APP = """
import numpy as np
from hierfl.client import Update
NAME = "linear"
def init(config):
    return {"w": np.ones(3, np.float32), "b": np.zeros((), np.float32), "steps": np.array(10)}
def train(task):
    return Update({"w": task.params["w"] + 1, "b": task.params["b"]}, num_examples=7)
"""


async def started(folder: Path, *arguments: object) -> asyncio.subprocess.Process:
    """A command whose failpoints are in ``folder``."""
    environment, nowhere = {**os.environ, VARIABLE: str(folder / "points")}, asyncio.subprocess.DEVNULL
    command = [sys.executable, "-m", "hierfl", *map(str, arguments)]
    return await asyncio.create_subprocess_exec(*command, env=environment, stdout=nowhere, stderr=nowhere)
