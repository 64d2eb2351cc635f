"""The line in front of an intake."""

from __future__ import annotations

import asyncio

import pytest

from combiners.admission import Admitted, Line
from combiners.messages import Claim
from hierfl.errors import RoundClosed
from hierfl.types import AttemptKey, ClientId, ClientRef, RegionId, RunId, SiteId, TaskKind, UpdateKey


def admitted(number: int, length_bytes: int = 10) -> Admitted:
    client = ClientRef(RegionId("eu"), SiteId(f"site-{number}"), ClientId("client-00"))
    key = UpdateKey(AttemptKey(RunId("run-1"), TaskKind.TRAIN, 1, 1), client)
    return Admitted(claim=Claim(key=key, digest="blake3:aa", weight=1, signature=b""), length_bytes=length_bytes)


def line(**changes: float) -> Line:
    usual = {"max_uploads": 2, "max_bytes": 100, "max_waiting": 3, "ticket_s": 60.0}
    return Line(**(usual | changes))  # type: ignore[arg-type]


async def waiting(made: Line, number: int, length_bytes: int = 10) -> asyncio.Task[bytes]:
    task = asyncio.create_task(made.enter(admitted(number, length_bytes)))
    await asyncio.sleep(0)
    return task


async def test_so_many_go_in_at_once_and_the_others_in_the_order_they_came():
    made = line()
    first = await made.enter(admitted(0))
    await made.enter(admitted(1))
    second, third = await waiting(made, 2), await waiting(made, 3)
    assert not second.done()
    with made.upload(first) as entered:
        assert entered == admitted(0)
    await second
    assert not third.done()
    third.cancel()


async def test_the_bytes_of_all_uploads_are_bounded_and_a_larger_one_goes_alone():
    made = line()
    first = await made.enter(admitted(0, 60))
    large = await waiting(made, 1, 1000)
    small = await waiting(made, 2, 10)
    assert not small.done(), "nobody overtakes"
    with made.upload(first):
        pass
    ticket = await large
    assert not small.done()
    with made.upload(ticket):
        pass
    await small


async def test_a_ticket_is_good_once():
    made = line()
    ticket = await made.enter(admitted(0))
    with made.upload(ticket):
        pass
    with pytest.raises(RoundClosed, match="admitted again"), made.upload(ticket):
        pass


async def test_a_ticket_that_is_not_used_in_time_makes_room():
    made = line(max_uploads=1, ticket_s=0.01)
    ticket = await made.enter(admitted(0))
    await made.enter(admitted(1))
    with pytest.raises(RoundClosed), made.upload(ticket):
        pass


async def test_who_leaves_the_line_gives_up_the_place():
    made = line(max_uploads=1)
    first = await made.enter(admitted(0))
    second, third = await waiting(made, 1), await waiting(made, 2)
    second.cancel()
    with made.upload(first):
        pass
    await third


async def test_who_leaves_when_the_turn_has_just_come_gives_it_on():
    made = line(max_uploads=1)
    first = await made.enter(admitted(0))
    second, third = await waiting(made, 1), await waiting(made, 2)
    with made.upload(first):
        pass
    second.cancel()
    await third


async def test_a_place_that_is_held_is_come_back_to_past_the_line_and_freed_by_the_last():
    made = line(max_uploads=1)
    ticket = await made.enter(admitted(0))
    with made.upload(ticket):
        let_go = made.hold(ticket)
    other = await waiting(made, 1)
    assert not other.done(), "the place is still taken"
    assert made.has_place(admitted(0))
    assert not made.has_place(admitted(1))
    assert not made.has_place(admitted(0, length_bytes=11)), "that is another update"
    with made.upload(await made.enter(admitted(0))):
        let_go()
        assert not other.done()
        assert not made.has_place(admitted(0))
    await other


async def test_who_comes_back_twice_has_the_newer_ticket_only():
    made = line(max_uploads=1)
    ticket = await made.enter(admitted(0))
    with made.upload(ticket):
        let_go = made.hold(ticket)
    first, second = await made.enter(admitted(0)), await made.enter(admitted(0))
    with pytest.raises(RoundClosed), made.upload(first):
        pass
    with made.upload(second):
        let_go()
    await made.enter(admitted(1))


async def test_a_place_that_nobody_comes_back_to_is_free_when_it_is_let_go():
    made = line(max_uploads=1)
    ticket = await made.enter(admitted(0))
    with made.upload(ticket):
        let_go = made.hold(ticket)
    other = await waiting(made, 1)
    let_go()
    await other


async def test_a_place_held_by_two_streams_is_come_back_to_until_both_let_go():
    made = line(max_uploads=1)
    ticket = await made.enter(admitted(0))
    with made.upload(ticket):
        let_go = made.hold(ticket)
        again = await made.enter(admitted(0))
        with made.upload(again):
            let_go_again = made.hold(again)
            let_go()
            assert made.has_place(admitted(0))
    other = await waiting(made, 1)
    assert not other.done()
    let_go_again()
    assert not made.has_place(admitted(0))
    await other


async def test_a_line_that_is_too_long_says_so():
    made = line(max_uploads=1)
    await made.enter(admitted(0))
    tasks = [await waiting(made, number) for number in range(1, 4)]
    assert made.is_full
    for task in tasks:
        task.cancel()
