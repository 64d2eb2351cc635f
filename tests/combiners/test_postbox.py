"""Receipts that wait for something to go along with."""

from __future__ import annotations

import asyncio

from combiners.postbox import Postbox
from hierfl.receipts import Receipt, ReceiptState
from hierfl.types import AttemptKey, ClientId, ClientRef, RegionId, RunId, SiteId, TaskKind, UpdateKey
from hierfl.wire import hierfl_pb2 as pb

DIGEST = "sha256:" + "0" * 64


def client(number: int) -> ClientRef:
    return ClientRef(RegionId("eu"), SiteId(f"site-{number}"), ClientId("client-00"))


def receipt(number: int, round_number: int, state: ReceiptState, version: int = 0) -> Receipt:
    key = AttemptKey(RunId("run-1"), TaskKind.TRAIN, round_number, 1)
    return Receipt(key=UpdateKey(key, client(number)), digest=DIGEST, state=state, version=version)


async def test_a_later_receipt_takes_the_place_of_one_that_waits_and_each_client_gets_its_own() -> None:
    postbox = Postbox(lambda client: None)
    postbox.put(receipt(1, 1, ReceiptState.SEALED), 60.0)
    postbox.put(receipt(2, 1, ReceiptState.SEALED), 60.0)
    postbox.put(receipt(1, 1, ReceiptState.COMMITTED, version=1), 60.0)
    postbox.put(receipt(1, 2, ReceiptState.SEALED), 60.0)
    taken = [(one.key.round, one.state) for one in postbox.take(client(1))]
    assert taken == [(1, pb.RECEIPT_STATE_COMMITTED), (2, pb.RECEIPT_STATE_SEALED)]
    assert postbox.take(client(1)) == []
    assert [one.state for one in postbox.take(client(2))] == [pb.RECEIPT_STATE_SEALED]
    postbox.clear()


async def test_a_late_copy_of_an_acknowledgement_takes_no_last_word_away() -> None:
    postbox = Postbox(lambda client: None)
    postbox.put(receipt(1, 1, ReceiptState.COMMITTED, version=1), 60.0)
    postbox.put(receipt(1, 1, ReceiptState.SEALED), 60.0)
    assert [one.state for one in postbox.take(client(1))] == [pb.RECEIPT_STATE_COMMITTED]
    postbox.clear()


async def test_what_nothing_came_along_for_is_collected() -> None:
    collected: asyncio.Queue[ClientRef] = asyncio.Queue()
    postbox = Postbox(collected.put_nowait)
    for number in (1, 2, 3):
        postbox.put(receipt(number, 1, ReceiptState.SEALED), 0.01)
    postbox.take(client(2))
    async with asyncio.timeout(10):
        assert [await collected.get(), await collected.get()] == [client(1), client(3)]
    assert collected.empty()


async def test_what_is_cleared_is_not_collected() -> None:
    collected: asyncio.Queue[ClientRef] = asyncio.Queue()
    postbox = Postbox(collected.put_nowait)
    postbox.put(receipt(1, 1, ReceiptState.SEALED), 0.0)
    postbox.clear()
    postbox.put(receipt(2, 1, ReceiptState.SEALED), 0.0)
    async with asyncio.timeout(10):
        assert await collected.get() == client(2)
    assert collected.empty()
