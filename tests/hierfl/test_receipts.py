"""The table of receipts, every pair of it: those that go on, those that stay, and those that are a bug."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hierfl.errors import InvalidTransition
from hierfl.receipts import TRANSITIONS, Reason, Receipt, ReceiptEvent, ReceiptState, next_receipt
from hierfl.types import AttemptKey, ClientId, ClientRef, RegionId, RunId, SiteId, TaskKind, UpdateKey

CLIENT = ClientRef(RegionId("eu"), SiteId("a"), ClientId("c"))
KEY = UpdateKey(AttemptKey(RunId("r"), TaskKind.TRAIN, 1, 1), CLIENT)

#                 STAGE     CLAIM      LET_GO     SEAL      ABANDON        COMMIT       REFUSE         ORPHAN
EXPECTED = """
    offered       staged    BUG        offered    BUG       not_counted    BUG          not_counted    BUG
    staged        staged    claimed    offered    BUG       not_counted    BUG          not_counted    BUG
    claimed       BUG       claimed    offered    sealed    not_counted    BUG          not_counted    BUG
    sealed        BUG       BUG        BUG        sealed    sealed         committed    not_counted    sealed
    committed     BUG       BUG        BUG        BUG       committed      committed    BUG            committed
    not_counted   BUG       BUG        BUG        BUG       not_counted    BUG          not_counted    not_counted
"""
TABLE = {
    (ReceiptState(state), event): after
    for state, *row in (line.split() for line in EXPECTED.strip().splitlines())
    for event, after in zip(ReceiptEvent, row, strict=True)
}


def receipt(state: ReceiptState) -> Receipt:
    made = Receipt(key=KEY, digest="blake3:aa", state=state)
    if state is ReceiptState.COMMITTED:
        return replace(made, version=3)
    return replace(made, reason=Reason.LATE) if state is ReceiptState.NOT_COUNTED else made


def test_the_table_above_has_every_pair():
    assert set(TABLE) == {(state, event) for state in ReceiptState for event in ReceiptEvent}
    assert {pair for pair, after in TABLE.items() if after != "BUG"} == set(TRANSITIONS)


@pytest.mark.parametrize(("state", "event"), TABLE, ids=str)
def test_each_pair_gives_what_the_table_says_or_is_a_bug(state, event):
    before, after = receipt(state), TABLE[state, event]
    if after == "BUG":
        with pytest.raises(InvalidTransition):
            next_receipt(before, event, version=3, reason=Reason.STORAGE)
        return
    found = next_receipt(before, event, version=3, reason=Reason.STORAGE)
    assert (found.key, found.digest, found.state) == (before.key, before.digest, after)
    assert bool(found.version) == (found.state is ReceiptState.COMMITTED)
    if found.state is ReceiptState.NOT_COUNTED:
        assert found.reason == (before.reason or Reason.STORAGE)
    if state.is_last_word:
        assert found == before


def test_a_commit_in_another_version_than_the_first_is_a_bug():
    committed = receipt(ReceiptState.COMMITTED)
    assert next_receipt(committed, ReceiptEvent.COMMIT, version=3) == committed
    with pytest.raises(InvalidTransition):
        next_receipt(committed, ReceiptEvent.COMMIT, version=4)


def test_an_orphaned_update_says_why_it_waits_until_its_last_word_comes():
    sealed = receipt(ReceiptState.SEALED)
    waits = next_receipt(sealed, ReceiptEvent.ORPHAN, reason=Reason.CONTROLLER_AWAY)
    assert (waits.state, waits.reason) == (ReceiptState.SEALED, Reason.CONTROLLER_AWAY)
    assert next_receipt(waits, ReceiptEvent.SEAL) == sealed
    counted = next_receipt(waits, ReceiptEvent.COMMIT, version=2)
    assert (counted.state, counted.version, counted.reason) == (ReceiptState.COMMITTED, 2, "")
    refused = next_receipt(waits, ReceiptEvent.REFUSE, reason=Reason.RUN_CANCELLED)
    assert (refused.state, refused.reason) == (ReceiptState.NOT_COUNTED, Reason.RUN_CANCELLED)


WAYS = {
    "counted": [ReceiptEvent.STAGE, ReceiptEvent.CLAIM, ReceiptEvent.SEAL, ReceiptEvent.COMMIT],
    "intake died, then counted": [
        *(ReceiptEvent.STAGE, ReceiptEvent.CLAIM, ReceiptEvent.LET_GO),
        *(ReceiptEvent.STAGE, ReceiptEvent.CLAIM, ReceiptEvent.SEAL, ReceiptEvent.COMMIT),
    ],
    "cancelled before the seal": [ReceiptEvent.STAGE, ReceiptEvent.CLAIM, ReceiptEvent.REFUSE],
    "cancelled after the seal": [ReceiptEvent.STAGE, ReceiptEvent.CLAIM, ReceiptEvent.SEAL, ReceiptEvent.REFUSE],
    "attempt abandoned, counted in the next": [
        *(ReceiptEvent.STAGE, ReceiptEvent.CLAIM, ReceiptEvent.SEAL, ReceiptEvent.ABANDON, ReceiptEvent.COMMIT),
    ],
    "controller away, then back": [
        *(ReceiptEvent.STAGE, ReceiptEvent.CLAIM, ReceiptEvent.SEAL, ReceiptEvent.ORPHAN, ReceiptEvent.COMMIT),
    ],
    "too late to be claimed": [ReceiptEvent.STAGE, ReceiptEvent.REFUSE],
    "region drained, never asked again": [ReceiptEvent.STAGE, ReceiptEvent.LET_GO, ReceiptEvent.ABANDON],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_that_an_update_can_go_ends_with_a_last_word(way):
    found = receipt(ReceiptState.OFFERED)
    for event in WAYS[way]:
        found = next_receipt(found, event, version=1, reason=Reason.RUN_CANCELLED)
    assert found.state.is_last_word


@given(st.lists(st.sampled_from(ReceiptEvent), max_size=12))
def test_whatever_comes_a_last_word_never_changes_and_one_can_always_follow(events):
    found, last = receipt(ReceiptState.OFFERED), None
    for event in events:
        if (found.state, event) not in TRANSITIONS:
            continue
        found = next_receipt(found, event, version=1, reason=Reason.LATE)
        assert last is None or found == last
        last = found if found.state.is_last_word else None
    if found.state is not ReceiptState.COMMITTED:
        assert next_receipt(found, ReceiptEvent.REFUSE, reason=Reason.LATE).state.is_last_word
