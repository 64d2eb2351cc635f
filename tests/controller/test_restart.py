"""A controller that dies and is started again: the run goes on, nothing is counted twice or lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager

import pytest

from controller.app import ControllerApp
from controller.rows import ModelRow
from hierfl.errors import DiskFull, PortInUse, StoreLocked, WireError
from hierfl.pki import Kit

DIES_BETWEEN_RECORD_AND_STORE = """
import asyncio, os, signal, sys
from pathlib import Path
from controller.app import ControllerApp
from hierfl.cli.serving import ready
from controller.rows import ModelRow
from controller.store import SqliteStore
from hierfl.pki import Kit

class Dying(SqliteStore):
    def write(self, epoch, *rows):
        if any(isinstance(row, ModelRow) and row.version == 2 for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(epoch, *rows)

async def main(kit, directory):
    open_store = lambda path, federation: Dying(path / "controller.sqlite", federation)
    async with ControllerApp(Kit.load(kit), Path(directory), open_store=open_store) as app:
        with ready("controller", None) as say_ready:
            say_ready([app.address])
        await app.failed()

asyncio.run(main(*sys.argv[1:]))
"""


@asynccontextmanager
async def process(federation, *argv):
    """A controller as a process, killed in the end; sets the federation's address."""
    child = await asyncio.create_subprocess_exec(sys.executable, *map(str, argv), stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(30):
            federation.address = json.loads(await child.stdout.readline())["addresses"][0]
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()
        child._transport.close()


def serve(federation, *more):
    kit, directory = federation.folder / "kits" / "controller", federation.directory
    return ("-m", "hierfl", "controller", "serve", "--kit", kit, "--dir", directory, *more)


async def reconnected(federation, old, **attach):
    """The same region again, on the controller's new address."""
    await old.close()
    return await federation.region(str(old.name), **attach)


async def test_a_killed_controller_goes_on_with_the_open_round_and_keeps_what_it_had(federation, job):
    async with process(federation, *serve(federation)) as child:
        operator = await federation.operator()
        eu, us = [await federation.region(name) for name in ("eu", "us")]
        run = await federation.submit(operator, job(2))
        await asyncio.gather(eu.answer(), us.answer())
        await asyncio.gather(eu.next("verdict"), us.next("verdict"))
        plan = await eu.answer()
        sent = eu.partial(plan).digest
        offer, before = await us.plan()
        assert offer.leader_epoch == 1
        child.send_signal(signal.SIGKILL)
        await child.wait()
    async with process(federation, *serve(federation)):
        operator = await federation.operator()
        key = offer.key
        eu = await reconnected(federation, eu, pending=[(key, sent)])
        us = await reconnected(federation, us)
        offer, after = await us.plan()
        assert (offer.leader_epoch, after) == (2, before)  # adopted: the same plan, signed under the new epoch
        await us.uplink(after, us.partial(after))
        await eu.next("offer")
        verdict = (await eu.next("verdict")).verdict
        assert (verdict.committed, verdict.partial_digest, verdict.leader_epoch) == (True, sent, 2)
        async with asyncio.timeout(10):
            last = [snapshot async for snapshot in operator.follow(run)][-1]
        assert (last.summary.state, last.summary.model_version) == ("finished", 2)
        assert [told.round for told in (await operator.run(run)).rounds] == [1, 2]


async def test_a_version_that_was_on_record_is_adopted_after_a_crash_before_the_store(federation, job):
    kit = federation.folder / "kits" / "controller"
    async with process(federation, "-c", DIES_BETWEEN_RECORD_AND_STORE, kit, federation.directory) as child:
        operator = await federation.operator()
        eu, us = [await federation.region(name) for name in ("eu", "us")]
        run = await federation.submit(operator, job(2))
        await asyncio.gather(eu.answer(), us.answer())
        await asyncio.gather(eu.next("verdict"), us.next("verdict"))
        plan, _ = await asyncio.gather(eu.answer(), us.answer())
        async with asyncio.timeout(10):
            assert await child.wait() == -signal.SIGKILL
    record = (federation.directory / "commits" / run / "2").read_bytes()
    async with federation.controller():
        operator = await federation.operator()
        eu = await reconnected(federation, eu, leader_epoch=1)
        verdict = (await eu.next("verdict")).verdict
        assert (verdict.committed, verdict.model_version) == (True, 2)
        assert verdict.partial_digest == eu.partial(plan).digest
        async with asyncio.timeout(10):
            last = [snapshot async for snapshot in operator.follow(run)][-1]
        assert (last.summary.state, last.summary.model_version) == ("finished", 2)
        assert (federation.directory / "commits" / run / "2").read_bytes() == record
        await federation.close()


async def test_a_region_learns_what_became_of_its_partial_after_the_run_has_ended(federation, job):
    async with federation.controller():
        operator = await federation.operator()
        eu, us = [await federation.region(name) for name in ("eu", "us")]
        run = await federation.submit(operator, job())
        offer, plan = await eu.plan()
        sent = eu.partial(plan)
        await asyncio.gather(eu.uplink(plan, sent), us.answer())
        await us.next("verdict")
        await federation.close()
    async with federation.controller():
        other = type(offer.key)(run="another", task=1, round=1, attempt=1)
        eu = await federation.region("eu", pending=[(offer.key, sent.digest), (other, sent.digest)])
        verdict = (await eu.next("verdict")).verdict
        assert (verdict.committed, verdict.partial_digest, verdict.key.run) == (True, sent.digest, run)
        verdict = (await eu.next("verdict")).verdict
        assert (verdict.committed, verdict.reason) == (False, "unknown_attempt")
        await federation.close()


async def test_a_cancelled_or_paused_run_stays_so_over_a_restart(federation, job):
    async with federation.controller():
        operator = await federation.operator()
        cancelled, waiting = [await federation.submit(operator, job()) for _ in range(2)]
        assert await operator.cancel(cancelled) == "cancelled"
        assert await operator.cancel(cancelled) == "cancelled"
        assert await operator.resume(waiting) == "running"
        await federation.close()
    async with federation.controller() as app:
        operator = await federation.operator()
        states = {summary.run: summary.state for summary in await operator.runs()}
        assert states == {cancelled: "cancelled", waiting: "running"}
        assert (await operator.status()).leader_epoch == app.leader.epoch == 2
        await federation.close()


async def test_a_cancelled_run_keeps_the_version_that_was_on_record(federation, job, monkeypatch):
    async with federation.controller() as app:
        operator = await federation.operator()
        eu, us = [await federation.region(name) for name in ("eu", "us")]
        write = app.leader.store.write

        def full(epoch, *rows):
            if any(isinstance(row, ModelRow) and row.version == 1 for row in rows):
                raise DiskFull("no space left")
            write(epoch, *rows)

        monkeypatch.setattr(app.leader.store, "write", full)
        run = await federation.submit(operator, job(2))
        plan, _ = await asyncio.gather(eu.answer(), us.answer())
        await federation.until(operator, run, lambda s: s.summary.state == "paused")
        monkeypatch.undo()
        assert await operator.cancel(run) == "cancelled"
        verdict = (await eu.next("verdict")).verdict
        assert (verdict.committed, verdict.partial_digest) == (True, eu.partial(plan).digest)
        assert (await operator.run(run)).summary.model_version == 1
        await federation.close()


async def test_a_region_whose_store_forgot_its_partial_is_not_asked_for_a_second_sum(federation, job, caplog):
    async with federation.controller():
        operator = await federation.operator()
        eu, us = [await federation.region(name) for name in ("eu", "us")]
        await federation.submit(operator, job())
        plan = await eu.answer()
        _, theirs = await us.plan()
        await eu.close()
        eu = await federation.region("eu", store_id="another")
        assert f"region eu does not know of its partial {eu.partial(plan).digest}" in caplog.text
        await us.uplink(theirs, us.partial(theirs))
        verdict = (await eu.next("verdict")).verdict  # and no offer before it
        assert (verdict.committed, verdict.partial_digest) == (True, eu.partial(plan).digest)
        await federation.close()


async def test_no_region_can_use_up_the_leader_epochs(federation, job):
    async with federation.controller() as app:
        with pytest.raises(WireError, match="out of range"):
            await federation.region("eu", leader_epoch=2**62)
        assert app.leader.epoch == 1
        await federation.region("eu", leader_epoch=1000)
        assert app.leader.epoch == 1001
        await federation.close()


async def test_a_damaged_blob_pauses_the_run_and_says_what_to_restore(federation, job):
    async with federation.controller():
        operator = await federation.operator()
        run = await federation.submit(operator, job())
        model = (await operator.models(run))[0]
        await federation.close()
    path = federation.directory / "blobs" / "models" / model.model_hash
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    async with federation.controller():  # one that has no model in memory
        operator = await federation.operator()
        eu, us = [await federation.region(name) for name in ("eu", "us")]
        await asyncio.gather(eu.answer(), us.answer())
        snapshot = await federation.until(operator, run, lambda s: s.summary.state == "paused")
        assert "is damaged; restore it" in snapshot.summary.reason
        path.write_bytes(whole)
        assert await operator.resume(run) == "running"
        async with asyncio.timeout(10):
            last = [snapshot async for snapshot in operator.follow(run)][-1]
        assert last.summary.state == "finished"
        await federation.close()


async def test_serve_says_where_it_listens_and_leaves_cleanly_on_sigterm(federation, tmp_path):
    ready = tmp_path / "ready" / "controller.json"
    async with process(federation, *serve(federation, "--ready-file", ready)) as child:
        document = json.loads(ready.read_text())
        assert document == {
            "schema": "hierfl.ready/1",
            "role": "controller",
            "addresses": [federation.address],
            "pid": child.pid,
        }
        operator = await federation.operator()
        assert (await operator.status()).federation == "fed"
        child.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await child.wait() == 0
        assert not ready.exists()
        assert await child.stdout.read() == b""


async def test_a_second_controller_is_refused_its_directory_and_its_port(federation, tmp_path):
    kit = federation.kit("controller")
    async with federation.controller() as app:
        with pytest.raises(StoreLocked):
            async with ControllerApp(kit, federation.directory):
                pass
        with pytest.raises(PortInUse):
            async with ControllerApp(kit, tmp_path / "other", app.address):
                pass


async def test_bad_starts_are_one_line_and_an_exit_code(federation, tmp_path):
    for more, code, words in (
        (("--kit", tmp_path / "none", "--dir", tmp_path / "d"), 3, b"kit"),
        (("--kit", federation.folder / "kits" / "operators" / "olga", "--dir", tmp_path / "d"), 3, b"operator olga"),
        (("--dir", tmp_path / "d"), 2, b"--kit"),
    ):
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            *map(str, ("-m", "hierfl", "controller", "serve", *more)),
            stderr=asyncio.subprocess.PIPE,
            env={k: v for k, v in os.environ.items() if not k.startswith("HIERFL_")},
        )
        _, said = await child.communicate()
        assert (child.returncode, words in said, b"Traceback" in said) == (code, True, False), said


def test_the_kit_of_a_region_does_not_make_a_controller(federation, tmp_path):
    kit = Kit.load(federation.folder / "kits" / "regions" / "eu" / "combiner")
    with pytest.raises(Exception, match="not of the controller"):
        ControllerApp(kit, tmp_path)
