"""Intakes of one region: the list that they hand out, and what they do when more follow than may."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime

import grpc
import numpy as np
import pytest

from combiners.intake import reachable
from combiners.local import LocalCombiner
from combiners.settings import IntakeSettings
from combiners.supervisor import CombinerSettings
from hierfl.endpoints import Endpoint, Signed, accept_endpoints
from hierfl.errors import ComeBack, ConfigError
from hierfl.wire import hierfl_pb2 as pb


@pytest.mark.parametrize(
    ("bound", "advertise", "reached"),
    [
        ("10.0.0.7:7444", "", "10.0.0.7:7444"),
        ("0.0.0.0:7444", "", ""),
        ("[::]:7444", "", ""),
        ("0.0.0.0:7444", "eu.example:443", "eu.example:443"),
        ("0.0.0.0:7444", "eu.example:0", "eu.example:7444"),
        ("127.0.0.1:7444", "[2001:db8::1]:443", "[2001:db8::1]:443"),
    ],
)
def test_clients_are_told_an_address_that_they_can_dial(bound, advertise, reached):
    assert reachable(bound, advertise) == reached


def test_advertised_addresses_are_given_once_or_once_for_each_intake(tmp_path):
    def made(*advertise: str) -> list[str]:
        settings = CombinerSettings(kit=tmp_path, directory=tmp_path, intakes=2, advertise=advertise)
        return [settings.advertise_of(number) for number in range(2)]

    assert made() == ["", ""]
    assert made("eu.example:0") == ["eu.example:0"] * 2
    assert made("a:1", "b:2") == ["a:1", "b:2"]
    for wrong in (("a:1",), ("a:1", "b:2", "c:3"), ("nowhere",)):
        with pytest.raises(ConfigError):
            made(*wrong)


def listed(kit, message: pb.Endpoints) -> tuple[Endpoint, ...]:
    signed = Signed(document=message.document, signature=message.signature, certificate=message.certificate)
    return accept_endpoints(signed, kit.identity, kit.trust, (0, 0), datetime.now(UTC)).endpoints


async def test_clients_get_the_list_signed_at_once_or_when_it_is_made_and_again_when_it_changes(
    start_combiner, client_kits, connect
):
    async with start_combiner(intakes=2, settle_s=0.05) as combiner:
        early = await connect(client_kits[0], combiner.addresses[0])
        first = listed(early.kit, await early.event("endpoints"))
        assert {(one.name, one.address) for one in first} == {
            (f"intake-{number}", address) for number, address in enumerate(combiner.addresses)
        }
        await combiner.add_intake()
        second = listed(early.kit, await early.event("endpoints"))
        assert [one.name for one in second] == ["intake-0", "intake-1", "intake-2"]
        late = await connect(client_kits[1], combiner.addresses[1])
        stream = late.stub.Follow(pb.FollowRequest())
        welcome = (await stream.read()).welcome
        assert (welcome.intake, listed(late.kit, welcome.endpoints)) == ("intake-1", second)
        again = late.stub.Follow(pb.FollowRequest(endpoints_epoch=1, endpoints_version=2))
        assert not (await again.read()).welcome.HasField("endpoints"), "the client has this one"
        stream.cancel()
        again.cancel()


async def test_many_intakes_add_up_among_themselves_and_the_bits_are_the_same(
    start_combiner, controller, client_kits, connect, plan
):
    plan = replace(plan, min_clients=5)
    async with start_combiner(intakes=6) as combiner:
        clients = [await connect(kit, combiner.addresses[n]) for n, kit in enumerate(client_kits[:5])]
        added: list[int] = []
        for number, intake in enumerate(combiner.intakes):
            intake.desk.add = watched(intake.desk.add, number, added)
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        await asyncio.gather(*(client.hand_in(plan, value=0.1 * n, weight=n + 1) for n, client in enumerate(clients)))
        _, head, partial, _ = await controller.partials.get()
    assert added == [0, 1]
    assert (head.num_sites, head.num_updates, head.weight) == (5, 5, 15)
    expected = sum((n + 1) * round(float(np.float32(0.1 * n)) * 2**32) for n in range(5))
    assert np.array_equal(partial.sums["train"], np.full(3000, expected))


def watched(add, number: int, added: list[int]):
    async def call(hand_overs):
        added.append(number)
        return await add(hand_overs)

    return call


@pytest.fixture
async def small(combiner_kit, controller, settings, tmp_path):
    """A combiner with room for two, whose turns are short."""
    pace = IntakeSettings(max_following=2, least_turn_s=0.2, away_grace_s=0.3)
    region = replace(settings, settle_s=0.05)
    async with LocalCombiner(combiner_kit, tmp_path / "zone", controller.address, region=region, intake=pace) as made:
        await controller.attached()
        yield made


async def refused(client) -> ComeBack:
    """What a full intake answers to Follow."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        async for _ in client.stub.Follow(pb.FollowRequest(apps=[pb.App(name="toy", version="1")])):
            pass
    error = client.stub.error(failed.value)
    assert isinstance(error, ComeBack)
    return error


async def test_a_client_too_many_is_told_when_to_come_back_and_the_round_waits_for_it(
    small, controller, client_kits, connect, plan
):
    first, second = [await connect(kit, small.addresses[0]) for kit in client_kits[:2]]
    await controller.offer(plan)  # for three: begins once the third is known
    third = await connect(client_kits[2], small.addresses[0])  # nobody has anything to do: one makes room for it
    await asyncio.wait_for(first.ended.wait(), 10)
    await asyncio.gather(second.offer(), third.offer())
    error = await refused(first)
    assert 0 < error.after_s < 1
    await second.hand_in(plan)
    again = await connect(client_kits[0], small.addresses[0])  # the second is done, and makes room
    await again.offer()
    await asyncio.gather(again.hand_in(plan), third.hand_in(plan))
    _, head, _, _ = await controller.partials.get()
    assert head.num_updates == 3


async def test_a_client_is_back_before_its_broken_stream_is_noticed(small, client_kits, connect):
    first, _ = [await connect(kit, small.addresses[0]) for kit in client_kits[:2]]
    await connect(client_kits[0], small.addresses[0])
    await asyncio.wait_for(first.ended.wait(), 10)
    assert len(small.intakes[0].desk.followers) == 2


async def test_a_client_that_does_not_come_back_is_not_waited_for_for_ever(
    small, controller, client_kits, connect, plan
):
    for kit in client_kits[:2]:
        await connect(kit, small.addresses[0])
    third = await connect(client_kits[2], small.addresses[0])
    del third
    async with asyncio.timeout(10):
        while len(small.region.region.connected) != 3:
            await asyncio.sleep(0.01)
        while len(small.region.region.connected) != 2:
            await asyncio.sleep(0.01)
