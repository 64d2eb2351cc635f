"""Where a client connects to: the list that it believes, the time it is told to come back."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from hierfl.client import link
from hierfl.client.link import JITTER, MOST_AWAY_S, Waits
from hierfl.endpoints import Endpoint, EndpointList, sign_endpoints
from hierfl.pki import Kit
from hierfl.wire import hierfl_pb2 as pb


def test_a_pause_that_the_server_asks_for_is_kept_with_a_little_more_and_is_not_a_failure() -> None:
    said: list[str] = []
    waits = Waits(said.append)
    for _ in range(20):
        assert 8.0 <= waits.next_pause_s("full", after_s=8.0) <= 8.0 * (1 + JITTER)
    assert waits.next_pause_s("full", after_s=1e9) <= MOST_AWAY_S * (1 + JITTER)
    assert waits.next_pause_s("broken") <= link.FIRST_PAUSE_S
    assert len(said) == 2


async def test_a_client_that_is_told_to_come_back_does_so_then(combiner: Any, running: Any, plan: Any) -> None:
    combiner.full = [1.2]  # longer than a first pause of its own
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: "Follow refused" in combiner.calls)
        refused_at_s = time.monotonic()
        await combiner.until(lambda: "Follow" in combiner.calls)
        assert time.monotonic() - refused_at_s > 1.0
        await combiner.until(lambda: bool(combiner.received))
    assert "as many are here as can be" in running.said


def message(signer: Kit, address: str, version: int = 1) -> pb.FollowResponse:
    endpoints = (Endpoint(name="intake-7", address=address),)
    listed = EndpointList(federation="fed", region="eu", region_epoch=1, version=version, endpoints=endpoints)
    signed = sign_endpoints(signer, listed)
    return pb.FollowResponse(
        endpoints=pb.Endpoints(document=signed.document, signature=signed.signature, certificate=signed.certificate)
    )


@pytest.fixture
async def elsewhere(federation: Any, combiner: Any, model: Any) -> AsyncIterator[Any]:
    """Another server of the region, which no kit names."""
    other = type(combiner)(federation, {model.hash: model})
    await other.start()
    federation.set_address(f"127.0.0.1:{combiner.port}")
    yield other
    await other.stop()


async def test_a_client_moves_by_its_regions_list_and_by_no_other(
    federation: Any, combiner: Any, elsewhere: Any, running: Any, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "SPREAD_S", 0.0)
    address = f"127.0.0.1:{elsewhere.port}"
    async with running():
        await combiner.until(lambda: "Follow" in combiner.calls)
        combiner.push(message(Kit.load(federation.client_kit(1)), address))
        combiner.offer(plan())
        await combiner.until(lambda: bool(combiner.received))
        assert "a list of intakes was refused" in running.said
        assert elsewhere.calls == []
        combiner.push(message(federation.combiner, address, version=2))
        await elsewhere.until(lambda: "Follow" in elsewhere.calls)
        elsewhere.push(message(federation.combiner, f"127.0.0.1:{combiner.port}", version=1))
        elsewhere.offer(plan(round=2))
        await elsewhere.until(lambda: bool(elsewhere.received))
        assert "an older list of intakes was left aside" in running.said
    assert combiner.calls.count("Follow") == 1


async def test_nobody_moves_while_it_works(
    federation: Any,
    combiner: Any,
    elsewhere: Any,
    running: Any,
    plan: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "SPREAD_S", 0.0)
    combiner.refuse_uploads = 2
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: "Upload refused" in combiner.calls)
        combiner.push(message(federation.combiner, f"127.0.0.1:{elsewhere.port}"))
        await combiner.until(lambda: bool(combiner.received))
        await elsewhere.until(lambda: "Follow" in elsewhere.calls)
    assert not elsewhere.received


async def test_a_list_that_leads_nowhere_leaves_the_client_where_it_is(
    federation: Any, combiner: Any, running: Any, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "SPREAD_S", 0.0)
    async with running():
        await combiner.until(lambda: "Follow" in combiner.calls)
        combiner.push(message(federation.combiner, "127.0.0.1:1"))
        combiner.offer(plan())
        await combiner.until(lambda: bool(combiner.received))
    async with running():  # starts at the list's, finds nobody there, and has the kit's address still
        await combiner.until(lambda: combiner.calls.count("Follow") == 2)
    assert combiner.calls.count("Follow") == 2
