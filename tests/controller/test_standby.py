"""Two controllers on one Redis and one folder: one leads, the other takes over, and neither says what it may not."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager, suppress

import pytest
from redises import make_redis

from controller.app import ControllerApp
from controller.redis_options import RedisOptions
from controller.volume import MARKER, require_shared
from hierfl.errors import ConfigError, NotTheLeader, StoreDamaged
from hierfl.operator import connect
from hierfl.wire.convert import key_to_proto

__all__ = ["make_redis"]

LEASE_S = 0.6


@pytest.fixture
def redis(make_redis):
    return make_redis()


def opener(redis, lease_s=LEASE_S):
    def open_store(directory, federation):
        from controller.store_redis import RedisStore

        store = RedisStore(RedisOptions(url=redis.url), federation, lease_s=lease_s)
        require_shared(directory, store)
        return store

    return open_store


@pytest.fixture
def serving(federation, redis):
    """``async with serving() as app``: one more controller."""

    @asynccontextmanager
    async def serve(directory=None, **options) -> AsyncIterator[ControllerApp]:
        made = ControllerApp(
            federation.kit("controller"), directory or federation.directory, open_store=opener(redis, **options)
        )
        async with made as app:
            yield app

    return serve


async def until(reached, seconds=10.0):
    """Wait until something of another process, or of another clock, has come about."""
    async with asyncio.timeout(seconds):
        while not reached():
            await asyncio.sleep(0.02)


async def test_one_leads_and_the_other_says_who(federation, serving):
    async with serving() as one, serving() as two:
        assert (one.leads, two.leads) == (True, False)
        federation.address = two.address
        with pytest.raises(NotTheLeader, match=f"stands by; {one.address} leads"):
            await federation.region("eu")
        with pytest.raises(NotTheLeader):
            async with asyncio.timeout(5), connect(federation.kit("operators", "olga"), two.address):
                pass
        async with connect(federation.kit("operators", "olga"), two.address, one.address) as operator:
            assert operator.address == one.address
            assert (await operator.status()).leader_epoch == 1
        await federation.close()


async def test_the_stand_by_takes_up_the_open_round_when_the_leader_leaves(federation, serving, job):
    async with serving() as one:
        federation.address = one.address
        operator = await federation.operator()
        eu, us = [await federation.region(name) for name in ("eu", "us")]
        run = await federation.submit(operator, job(2))
        await asyncio.gather(eu.answer(), us.answer())
        await asyncio.gather(eu.next("verdict"), us.next("verdict"))
        plan = await eu.answer()
        sent = eu.partial(plan)
        _, before = await us.plan()
        async with serving() as two:
            await federation.close()
            await one.__aexit__(None, None, None)
            await until(lambda: two.leads)
            federation.address = two.address
            operator = await federation.operator()
            key = key_to_proto(plan.key)
            eu = await federation.region("eu", pending=[(key, sent.digest)], leader_epoch=1)
            us = await federation.region("us", leader_epoch=1)
            offer, after = await us.plan()
            assert (offer.leader_epoch, after) == (2, before)
            await us.uplink(after, us.partial(after))
            await eu.next("offer")
            verdict = (await eu.next("verdict")).verdict
            assert (verdict.committed, verdict.partial_digest, verdict.leader_epoch) == (True, sent.digest, 2)
            async with asyncio.timeout(10):
                last = [snapshot async for snapshot in operator.follow(run)][-1]
            assert (last.summary.state, last.summary.model_version) == ("finished", 2)
            await federation.close()


async def test_a_frozen_redis_makes_the_leader_wait_and_it_leads_again_from_what_is_there(
    federation, serving, redis, job
):
    async with serving() as app:
        federation.address = app.address
        operator = await federation.operator()
        eu, us = [await federation.region(name) for name in ("eu", "us")]
        run = await federation.submit(operator, job(1))
        await eu.answer()
        offer, plan = await us.plan()
        redis.signal(signal.SIGSTOP)
        with pytest.raises(Exception, match=r"store|stands by|stepped down|ended|closed"):
            await us.uplink(plan, us.partial(plan))
        await until(lambda: not app.leads)
        redis.signal(signal.SIGCONT)
        await until(lambda: app.leads)
        await federation.close()
        operator = await federation.operator()
        eu, us = [await federation.region(name, leader_epoch=1) for name in ("eu", "us")]
        again, after = await us.plan()
        assert after == plan
        assert again.leader_epoch > offer.leader_epoch
        await us.uplink(after, us.partial(after))
        async with asyncio.timeout(10):
            last = [snapshot async for snapshot in operator.follow(run)][-1]
        assert (last.summary.state, last.summary.model_version) == ("finished", 1)
        await federation.close()


async def test_a_redis_without_memory_is_waited_for(federation, serving, redis, job):
    async with serving() as app:
        federation.address = app.address
        operator = await federation.operator()
        redis.command("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(Exception, match="store"):
            await federation.submit(operator, job(1))
        await until(lambda: not app.leads)
        await federation.close()
        with pytest.raises(NotTheLeader, match="waits for its store"):
            async with connect(federation.kit("operators", "olga"), app.address):
                pass
        redis.command("CONFIG", "SET", "maxmemory", "0")
        await until(lambda: app.leads)
        operator = await federation.operator()
        await federation.submit(operator, job(1))
        await federation.close()


async def test_a_wiped_redis_ends_the_controller_and_the_folder_does_not_take_to_the_new_store(
    federation, serving, redis
):
    async with serving() as app:
        redis.command("FLUSHALL")
        with pytest.raises(StoreDamaged, match="wiped"):
            async with asyncio.timeout(10):
                await app.failed()
    with pytest.raises(StoreDamaged, match="belongs to store"):
        async with serving():
            pass


async def test_a_wiped_redis_is_rebuilt_from_records_and_the_run_goes_on_once_resumed(
    federation, serving, redis, job, caplog
):
    async with serving() as app:
        federation.address = app.address
        operator = await federation.operator()
        eu, us = [await federation.region(name) for name in ("eu", "us")]
        done = await federation.submit(operator, job(1))
        await asyncio.gather(eu.answer(), us.answer())
        await asyncio.gather(eu.next("verdict"), us.next("verdict"))
        run = await federation.submit(operator, job(3))
        lost = []
        for _ in range(2):
            plan, _ = await asyncio.gather(eu.answer(), us.answer())
            lost.append(eu.partial(plan).digest.partition(":")[2])
            await asyncio.gather(eu.next("verdict"), us.next("verdict"))
        plan = await eu.answer()  # what it sent is lost with the store; the region has it
        sent = eu.partial(plan)
        _, open_plan = await us.plan()
        (federation.directory / "commits" / "undescribed").mkdir()
        before = [(await operator.run(each)).rounds for each in (done, run)]
        models = {each.version: each.model_hash for each in await operator.models(run)}
        await federation.close()
    redis.command("FLUSHALL")
    with pytest.raises(StoreDamaged, match="--recover"):
        async with serving():
            pass
    (federation.directory / "blobs" / "partials" / lost[0]).unlink()
    for cut_off in (True, False):
        with opened(redis) as store:
            recover_until(federation, store, 4 if cut_off else 10**6)
    assert "run undescribed: what was submitted is not on file" in caplog.text
    assert "version 1 counts a sum of eu that is gone" in caplog.text
    async with serving() as app:
        federation.address = app.address
        operator = await federation.operator()
        assert app.leader.epoch > 1
        summaries = {each.run: each for each in await operator.runs()}
        assert (summaries[done].state, summaries[run].state) == ("finished", "paused")
        assert "what came after version 2 is not known" in summaries[run].reason
        assert {each.version: each.model_hash for each in await operator.models(run)} == models
        after = [(await operator.run(each)).rounds for each in (done, run)]
        assert [[what_counts(item) for item in rounds] for rounds in after] == [
            [what_counts(item) for item in rounds] for rounds in before
        ]
        eu = await federation.region("eu", leader_epoch=1, pending=[(key_to_proto(plan.key), sent.digest)])
        us = await federation.region("us", leader_epoch=1)
        assert await operator.resume(run) == "running"
        for region, expected in ((eu, plan), (us, open_plan)):
            _, again = await region.plan()
            assert again == expected  # the same attempt: what was sealed for it counts
            await region.uplink(again, region.partial(again))
        async with asyncio.timeout(10):
            last = [snapshot async for snapshot in operator.follow(run)][-1]
        assert (last.summary.state, last.summary.model_version) == ("finished", 3)
        await federation.close()
    with opened(redis) as store, pytest.raises(ConfigError, match="start without --recover"):
        recover_until(federation, store, 10**6)


def what_counts(item):
    """A round without what only the lost store knew: how long it took."""
    shares = [(share.region, share.weight, share.num_sites, share.num_updates) for share in item.regions]
    return (item.round, item.attempts, item.model_hash, item.weight, dict(item.metrics), shares)


@contextmanager
def opened(redis):
    from controller.store_redis import RedisStore

    store = RedisStore(RedisOptions(url=redis.url), "fed")
    try:
        yield store
    finally:
        store.close()


def recover_until(federation, store, writes):
    """Rebuild a store, cut off after so many writes."""
    from controller.recovery import recover

    write, left = store.write, iter(range(writes))

    def writing(epoch, *rows):
        if next(left, None) is None:
            raise OSError("cut off")
        write(epoch, *rows)

    store.write = writing
    with suppress(OSError):
        recover(federation.directory, store, federation.kit("controller"))


async def test_controllers_that_do_not_share_a_folder_are_refused(federation, serving, tmp_path):
    async with serving():
        assert (federation.directory / MARKER).is_file()
        with pytest.raises(ConfigError, match="not the folder that this store's controllers share"):
            async with serving(tmp_path / "other"):
                pass
    with pytest.raises(ConfigError, match="belongs to a store in Redis"):
        async with ControllerApp(federation.kit("controller"), federation.directory):
            pass
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "controller.sqlite").touch()
    with pytest.raises(ConfigError, match=r"controller\.sqlite"):
        async with serving(tmp_path / "lone"):
            pass


async def test_a_replaced_leader_writes_nothing_more_and_stands_by(federation, serving, redis):
    async with serving(lease_s=30.0) as one:  # so that a write is what it learns it from
        federation.address = one.address
        eu = await federation.region("eu")
        redis.command("DEL", "hierfl:{fed}:lease")  # as one that ran out
        successor = opener(redis, 30.0)(federation.directory, "fed")
        try:
            assert successor.lead(name="successor:1") == one.leader.epoch + 1
            with pytest.raises(NotTheLeader, match="replaced"):
                await federation.region("us")
            await until(lambda: not one.leads)
            with pytest.raises((NotTheLeader, TimeoutError, AssertionError)):
                await eu.next("offer")
            assert [row.region for row in successor.regions()] == ["eu"]
        finally:
            successor.close()
        await until(lambda: one.leads)
        assert one.leader.epoch == 3
        await federation.close()
