"""Two controllers as processes, one Redis: whichever is killed, frozen or full, no round is lost and no bit differs.

Combiners and clients are real and run in the test's loop. Each test ends with the bits of a run that nobody disturbed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import IO

import numpy as np
import pytest
from disks import small_disk
from federations import InProcess, job, noisy_app
from redises import RedisServer, make_redis

from combiners.settings import RegionSettings
from hierfl.cli.runs import follow
from hierfl.client.params import make_layout
from hierfl.config import load_federation
from hierfl.errors import NotTheLeader, Unreachable
from hierfl.failpoints import POINTS, VARIABLE
from hierfl.job import Arithmetic, Job, JobHead, RoundRules
from hierfl.local import serving
from hierfl.operator import connect
from hierfl.pki import Kit

__all__ = ["make_redis", "small_disk"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

REGIONS = {"eu": ["site-00", "site-01"], "us": ["site-02", "site-03"]}
ROUNDS = 4
LEASE_S = 6.0


class Gate:
    """Where clients wait in the round that a test disturbs. ``on_train`` is called on their threads."""

    def __init__(self) -> None:
        self.arrived = 0
        self._open = threading.Event()
        self._lock = threading.Lock()

    def on_train(self, seed: int) -> None:
        del seed
        with self._lock:
            self.arrived += 1
            waits = self.arrived > 4  # from the second round on
        if waits:
            assert self._open.wait(120)

    def open(self) -> None:
        self._open.set()

    async def until_round_two(self) -> None:
        async with asyncio.timeout(60):
            while self.arrived < 8:
                await asyncio.sleep(0.02)


class Process:
    """``hierfl controller serve`` on the shared folder."""

    def __init__(self, child: asyncio.subprocess.Process, ready: dict) -> None:
        self.child, self.address = child, ready["addresses"][0]
        self.stood_by = "stands" in ready

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.child.pid, number)


class TwoControllers(InProcess):
    """A federation whose controllers are processes. ``leader`` is the one that was started first."""

    leader: Process
    standby: Process
    stack: AsyncExitStack
    log: IO[bytes]

    def use(self, *processes: Process) -> None:
        self.leader, self.standby = processes
        self.controller = SimpleNamespace(address=tuple(each.address for each in processes))

    @asynccontextmanager
    async def operator(self):
        async with connect(Kit.load(self.kit("operators", "admin")), *self.controller.address) as operator:
            yield operator

    async def outcome(self, run):
        """A run once it has ended, whoever leads then."""
        async with asyncio.timeout(100):
            while True:
                with contextlib.suppress(Unreachable):
                    async with self.operator() as operator:
                        async for _ in operator.follow(run):
                            pass
                        found = await operator.run(run)
                        if found.summary.state in ("finished", "failed", "cancelled"):
                            return found

    async def asked(self, process: Process):
        """What one controller says of itself."""
        async with connect(Kit.load(self.kit("operators", "admin")), process.address) as operator:
            return await operator.status()


@asynccontextmanager
async def controller(
    federation: InProcess, redis: RedisServer, log, listen: str = "127.0.0.1:0", *more: str
) -> AsyncIterator[Process]:
    argv = ["-m", "hierfl", "controller", "serve", "--kit", federation.kit("controller"), "--listen", listen]
    argv += ["--dir", federation.directory / "controller", "--store", redis.url, *more]
    failpoints = {VARIABLE: str(federation.directory / "failpoints")}
    child = await asyncio.create_subprocess_exec(
        sys.executable, *map(str, argv), stdout=asyncio.subprocess.PIPE, stderr=log, env={**os.environ, **failpoints}
    )
    try:
        async with asyncio.timeout(60):
            line = await child.stdout.readline()
        yield Process(child, json.loads(line))
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()
        child._transport.close()


@pytest.fixture
def two(tmp_path, make_redis):
    """``async with two(app) as (federation, redis)``."""

    @asynccontextmanager
    async def start(app, redis=None) -> AsyncIterator[tuple[TwoControllers, RedisServer]]:
        redis = redis or make_redis()
        federation = TwoControllers(tmp_path / "two", REGIONS, 1, app, RegionSettings())
        federation.provision()
        (federation.directory / "failpoints").mkdir()
        async with AsyncExitStack() as stack:
            federation.stack = stack
            log = federation.log = stack.enter_context((tmp_path / "controllers.log").open("wb"))
            stack.callback(lambda: print((tmp_path / "controllers.log").read_text()))
            processes = [await stack.enter_async_context(controller(federation, redis, log)) for _ in range(2)]
            assert [each.stood_by for each in processes] == [False, True]
            federation.use(*processes)
            for region in REGIONS:
                await federation.start_combiner(stack, region)
                federation.start_clients(region)
            stack.push_async_callback(federation.stop_clients)
            yield federation, redis

    return start


@pytest.fixture
async def undisturbed(federate) -> list[str]:
    """Model hashes of a run of the same job with one controller and SQLite."""
    async with federate(REGIONS, app=noisy_app()) as federation:
        return checked(await federation.train(the_job()))


def the_job():
    return job(rounds=ROUNDS, min_regions=2, min_clients=2)


def checked(found) -> list[str]:
    """Every round committed once, at its first attempt, with every site; the hashes of its models."""
    assert found.summary.state == "finished", found.summary.reason
    trained = [item for item in found.rounds if item.task == 1]
    assert [(item.round, item.attempts, item.num_updates) for item in trained] == [
        (number, 1, 4) for number in range(1, ROUNDS + 1)
    ]
    return [item.model_hash for item in trained]


def report(**figures: object) -> None:
    print(json.dumps({name: round(value, 2) if isinstance(value, float) else value for name, value in figures.items()}))


async def until(reached: Callable[[], object], seconds: float = 30.0) -> float:
    """Seconds until another process has come so far."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while not reached():
            await asyncio.sleep(0.05)
    return time.monotonic() - began


