"""A region and several controllers: it finds the one that leads, and obeys no one of before."""

from __future__ import annotations

import asyncio

import pytest

from combiners.local import LocalCombiner
from hierfl.errors import NotTheLeader
from hierfl.wire import hierfl_pb2 as pb


@pytest.fixture
async def standby(controller):
    """A second controller, which says that it stands by for as often as it is asked."""
    made = type(controller)(controller.kit)
    await made.start()
    made.troubles["Attach"] = [NotTheLeader("this controller stands by", controller.address) for _ in range(1000)]
    yield made
    await made.stop()


@pytest.fixture
def combiner_of(combiner_kit, tmp_path, settings):
    def make(*controllers):
        addresses = tuple(each.address for each in controllers)
        return LocalCombiner(combiner_kit, tmp_path / "zone", addresses, region=settings)

    return make


async def test_a_region_asks_the_next_controller_where_one_stands_by(combiner_of, controller, standby):
    async with combiner_of(standby, controller), asyncio.timeout(10):
        await controller.attached()
    assert standby.attachments == []


async def test_a_region_goes_over_to_the_next_leader_and_back(combiner_of, controller, standby):
    async with combiner_of(controller, standby), asyncio.timeout(20):
        await controller.attached()
        controller.troubles["Attach"] = [NotTheLeader("this controller stands by") for _ in range(1000)]
        standby.troubles["Attach"], standby.leader_epoch = [], 2
        controller.end_sessions()
        await standby.attached()
        assert standby.attachments[0].leader_epoch == 1  # it knows the first leader's, as soon as it has attached
        controller.troubles["Attach"], controller.leader_epoch = [], 3
        standby.troubles["Attach"] = [NotTheLeader("this controller stands by") for _ in range(1000)]
        standby.end_sessions()
        await controller.attached(2)
        assert controller.attachments[-1].leader_epoch == 2


async def test_a_region_leaves_a_controller_that_was_replaced_before_it_listens_to_it(
    combiner_of, controller, standby, plan, caplog
):
    """``controller`` was frozen when ``standby`` took over; it thaws, and believes that it leads."""
    standby.troubles["Attach"], standby.leader_epoch = [], 2
    async with combiner_of(standby, controller) as combiner, asyncio.timeout(20):
        await standby.attached()
        standby.troubles["Attach"] = [NotTheLeader("who leads is not clear yet") for _ in range(3)]
        controller.on_attach.append(pb.AttachResponse(offer=controller.offer_of(plan)))
        standby.end_sessions()
        await standby.attached(2)
        assert standby.attachments[-1].leader_epoch == 2
        assert combiner.region.region.attempts == {}
    assert "leader epoch 1 spoke after one of 2" in caplog.text
