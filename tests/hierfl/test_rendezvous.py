"""Rendezvous hashing: who belongs where, and who moves when servers come and go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hierfl.rendezvous import preference, rank

NAMES = st.text(min_size=1, max_size=12)
SERVERS = st.lists(NAMES, min_size=1, max_size=8, unique=True)
CLIENTS = [f"spiffe://test/region/eu/site/site-{number:03d}/client/client-00" for number in range(400)]


@given(client=NAMES, servers=SERVERS, data=st.data())
def test_a_preference_is_an_order_of_all_servers_whatever_their_order_was(client, servers, data):
    shuffled = data.draw(st.permutations(servers))
    assert preference(client, servers) == preference(client, shuffled)
    assert sorted(preference(client, servers)) == sorted(servers)


@given(client=NAMES, servers=SERVERS, data=st.data())
def test_a_server_that_goes_is_taken_out_of_the_order_and_changes_nothing_else(client, servers, data):
    gone = data.draw(st.sampled_from(servers))
    before = preference(client, servers)
    assert preference(client, [name for name in servers if name != gone]) == [n for n in before if n != gone]


@given(servers=SERVERS, new=NAMES)
def test_a_server_that_is_added_takes_clients_for_itself_only(servers, new):
    for client in CLIENTS[:50]:
        before, after = preference(client, servers)[0], preference(client, [*servers, new])[0]
        assert after in (before, new)


@pytest.mark.parametrize("num_servers", [2, 3, 5, 8])
def test_clients_spread_evenly_and_one_server_more_moves_its_share(num_servers):
    servers = [f"intake-{number}" for number in range(num_servers)]
    homes = [preference(client, servers)[0] for client in CLIENTS]
    share = len(CLIENTS) / num_servers
    assert all(0.7 * share < homes.count(server) < 1.3 * share for server in servers)
    moved = sum(
        preference(client, [*servers, "intake-new"])[0] != home for client, home in zip(CLIENTS, homes, strict=True)
    )
    assert 0.7 < moved / (len(CLIENTS) / (num_servers + 1)) < 1.3


def test_the_rank_is_the_one_that_the_protocol_shows():
    client = "spiffe://test/region/eu/site/site-000/client/client-00"
    assert rank(client, "intake-0") == int(RANK, 16)


RANK = "31fd320614ed3bb5"
