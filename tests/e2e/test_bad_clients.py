"""A client that does wrong, or nothing, harms nobody else and gets a clear word.

The wrong ones are peers with real kits that speak the wire themselves (tests/support/peers.py): what they
send, the SDK would refuse to. The others are the SDK's own clients.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from federations import InProcess, job, noisy_app
from peers import Peer, update, zeros

from combiners.settings import RegionSettings
from hierfl import encodings, provision
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
from hierfl.job import UpdateChoice
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


def encoded_as(plan: Plan, **wire: np.ndarray) -> object:
    """Wire vectors of the plan's encoding, all 0, but for ``wire`` with ``__`` for a dot."""
    vectors = {
        name: np.zeros(num_values, dtype)
        for name, dtype, num_values in encodings.wire_vectors(plan.task.update_encoding, plan.task.groups)
    }
    for name, values in wire.items():
        vectors[name.replace("__", ".")][: len(values)] = values
    return update(plan, vectors, encoding=plan.task.encoding.name)


ENCODED: dict[str, dict[str, tuple[Callable[[Plan], object], type[HierFLError], str]]] = {
    "int8": {
        "step-nan": (
            lambda plan: encoded_as(plan, train__scale=np.array([0, np.nan])),
            ValueOutOfRange,
            "value 1 is nan",
        ),
        "step-large": (
            lambda plan: encoded_as(plan, train__scale=np.array([0.07])),
            ValueOutOfRange,
            "8 / 127 at most",
        ),
        "code": (lambda plan: encoded_as(plan, train=np.array([-128])), ValueOutOfRange, "from -127 to 127"),
        "plain": (update, LayoutMismatch, "the update has 4060 bytes"),
    },
    "topk": {
        "twice": (encoded_as, ValueOutOfRange, "'train.index', value 1 is 0: must be above"),
        "beyond": (
            lambda plan: encoded_as(plan, train__index=np.arange(10**6, 10**6 + 11)),
            ValueOutOfRange,
            "below 1015",
        ),
        "value-inf": (
            lambda plan: encoded_as(plan, train__index=np.arange(11), train=np.array([1, np.inf])),
            ValueOutOfRange,
            "'train', value 1 is inf",
        ),
    },
    "bfloat16": {
        "code-nan": (lambda plan: encoded_as(plan, train=np.array([0, 0, 0x7FC0])), ValueOutOfRange, "value 2 is nan"),
    },
}
"""By encoding and name: what a peer hands in, and the error that answers it, with words of its sentence."""


@pytest.mark.parametrize("name", ENCODED)
async def test_encoded_updates_that_do_not_fit_are_refused_in_words_too(federate, name):
    wrong = ENCODED[name]
    async with federate(REGIONS) as federation, with_peers(federation, *wrong) as peers:
        run = await federation.submit(replace(ONE_ROUND, updates=UpdateChoice(encoding=name)))

        async def misbehave(peer: Peer) -> BaseException | object:
            plan = await peer.offer()
            make, _, _ = wrong[peer.kit.identity.site]
            (answer,) = await asyncio.gather(peer.hand_in(plan, make(plan)), return_exceptions=True)
            return answer

        answers = await asyncio.gather(*map(misbehave, peers))
        async with asyncio.timeout(10):
            assert await counted(federation, run) == GOOD
    for (who, (_, kind, words)), answer in zip(wrong.items(), answers, strict=True):
        assert type(answer) is kind, f"{who}: {answer!r}"
        assert words in str(answer), (who, str(answer))


