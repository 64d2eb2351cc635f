"""Who follows at an intake, as its Region is told."""

from __future__ import annotations

import asyncio

from combiners.followers import Followers
from combiners.messages import App, Connection
from hierfl.types import ClientId, ClientRef, RegionId, SiteId

CLIENT = ClientRef(RegionId("eu"), SiteId("site-00"), ClientId("client-00"))
APPS = (App("toy", "1"),)
HERE, GONE = Connection(client=CLIENT, joined=True, apps=APPS), Connection(client=CLIENT, joined=False)


async def test_a_client_that_was_told_to_come_back_counts_as_here_until_it_is_overdue():
    told: asyncio.Queue[Connection] = asyncio.Queue()
    followers = Followers(told.put_nowait)
    session = followers.join(CLIENT, APPS)
    followers.turn_away(CLIENT, APPS, after_s=0.01, grace_s=0.01)
    session.end()
    assert len(followers) == 0
    followers.leave(session)
    assert [told.get_nowait() for _ in range(told.qsize())] == [HERE], "nothing has changed for the Region"
    assert await asyncio.wait_for(told.get(), 10) == GONE


async def test_a_client_that_comes_back_is_joined_anew_and_leaves_when_it_leaves():
    told: list[Connection] = []
    followers = Followers(told.append)
    followers.turn_away(CLIENT, APPS, after_s=60, grace_s=60)
    session = followers.join(CLIENT, APPS)
    followers.leave(session)
    assert told == [HERE, HERE, GONE]


async def test_when_all_are_sent_away_nobody_is_waited_for():
    told: list[Connection] = []
    followers = Followers(told.append)
    followers.turn_away(CLIENT, APPS, after_s=60, grace_s=60)
    followers.end_all()
    assert told == [HERE, GONE]


async def test_streams_are_counted_as_they_end_however_they_end():
    followers = Followers(lambda _: None)
    first, second, third = [followers.join(CLIENT, APPS) for _ in range(3)]
    assert len(followers) == len(list(followers)) == 3
    first.end()
    first.end()
    followers.leave(first)
    followers.leave(second)
    assert len(followers) == len(list(followers)) == 1
    followers.end_all()
    followers.leave(third)
    assert len(followers) == 0
