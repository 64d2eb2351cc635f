"""Who makes room at a full intake."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from combiners.followers import Session
from combiners.turns import Turns
from hierfl.types import ClientId, ClientRef, RegionId, SiteId


def session(number: int, since_s: float = 0.0) -> Session:
    return Session(ClientRef(RegionId("eu"), SiteId(f"site-{number}"), ClientId("client-00")), (), since_s=since_s)


def test_who_has_been_idle_for_longest_makes_room_first_and_once():
    first, second = session(0), session(1)
    turns = Turns(lambda _: True)
    turns.note([first, second])
    assert [turns.take(), turns.take(), turns.take()] == [first, second, None]


def test_who_was_given_something_to_do_meanwhile_stays():
    busy, idle = session(0), session(1)
    at_work = set()
    turns = Turns(lambda one: one not in at_work)
    turns.note([busy, idle])
    at_work.add(busy)
    assert turns.take() is idle
    assert turns.take() is None
    at_work.clear()
    turns.note([busy])
    assert turns.take() is busy


def test_after_the_end_of_an_attempt_those_who_had_it_first_come_first():
    late, early = session(0, since_s=2.0), session(1, since_s=1.0)
    turns = Turns(lambda _: True)
    turns.note_all([late, early])
    assert [turns.take(), turns.take()] == [early, late]


@given(st.lists(st.tuples(st.sampled_from(["note", "forget", "end", "take"]), st.integers(0, 5)), max_size=60))
def test_only_those_who_are_there_are_kept_and_each_once(moves):
    sessions = [session(number) for number in range(6)]
    turns, noted = Turns(lambda _: True), []
    for name, number in moves:
        one = sessions[number]
        if name == "note":
            turns.note([one])
            noted = [other for other in noted if other is not one] + [one]
        elif name == "forget":
            turns.forget(one)
            noted = [other for other in noted if other is not one]
        elif name == "end":
            one.end()
        else:
            expected = next((other for other in noted if not other.is_over), None)
            assert turns.take() is expected
            noted = [] if expected is None else noted[noted.index(expected) + 1 :]
    assert len(turns) == len(noted)