async def test_half_an_upload_is_no_update_and_a_whole_one_after_it_counts(federate):
    async with (
        federate(REGIONS, app=noisy_app(num_values=300_000), settings=BRIEF) as federation,
        with_peers(federation, "stops", "vanishes") as (stops, vanishes),
    ):
        run = await federation.submit(ONE_ROUND)
        plan = await stops.offer()
        outgoing = update(plan)
        header, first, _, trailer = outgoing.frames(plan.key, (await stops.admit(plan, outgoing)).ticket)
        with pytest.raises(TransferIncomplete, match="1 of 2 chunks"):
            await stops.send([header, first])
        header, *_ = outgoing.frames(plan.key, (await stops.admit(plan, outgoing)).ticket)
        with pytest.raises(TransferIncomplete, match="1 of 2 chunks"):
            await stops.send([header, first, trailer])

        ticket = (await vanishes.admit(plan, outgoing)).ticket
        await begin_upload(vanishes, list(outgoing.frames(plan.key, ticket))[:2])
        await vanishes.__aexit__(None, None, None)

        assert (await stops.receipt(plan)).state == pb.RECEIPT_STATE_UNKNOWN
        assert (await stops.hand_in(plan, outgoing)).state == pb.RECEIPT_STATE_STAGED
        assert (await stops.told(pb.RECEIPT_STATE_COMMITTED)).model_version == 1
        assert await counted(federation, run) == GOOD + 1


async def begin_upload(peer: Peer, frames: list[bytes]) -> object:
    """Send these frames and leave the stream open."""
    stream = peer.stub.Upload()
    for frame in frames:
        await stream.write(frame)
        await stream.initial_metadata()
    return stream


async def test_clients_that_send_nothing_or_stop_sending_are_given_up_at_the_deadline(federate):
    brief = job(rounds=1, min_regions=2, min_clients=3, evaluate_every=0, report_timeout_s=3)
    async with (
        federate(REGIONS, app=noisy_app(num_values=300_000)) as federation,
        with_peers(federation, "silent", "stalls") as (silent, stalls),
    ):
        run = await federation.submit(brief)
        plan = await stalls.offer()
        outgoing = update(plan)
        ticket = (await stalls.admit(plan, outgoing)).ticket
        stream = await begin_upload(stalls, list(outgoing.frames(plan.key, ticket))[:2])
        assert await counted(federation, run) == GOOD
        assert [await silent.withdrawal(), await stalls.withdrawal()] == ["late", "late"]
        with pytest.raises(RoundClosed, match=r"round 1 of run .* is not open"):
            await stalls.hand_in(plan, outgoing)
        stream.cancel()


async def test_another_update_under_a_key_that_is_used_is_refused_and_the_first_one_counts(federate):
    async with federate(REGIONS) as federation, with_peers(federation, "evil", "last") as (evil, last):
        run = await federation.submit(ONE_ROUND)
        plan = await evil.offer()
        first, second = update(plan), update(plan, with_value(plan, 1.0))

        ticket = (await evil.admit(plan, first)).ticket
        with pytest.raises(DigestMismatch):
            await evil.send(second.frames(plan.key, ticket))
        assert (await evil.hand_in(plan, first)).state == pb.RECEIPT_STATE_STAGED

        refused = (await evil.admit(plan, second)).receipt
        assert (refused.state, refused.reason) == (pb.RECEIPT_STATE_NOT_COUNTED, "digest_conflict")
        again = (await evil.admit(plan, first)).receipt
        assert (again.state, again.digest) == (pb.RECEIPT_STATE_STAGED, first.digest)

        assert (await last.hand_in(plan, first)).state == pb.RECEIPT_STATE_STAGED
        assert (await evil.told(pb.RECEIPT_STATE_COMMITTED)).digest == first.digest
        assert (await evil.admit(plan, second)).receipt.reason == "digest_conflict"
        assert await counted(federation, run) == GOOD + 2


async def test_nobody_hands_in_for_another(federate):
    async with federate(REGIONS) as federation, with_peers(federation, "thief", "owner") as (thief, owner):
        run = await federation.submit(ONE_ROUND)
        plan = await owner.offer()
        outgoing = update(plan)
        ticket = (await owner.admit(plan, outgoing)).ticket
        with pytest.raises(RoundClosed, match="another update"):
            await thief.send(outgoing.frames(plan.key, ticket))
        with pytest.raises(CertificateUntrusted, match="signature"):
            await thief.admit(plan, outgoing, signature=b"x" * 64)
        with pytest.raises(WireError):
            await thief.send([b'{"I am": "the owner"}'])
        with pytest.raises(RoundClosed, match="ticket"):
            await owner.send(outgoing.frames(plan.key, ticket))  # the thief has used it up
        assert (await owner.hand_in(plan, outgoing)).state == pb.RECEIPT_STATE_STAGED
        assert (await thief.hand_in(plan, outgoing)).state == pb.RECEIPT_STATE_STAGED
        assert await counted(federation, run) == GOOD + 2


