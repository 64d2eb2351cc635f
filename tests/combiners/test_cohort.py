"""A cohort's counts are kept as members move: they are what a look at every member would find."""

from __future__ import annotations

from itertools import combinations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from combiners.cohort import Cohort, Outlook, Standing
from combiners.messages import Claim
from hierfl.types import ClientId, ClientRef, RegionId, SiteId, UpdateKey

CLIENTS = [
    ClientRef(RegionId("eu"), SiteId(f"site-{number % 3}"), ClientId(f"client-{number:02d}")) for number in range(7)
]
MOVES = ("expect", "decline", "miss", "claim", "fold", "let_go")


def move(cohort: Cohort, name: str, client: ClientRef, incarnation: str) -> None:
    if name == "claim":
        key = UpdateKey(cohort.plan.key, client)
        cohort.claim(incarnation, Claim(key=key, digest="blake3:aa", weight=1, signature=b"s"))
    elif name == "fold":
        cohort.fold(incarnation, client)
    elif name == "let_go":
        cohort.let_go(incarnation, [client])
    else:
        getattr(cohort, name)(client)


def looked_at(cohort: Cohort) -> Outlook:
    """The closing rule, from the members themselves."""

    def standing(*standings: Standing) -> list[ClientRef]:
        return [member.client for member in cohort if member.standing in standings]

    granted = (Standing.CLAIMED, Standing.FOLDED)
    if cohort.enough(standing(*granted)):
        return Outlook.WAIT if standing(Standing.EXPECTED) else Outlook.COMPLETE
    hoped_for = standing(*granted, Standing.EXPECTED, Standing.GONE)
    return Outlook.WAIT if cohort.enough(hoped_for) else Outlook.HOPELESS


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moves=st.lists(st.tuples(st.sampled_from(MOVES), st.sampled_from(CLIENTS), st.sampled_from("ab")), max_size=40),
    k=st.integers(1, 3),
)
def test_what_is_counted_is_what_a_look_at_everyone_finds(plan, moves, k):
    cohort = Cohort(plan, k)
    for name, client, incarnation in moves:
        move(cohort, name, client, incarnation)
        assert cohort.outlook() is looked_at(cohort)
    for number in range(1, len(Standing) + 1):
        for standings in combinations(Standing, number):
            found = [member.client for member in cohort if member.standing in standings]
            assert cohort.count(*standings) == len(found)
            is_enough = len(found) >= cohort.plan.min_clients and len({client.site for client in found}) >= k
            assert cohort.enough_with(*standings) is is_enough