def epoch_of(redis: RedisServer) -> int:
    return int(redis.command("HGET", "hierfl:{test-federation}:meta", "leader_epoch"))


def rows_of(redis: RedisServer) -> dict[str, str]:
    """Everything in the store but the lease, which is no row."""
    keys = redis.command("KEYS", "hierfl:*").splitlines()
    return {key: redis.command("DUMP", key) for key in sorted(keys) if not key.endswith(":lease")}


async def leads(federation: TwoControllers, process: Process, seconds: float = 40.0) -> float:
    """Seconds until this controller says that it leads."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(Unreachable):
                await federation.asked(process)
                return time.monotonic() - began
            await asyncio.sleep(0.1)


async def test_a_killed_leader_is_replaced_in_mid_round_and_no_round_is_lost(two, undisturbed):
    gate = Gate()
    async with two(noisy_app(on_train=gate.on_train)) as (federation, redis):
        run = await federation.submit(the_job())
        await gate.until_round_two()
        federation.leader.signal(signal.SIGKILL)
        gate.open()
        led_after = await leads(federation, federation.standby)
        began = time.monotonic()
        found = await federation.outcome(run)
        report(test="leader killed", led_after_s=led_after, run_ended_after_s=time.monotonic() - began)
        assert led_after < 15.0
        assert checked(found) == undisturbed
        assert epoch_of(redis) == 2


async def test_a_leader_that_thaws_after_its_lease_writes_nothing_and_is_obeyed_by_nobody(two, undisturbed):
    gate = Gate()
    async with two(noisy_app(on_train=gate.on_train)) as (federation, redis):
        run = await federation.submit(the_job())
        await gate.until_round_two()
        federation.leader.signal(signal.SIGSTOP)
        followed_after = await until(lambda: [known(each) for each in federation.combiners.values()] == [2, 2])
        rows = rows_of(redis)
        federation.leader.signal(signal.SIGCONT)
        assert str(await refusal(federation, federation.leader)).endswith(f"; {federation.standby.address} leads")
        assert rows_of(redis) == rows
        assert [known(combiner) for combiner in federation.combiners.values()] == [2, 2]
        gate.open()
        assert checked(await federation.outcome(run)) == undisturbed
        assert epoch_of(redis) == 2
        assert federation.leader.child.returncode is None  # it stands by, and takes over in its turn:
        federation.standby.signal(signal.SIGTERM)
        await federation.standby.child.wait()
        await leads(federation, federation.leader)
        report(test="leader frozen and thawed", regions_follow_the_next_after_s=followed_after)


async def refusal(federation: TwoControllers, process: Process) -> NotTheLeader:
    """What a controller answers with, once it knows that another leads, and which."""
    async with asyncio.timeout(30):
        while True:
            try:
                await federation.asked(process)
            except NotTheLeader as error:
                if error.leader:
                    return error
            except Unreachable:
                pass
            await asyncio.sleep(0.05)


def known(combiner) -> int:
    """Highest leader epoch that a region has seen."""
    return combiner.region.store.leader_epoch


async def test_a_killed_redis_that_is_started_again_costs_seconds(two, undisturbed):
    gate = Gate()
    async with two(noisy_app(on_train=gate.on_train)) as (federation, redis):
        run = await federation.submit(the_job())
        await gate.until_round_two()
        redis.kill()
        gate.open()
        await until(lambda: said(federation, "Redis"))
        redis.start()
        began = time.monotonic()
        while (await rounds_of(federation, run)) < 2:
            await asyncio.sleep(0.1)
        back_after = time.monotonic() - began
        report(test="Redis killed", next_round_after_s=back_after)
        assert back_after < 10.0
        assert checked(await federation.outcome(run)) == undisturbed


async def rounds_of(federation: TwoControllers, run: str) -> int:
    with contextlib.suppress(Unreachable):
        async with federation.operator() as operator:
            return (await operator.run(run)).summary.rounds_committed
    return 0


def said(federation: TwoControllers, words: str) -> bool:
    return words in (federation.directory.parent / "controllers.log").read_text()


async def test_a_frozen_redis_is_waited_for_and_calls_are_answered_within_three_seconds(two, undisturbed):
    gate = Gate()
    async with two(noisy_app(on_train=gate.on_train)) as (federation, redis):
        run = await federation.submit(the_job())
        await gate.until_round_two()
        redis.signal(signal.SIGSTOP)
        gate.open()
        frozen, slowest = time.monotonic(), 0.0
        while time.monotonic() < frozen + 12.0:
            began = time.monotonic()
            with contextlib.suppress(Unreachable):
                await federation.asked(federation.leader)
            slowest = max(slowest, time.monotonic() - began)
            await asyncio.sleep(0.1)
        with pytest.raises(NotTheLeader, match="waits for its store"):
            await federation.asked(federation.leader)
        redis.signal(signal.SIGCONT)
        began = time.monotonic()
        while (await rounds_of(federation, run)) < 2:
            await asyncio.sleep(0.1)
        report(test="Redis frozen for 12 s", slowest_call_s=slowest, next_round_after_s=time.monotonic() - began)
        assert slowest < 3.0
        assert checked(await federation.outcome(run)) == undisturbed


async def test_a_redis_without_memory_refuses_and_the_run_goes_on_once_there_is_some(two, undisturbed):
    gate = Gate()
    async with two(noisy_app(on_train=gate.on_train)) as (federation, redis):
        run = await federation.submit(the_job())
        await gate.until_round_two()
        redis.command("CONFIG", "SET", "maxmemory", "1")
        gate.open()
        await until(lambda: said(federation, "has no memory left: raise its `maxmemory`"))
        redis.command("CONFIG", "SET", "maxmemory", "0")
        assert checked(await federation.outcome(run)) == undisturbed


async def test_a_redis_whose_disk_is_full_ends_and_the_run_goes_on_once_there_is_room(
    two, undisturbed, make_redis, small_disk
):
    gate, disk = Gate(), small_disk()
    redis = make_redis("--auto-aof-rewrite-percentage 0", data=disk.path)
    async with two(noisy_app(on_train=gate.on_train), redis) as (federation, redis):
        run = await federation.submit(the_job())
        await gate.until_round_two()
        disk.fill()
        gate.open()
        await until(lambda: redis.process.poll() is not None)  # with `appendfsync always` it gives up
        await until(lambda: said(federation, "Redis at"))
        disk.free()
        redis.start()
        assert checked(await federation.outcome(run)) == undisturbed


async def test_a_wiped_redis_is_rebuilt_and_what_regions_hold_counts(two, undisturbed):
    gate = Gate()
    async with two(noisy_app(on_train=gate.on_train)) as (federation, redis):
        run = await federation.submit(the_job())
        await gate.until_round_two()
        redis.command("FLUSHALL")
        ended = await asyncio.gather(federation.leader.child.wait(), federation.standby.child.wait())
        assert ended == [1, 1]
        gate.open()
        listen = federation.leader.address
        first = await federation.stack.enter_async_context(
            controller(federation, redis, federation.log, listen, "--recover")
        )
        second = await federation.stack.enter_async_context(controller(federation, redis, federation.log))
        federation.use(first, second)
        async with federation.operator() as operator:
            (found,) = await operator.runs()
            assert (found.state, found.model_version) == ("paused", 1)
            assert await operator.resume(run) == "running"
        assert checked(await federation.outcome(run)) == undisturbed
        assert epoch_of(redis) > 1


NOT_HERE = {"controller.transaction", "store.volume", "store.run", "controller.ended"}
"""Of SQLite, of the first start, of a run's submission and of its end."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("action", ["kill", "freeze"])
async def test_a_leader_killed_or_frozen_at_any_point_costs_no_round_and_no_bit(two, federate, action):
    """One run; at each point the leader ends, or freezes and thaws once it has a successor."""
    points = [point for point in POINTS if point.startswith("controller.") and point not in NOT_HERE]
    seconds: dict[str, float] = {}
    async with two(noisy_app(delay_s=0.3)) as (federation, redis):
        run = await federation.submit(job(rounds=10_000, min_regions=2, min_clients=2, evaluate_every=0))
        for point in points:
            (federation.directory / "failpoints" / point).write_text(action)
            await until(lambda point=point: list((federation.directory / "failpoints").glob(f"{point}.*")), 60)
            ended, successor = federation.leader, federation.standby
            seconds[point] = await leads(federation, successor)
            if action == "freeze":
                ended.signal(signal.SIGCONT)
                assert (await refusal(federation, ended)).leader == successor.address
            else:
                assert await ended.child.wait() == -signal.SIGKILL
                ended = await federation.stack.enter_async_context(
                    controller(federation, redis, federation.log, ended.address)
                )
                assert ended.stood_by
            federation.use(successor, ended)
            before = await rounds_of(federation, run)
            while await rounds_of(federation, run) <= before:
                await asyncio.sleep(0.1)
        async with federation.operator() as operator:
            assert await operator.cancel(run) == "cancelled"
            found = await operator.run(run)
        assert epoch_of(redis) == 1 + len(points)
    assert [(item.round, item.attempts, item.num_updates) for item in found.rounds] == [
        (number, 1, 4) for number in range(1, len(found.rounds) + 1)
    ]
    report(test=f"leader: {action} at {len(points)} points", slowest_s=max(seconds.values()), rounds=len(found.rounds))
    async with federate(REGIONS, app=noisy_app()) as undisturbed:
        rules = job(rounds=len(found.rounds), min_regions=2, min_clients=2, evaluate_every=0)
        expected = await undisturbed.outcome(await undisturbed.submit(rules))
    trained = [item.model_hash for item in expected.rounds if item.task == 1]
    assert [item.model_hash for item in found.rounds] == trained


