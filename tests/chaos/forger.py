"""A client that does what the SDK never does: other bytes under its key, keys of other rounds, attempts and runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np

from hierfl import provision
from hierfl.errors import RoundClosed, WireError
from hierfl.pki import Kit
from hierfl.plan import Plan
from hierfl.types import RunId, SiteId
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.transfer import Outgoing
from tests.chaos.trial import LOOK_S, Trial
from tests.support.peers import Peer, update, zeros

__all__ = ["Forge", "other_bytes", "other_keys"]

Forge = Callable[[Trial, int], Awaitable[tuple[int, int]]]
"""Does so in so many rounds; how often it was tried, and refused."""

SITE = SiteId("forger")


@asynccontextmanager
async def forger(harmed: Trial) -> AsyncIterator[Peer]:
    """A site more in the first region, with a kit that is all right."""
    region = harmed.load.names[0]
    provision.add_site(harmed.state, region, SITE, exist_ok=True)
    kit = Kit.load(harmed.state / "kits" / "sites" / region / SITE / "client-00")
    async with Peer(kit, harmed.combiner_address(region), app="app") as peer:
        yield peer


def other(plan: Plan) -> Outgoing:
    """Another update than ``update(plan)``."""
    return update(plan, {name: vector + np.float32(0.5) for name, vector in zeros(plan).items()})


async def handed(peer: Peer, plan: Plan, outgoing: Outgoing) -> pb.Receipt:
    """Hand in, by either way."""
    small = outgoing.small_frames(plan.key)
    if small:
        return (await peer.admit(plan, outgoing, update=small)).receipt
    return await peer.hand_in(plan, outgoing)


async def is_refused(peer: Peer, plan: Plan, outgoing: Outgoing) -> bool:
    try:
        receipt = await handed(peer, plan, outgoing)
    except (WireError, RoundClosed):
        return True
    return receipt.state == pb.RECEIPT_STATE_NOT_COUNTED and receipt.digest == outgoing.digest


async def reaches(peer: Peer, plan: Plan, state: int) -> None:
    """Wait until the peer's own update for a plan is so far."""
    while (await peer.receipt(plan)).state < state:
        await asyncio.sleep(LOOK_S)


async def other_bytes(harmed: Trial, repeats: int) -> tuple[int, int]:
    """So many rounds; in each other bytes come three times. How often it was tried, and refused."""
    tried = refused = 0
    async with forger(harmed) as peer:
        for _ in range(repeats):
            plan = await peer.offer()
            await handed(peer, plan, update(plan))
            for state in pb.RECEIPT_STATE_STAGED, pb.RECEIPT_STATE_SEALED, pb.RECEIPT_STATE_COMMITTED:
                await reaches(peer, plan, state)
                tried += 1
                refused += await is_refused(peer, plan, other(plan))
    return tried, refused


async def other_keys(harmed: Trial, repeats: int) -> tuple[int, int]:
    """So many rounds; in each an update comes under four other keys. How often it was tried, and refused."""
    tried = refused = 0
    async with forger(harmed) as peer:
        for _ in range(repeats):
            plan = await peer.offer()
            for forged in (
                replace(plan, round=plan.round - 1),
                replace(plan, round=plan.round + 1),
                replace(plan, attempt=plan.attempt + 1),
                replace(plan, run=RunId("another-run")),
            ):
                tried += 1
                refused += await is_refused(peer, forged, other(plan))
            await handed(peer, plan, update(plan))
    return tried, refused
