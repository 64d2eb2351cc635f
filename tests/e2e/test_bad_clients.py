"""A client that does wrong, or nothing, harms nobody else and gets a clear word.

The wrong ones are peers with real kits that speak the wire themselves (tests/support/peers.py): what they
send, the SDK would refuse to. The others are the SDK's own clients.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np
import pytest
from federations import InProcess, job, noisy_app
from peers import Peer, update, zeros

from combiners.settings import RegionSettings
from hierfl import provision
from hierfl.client.app import App
from hierfl.client.task import Task, Update
from hierfl.errors import (
    CertificateUntrusted,
    DigestMismatch,
    HierFLError,
    LayoutMismatch,
    RoundClosed,
    TransferIncomplete,
    ValueOutOfRange,
    WireError,
)
from hierfl.pki import Kit
from hierfl.plan import Plan
from hierfl.wire import hierfl_pb2 as pb

REGIONS = {"eu": ["site-00", "site-01", "site-02"], "us": ["site-10", "site-11", "site-12"]}
GOOD = 6
"""Clients that do as they should, three in each region."""
ONE_ROUND = job(rounds=1, min_regions=2, min_clients=3, evaluate_every=0)
BRIEF = RegionSettings(grace_s=0.3)
"""A client that has gone is given up soon."""


@asynccontextmanager
async def with_peers(federation: InProcess, *names: str) -> AsyncIterator[list[Peer]]:
    """Peers in eu, each of a site of its own, beside the clients of ``REGIONS``, which are all connected."""
    await federation.hear("waiting for a round", times=GOOD)
    address = federation.combiners["eu"].addresses[0]
    async with AsyncExitStack() as stack:
        peers = []
        for name in names:
            (kit,) = provision.add_site(federation.directory, "eu", name)
            peers.append(await stack.enter_async_context(Peer(Kit.load(kit), address)))
        yield peers


async def counted(federation: InProcess, run: str) -> int:
    """Updates in the one round of a run that ended well, at its first attempt."""
    found = await federation.outcome(run)
    assert found.summary.state == "finished", found.summary.reason
    (only,) = found.rounds
    assert only.attempts == 1
    assert [region.region for region in only.regions] == ["eu", "us"]
    return only.num_updates


def with_value(plan: Plan, value: float) -> dict[str, np.ndarray]:
    vectors = zeros(plan)
    vectors["train"][7] = value
    return vectors


def shorter(plan: Plan) -> dict[str, np.ndarray]:
    return {name: vector[1:] for name, vector in zeros(plan).items()}


def as_integers(plan: Plan) -> dict[str, np.ndarray]:
    return {name: vector.astype(np.int64) for name, vector in zeros(plan).items()}


def claims_size(plan: Plan) -> int:
    return 4 * sum(group.num_values for group in plan.task.groups)


async def lies_about_its_shape(peer: Peer, plan: Plan) -> object:
    return await peer.hand_in(plan, update(plan, shorter(plan)), length_bytes=claims_size(plan))


async def lies_about_its_dtype(peer: Peer, plan: Plan) -> object:
    outgoing = update(plan, as_integers(plan), encoding="int64")
    return await peer.hand_in(plan, outgoing, length_bytes=claims_size(plan))


async def sends_garbage(peer: Peer, plan: Plan) -> object:
    outgoing = update(plan)
    ticket = (await peer.admit(plan, outgoing)).ticket
    header, *chunks, trailer = outgoing.frames(plan.key, ticket)
    return await peer.send([header, *(bytes(len(chunk)) for chunk in chunks), trailer])


def hands_in(make: Callable[[Plan], object], **admission: object) -> Callable[[Peer, Plan], Awaitable[object]]:
    return lambda peer, plan: peer.hand_in(plan, make(plan), **admission)


WRONG: dict[str, tuple[Callable[[Peer, Plan], Awaitable[object]], type[HierFLError], str]] = {
    "nan": (hands_in(lambda plan: update(plan, with_value(plan, np.nan))), ValueOutOfRange, "train"),
    "infinity": (hands_in(lambda plan: update(plan, with_value(plan, -np.inf))), ValueOutOfRange, "train"),
    "too-large": (hands_in(lambda plan: update(plan, with_value(plan, 8.5))), ValueOutOfRange, "8.5"),
    "shape": (hands_in(lambda plan: update(plan, shorter(plan))), LayoutMismatch, "4060"),
    "shape-lie": (lies_about_its_shape, LayoutMismatch, "(1014,)"),
    "dtype-lie": (lies_about_its_dtype, LayoutMismatch, "int64"),
    "layout": (hands_in(lambda plan: update(plan, layout_hash="0" * 64)), LayoutMismatch, "000000000000"),
    "no-weight": (hands_in(lambda plan: update(plan, weight=0), weight=0), ValueOutOfRange, "weight is 0"),
    "heavy": (hands_in(lambda plan: update(plan, weight=65_536), weight=65_536), ValueOutOfRange, "65536"),
    "two-weights": (hands_in(lambda plan: update(plan, weight=9)), ValueOutOfRange, "announced as 1"),
    "metric": (hands_in(lambda plan: update(plan, metrics={"age": 61})), ValueOutOfRange, "age"),
    "other-base": (hands_in(lambda plan: update(plan, base_model_hash="0" * 64)), WireError, "another base model"),
    "no-head": (hands_in(lambda plan: update(plan, meta=b"[1, 2]")), WireError, "head"),
    "garbage": (sends_garbage, WireError, "chunk"),
}
"""By name: what a peer does, and the error that answers it, with words of its sentence."""


async def test_updates_that_do_not_fit_the_plan_are_refused_in_words_and_the_round_commits_at_once(federate):
    async with federate(REGIONS) as federation, with_peers(federation, *WRONG) as peers:
        run = await federation.submit(ONE_ROUND)

        async def misbehave(peer: Peer) -> BaseException | object:
            plan = await peer.offer()
            wrong, _, _ = WRONG[peer.kit.identity.site]
            (answer,) = await asyncio.gather(wrong(peer, plan), return_exceptions=True)
            return answer

        answers = await asyncio.gather(*map(misbehave, peers))
        async with asyncio.timeout(10):  # long before the report timeout: nobody waits for what was refused
            assert await counted(federation, run) == GOOD
    for (name, (_, kind, words)), answer in zip(WRONG.items(), answers, strict=True):
        assert type(answer) is kind, f"{name}: {answer!r}"
        assert words in str(answer), name
        assert "\n" not in str(answer), name