APP = """
import time
from pathlib import Path

import numpy as np

from hierfl.client import Update

GATE = Path(__file__).with_name("gate")


def init(config):
    return {"w": np.zeros(10, np.float32)}


def train(task):
    Path(__file__).with_name(f"arrived-{task.round}").touch()
    while task.round == 2 and not GATE.exists():
        time.sleep(0.05)  # an app knows of files only
    return Update({"w": task.params["w"] + 1}, num_examples=10)
"""


async def test_up_keeps_two_controllers_and_what_follows_a_run_goes_over_to_the_next(tmp_path, make_redis):
    redis, said = make_redis(), []
    (tmp_path / "app.py").write_text(APP)
    text = f'[federation]\nname = "test"\n\n[controller]\nstore = "{redis.url}"\nstandbys = 1\n\n'
    text += '[site]\napp = "app.py"\n\n[regions.eu]\nk = 2\nsites = 2\n'
    (tmp_path / "federation.toml").write_text(text)
    the_rules = RoundRules(min_regions=1, min_clients=2, report_timeout_s=60, silence_s=2, evaluate_every=0)
    wanted = Job(job=JobHead(name="test", app="app", rounds=3), round=the_rules, arithmetic=Arithmetic(k=2))
    config = load_federation(tmp_path / "federation.toml")
    async with (
        serving(config, tmp_path / ".hierfl", said.append) as federation,
        connect(Kit.load(federation.operator_kit), *federation.controller_addresses) as admin,
    ):
        layout, vectors = make_layout({"w": np.zeros(10, np.float32)})
        run = await admin.submit(wanted, await admin.upload_model(layout, vectors))
        following = asyncio.create_task(follow(admin, run))
        await until((tmp_path / "arrived-2").exists, 60)
        killed = federation.children["controller"]
        os.kill(killed.pid, signal.SIGKILL)
        await killed.exited()
        (tmp_path / "gate").touch()
        async with asyncio.timeout(60):
            assert (await following).state == "finished"
        assert admin.address == federation.controller_addresses[1]
        found, status = await admin.run(run), await admin.status()
        await until(lambda: "controller serves again" in said)
    assert [(item.attempts, item.num_updates) for item in found.rounds] == [(1, 2)] * 3
    assert status.leader_epoch == 2
