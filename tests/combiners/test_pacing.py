"""When clients that were turned away come back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from combiners.pacing import LONGEST_S, Pacer
from hierfl.types import ClientId, ClientRef, RegionId, SiteId


def client(number: int) -> ClientRef:
    return ClientRef(RegionId("eu"), SiteId(f"site-{number}"), ClientId("client-00"))


def test_places_are_given_out_one_after_the_other():
    pacer = Pacer(room=4, least_turn_s=20.0)
    assert [pacer.next_s(client(n), now_s=100.0) for n in range(3)] == [1.0, 6.0, 11.0]


def test_who_asks_too_early_is_told_the_same_moment_and_who_was_in_gets_another():
    pacer = Pacer(room=4, least_turn_s=20.0)
    first, second = pacer.next_s(client(0), 0.0), pacer.next_s(client(1), 0.0)
    assert pacer.next_s(client(0), 0.5) == first - 0.5
    pacer.came(client(0))
    assert pacer.next_s(client(0), 0.5) > second


def test_longer_turns_leave_longer_between_two_clients():
    pacer = Pacer(room=10, least_turn_s=1.0)
    before = pacer.spacing_s
    for _ in range(100):
        pacer.took(60.0)
    assert before < pacer.spacing_s <= 6.0


@given(
    room=st.integers(1, 5000),
    turns=st.lists(st.floats(0, 1e6), max_size=20),
    asks=st.lists(st.tuples(st.integers(0, 50), st.floats(0, 100)), max_size=200),
)
def test_nobody_is_sent_away_for_no_time_or_for_ever(room, turns, asks):
    pacer = Pacer(room, 5.0)
    for turn in turns:
        pacer.took(turn)
    now_s = 0.0
    for number, passed_s in asks:
        now_s += passed_s
        assert 0 < pacer.next_s(client(number), now_s) <= LONGEST_S + 1e-6