# --- clients of the SDK whose app is wrong, and clients that lose their peers


def with_mistakes(mistakes: dict[str, Callable[[Task, Update], Update]]) -> App:
    """An app that makes a mistake at some sites."""
    good = noisy_app()

    def train(task: Task) -> Update:
        update = good.train(task)
        return mistakes[task.site](task, update) if task.site in mistakes else update

    return App(name=good.name, init=good.init, train=train)


def not_a_number(task: Task, update: Update) -> Update:
    update.params["head"][0, 0] = np.nan
    return update


def of_another_shape(task: Task, update: Update) -> Update:
    update.params["body"] = update.params["body"][:-1]
    return update


def breaks(task: Task, update: Update) -> Update:
    raise FileNotFoundError("/srv/patients/scan-0412.dcm")


async def test_an_app_that_makes_a_mistake_costs_its_own_site_the_round_and_says_why_there_only(federate):
    mistakes = {"nan": not_a_number, "shape": of_another_shape, "broken": breaks}
    regions = {"eu": [*REGIONS["eu"], *mistakes], "us": REGIONS["us"]}
    async with federate(regions, app=with_mistakes(mistakes)) as federation:
        await federation.hear("waiting for a round", times=GOOD + len(mistakes))
        run = await federation.submit(ONE_ROUND)
        async with asyncio.timeout(10):
            assert await counted(federation, run) == GOOD
        said = {site: [line for line in federation.said if f"{site}/" in line] for site in mistakes}
        assert any("'head'" in line and "is nan" in line for line in said["nan"]), said["nan"]
        assert any("body" in line and "(999,)" in line for line in said["shape"]), said["shape"]
        assert any("scan-0412" in line for line in said["broken"]), said["broken"]


class Gate:
    """Trains as the noisy app does, once it is open."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.trained: list[str] = []
        good = noisy_app()

        def train(task: Task) -> Update:
            assert self._open.wait(60)
            self.trained.append(task.site)
            return good.train(task)

        self.app = App(name=good.name, init=good.init, train=train)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Gate:
    return Gate()


async def test_a_controller_that_restarts_in_mid_round_goes_on_with_it(federate, gate):
    async with federate(REGIONS, app=gate.app) as federation:
        run = await federation.submit(job(rounds=2, min_regions=2, min_clients=3, evaluate_every=0))
        await federation.hear("round 1: training", times=GOOD)
        await federation.restart_controller()
        gate.open()
        found = await federation.outcome(run)
    assert found.summary.state == "finished"
    assert [(item.num_updates, item.attempts) for item in found.rounds] == [(GOOD, 1), (GOOD, 1)]
    assert sorted(gate.trained) == sorted(2 * [*REGIONS["eu"], *REGIONS["us"]]), "nobody trained twice"


async def test_clients_that_lose_their_intake_in_mid_round_hand_in_at_the_next(federate, gate):
    async with federate(REGIONS, app=gate.app) as federation:
        run = await federation.submit(ONE_ROUND)
        await federation.hear("round 1: training", times=GOOD)
        await federation.combiners["eu"].restart_intake(0)
        gate.open()
        assert await counted(federation, run) == GOOD
    assert len(gate.trained) == GOOD, "nobody trained twice"


async def test_clients_that_restart_hand_in_what_they_held(federate):
    """Their updates were folded, then lost with the intake, while they were away."""
    async with federate(REGIONS) as federation, with_peers(federation, "last") as (last,):
        run = await federation.submit(ONE_ROUND)
        plan = await last.offer()
        await federation.hear("round 1: handed in", times=GOOD)
        await federation.stop_clients("eu")
        await federation.combiners["eu"].restart_intake(0)
        federation.start_clients("eu")
        await federation.hear("held from before", times=3)
        (kit,) = [last.kit]
        async with Peer(kit, last.address) as back:
            assert await back.offer() == plan
            assert (await back.hand_in(plan, update(plan))).state == pb.RECEIPT_STATE_STAGED
            assert await counted(federation, run) == GOOD + 1
    assert sum("round 1: training" in line for line in federation.said) == GOOD
