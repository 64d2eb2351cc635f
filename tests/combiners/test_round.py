"""One region's round over real gRPC and certificates, without Ray."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import numpy as np
import pytest

from combiners.attempt import Phase
from hierfl.border import verify_rows
from hierfl.errors import (
    CertificateUntrusted,
    DiskFull,
    HierFLError,
    LayoutMismatch,
    RoundClosed,
    StorageError,
    TransferIncomplete,
    ValueOutOfRange,
    WireError,
)
from hierfl.identity import Identity, RoleName
from hierfl.receipts import Receipt, ReceiptState
from hierfl.residency import ZonePolicy
from hierfl.types import UpdateKey
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc, tls
from hierfl.wire.convert import key_from_proto, key_to_proto


async def test_three_clients_become_one_exact_sum_and_learn_that_it_was_counted(
    start_combiner, controller, client_kits, connect, plan, toy_model
):
    async with start_combiner(intakes=2) as combiner:
        clients = [await connect(kit, combiner.addresses[n % 2]) for n, kit in enumerate(client_kits[:3])]
        await controller.offer(plan)
        assert [await client.offer() for client in clients] == [plan] * 3
        receipts = await asyncio.gather(
            *(client.hand_in(plan, value=0.5 * n, weight=n + 1) for n, client in enumerate(clients))
        )
        assert {receipt.state for receipt in receipts} == {2}  # STAGED
        key, head, partial, digest = await controller.partials.get()
        assert key == plan.key
        assert (head.num_sites, head.num_updates, head.weight, head.metrics) == (3, 3, 6, {"num_examples": 6})
        expected = sum((n + 1) * int(0.5 * n * 2**32) for n in range(3))
        assert np.array_equal(partial.sums["train"], np.full(3000, expected))
        assert [(await client.event("receipt")).state for client in clients] == [3] * 3  # SEALED
        controller.commit(plan, digest, toy_model(1.0))
        last = [await client.event("receipt") for client in clients]
        assert [(receipt.state, receipt.model_version) for receipt in last] == [(4, 1)] * 3  # COMMITTED
        assert [receipt.state for client in clients for receipt in await client.receipts(plan.key)] == [4] * 3


async def test_a_small_update_is_handed_in_with_its_request(start_combiner, controller, client_kits, connect, plan):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        for client in clients:
            await client.offer()
            outgoing, weight = client.update(plan)
            frames = list(outgoing.frames(plan.key))
            with pytest.raises(TransferIncomplete):
                await client.admit(plan.key, outgoing, weight, update=frames[:-1])
            with pytest.raises(WireError):
                await client.admit(plan.key, outgoing, weight, update=[frames[0], b"nonsense", frames[2]])
            whole = await client.admit(plan.key, outgoing, weight, update=frames)
            assert whole.receipt.state == pb.RECEIPT_STATE_STAGED
            assert await client.admit(plan.key, outgoing, weight, update=frames) == whole
        _, head, partial, _ = await controller.partials.get()
        assert (head.num_sites, head.num_updates) == (3, 3)
        assert np.array_equal(partial.sums["train"], np.full(3000, 3 * 2**32))


async def test_a_bad_small_update_is_refused_like_a_large_one(start_combiner, controller, client_kits, connect, plan):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:4])
        await controller.offer(plan)
        await clients[3].offer()
        outgoing, weight = clients[3].update(plan, value=np.nan)
        with pytest.raises(ValueOutOfRange, match="'train', value 0 is nan"):
            await clients[3].admit(plan.key, outgoing, weight, update=list(outgoing.frames(plan.key)))
        await asyncio.gather(*(client.hand_in(plan) for client in clients[:3]))
        _, head, _, _ = await controller.partials.get()
        assert head.num_updates == 3


async def test_only_a_small_update_may_come_with_its_request(start_combiner, controller, client_kits, connect, plan):
    async with start_combiner() as combiner:
        client, *_ = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await client.offer()
        outgoing, weight = client.update(plan)
        frames = list(outgoing.frames(plan.key))
        padded = [frames[0], frames[1] + bytes(131_072), frames[2]]
        for changes in {"update": padded}, {"update": frames, "length_bytes": 65_537}:
            with pytest.raises(WireError, match="only a small update"):
                await client.admit(plan.key, outgoing, weight, **changes)
        assert client.update(plan, vectors={"train": np.zeros(20_000, np.float32)})[0].small_frames(plan.key) == []
        assert (await client.admit(plan.key, outgoing, weight, update=frames)).receipt.state == pb.RECEIPT_STATE_STAGED


async def test_receipts_and_a_small_model_go_along_with_the_next_offer_for_clients_that_take_them(
    start_combiner, controller, client_kits, connect, plan, base, toy_model
):
    async with start_combiner() as combiner:
        address, kits = combiner.addresses[0], client_kits[:3]
        takes = {"takes_receipts_along": True, "takes_models_along": True}
        clients = [await connect(kits[0], address), *[await connect(kit, address, **takes) for kit in kits[1:]]]
        await controller.offer(plan)
        offered = [await next_offer(client) for client in clients]
        assert [list(event.model) for event in offered] == [[], *[list(base.outgoing.frames())] * 2]
        await asyncio.gather(*(client.hand_in(plan) for client in clients))
        *_, digest = await controller.partials.get()
        controller.commit(plan, digest, toy_model(1.0))
        assert (await clients[0].event("receipt")).state == pb.RECEIPT_STATE_SEALED
        assert (await clients[0].event("receipt")).state == pb.RECEIPT_STATE_COMMITTED
        seen = [await until_last_word(client) for client in clients[1:]]
        assert seen == [(pb.RECEIPT_STATE_COMMITTED, 1)] * 2


async def next_offer(client):
    async with asyncio.timeout(10):
        while not (event := await client.events.get()).HasField("offer"):
            continue
        return event


async def until_last_word(client):
    """The last word, whatever it came along with, or alone."""
    async with asyncio.timeout(10):
        while True:
            event = await client.events.get()
            said = [*event.receipts, *([event.receipt] if event.HasField("receipt") else [])]
            for receipt in said:
                if receipt.state == pb.RECEIPT_STATE_COMMITTED:
                    return receipt.state, receipt.model_version


async def joined(connect, combiner, kits):
    return [await connect(kit, combiner.addresses[n % len(combiner.addresses)]) for n, kit in enumerate(kits)]


async def test_the_same_update_gets_the_same_receipt_and_another_one_is_refused(
    start_combiner, controller, client_kits, connect, plan
):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        first, again = [await clients[0].hand_in(plan) for _ in range(2)]
        assert first == again
        other = await clients[0].hand_in(plan, value=2.0)
        assert (other.state, other.reason) == (pb.RECEIPT_STATE_NOT_COUNTED, "digest_conflict")
        assert [receipt.state for receipt in await clients[0].receipts(plan.key)] == [pb.RECEIPT_STATE_STAGED]


async def test_two_uploads_of_one_update_at_once_are_folded_once(
    start_combiner, controller, client_kits, connect, plan
):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        twin = await connect(client_kits[0], combiner.addresses[0])
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        await asyncio.gather(*(client.hand_in(plan) for client in (*clients, twin)))
        _, head, _, _ = await controller.partials.get()
        assert (head.num_updates, head.weight) == (3, 3)


BAD = {
    "NaN": ({"value": float("nan")}, ValueOutOfRange, "value 0 is nan"),
    "a value above the cap": ({"value": 9.0}, ValueOutOfRange, "at most 8"),
    "another shape": ({"vectors": {"train": np.zeros(5, np.float32)}}, LayoutMismatch, "20 bytes"),
    "another layout": ({"layout_hash": "ab" * 32}, LayoutMismatch, "abababababab"),
    "another base model": ({"base_model_hash": "cd" * 32}, WireError, "another base model"),
    "a metric that nobody declared": ({"metrics": {"secret": 1}}, ValueOutOfRange, "'secret' is not declared"),
    "a weight above the cap": ({"weight": 101}, ValueOutOfRange, "from 1 to 100"),
}


@pytest.mark.parametrize("what", BAD)
async def test_a_bad_update_is_refused_in_words_and_harms_nobody(
    what, start_combiner, controller, client_kits, connect, plan
):
    changes, error, words = BAD[what]
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:4])
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        with pytest.raises(error, match=words):
            await clients[3].hand_in(plan, **changes)
        await asyncio.gather(*(client.hand_in(plan) for client in clients[:3]))
        if what in ("another shape", "a weight above the cap"):  # refused at admission: it may still send a right one
            await clients[3].stub.Decline(pb.DeclineRequest(key=key_to_proto(plan.key), code="layout_mismatch"))
        _, head, _, _ = await controller.partials.get()
        assert head.num_updates == 3


async def test_half_an_upload_can_be_sent_again(start_combiner, controller, client_kits, connect, plan):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        outgoing, weight = clients[0].update(plan)
        ticket = (await clients[0].admit(plan.key, outgoing, weight)).ticket
        frames = list(outgoing.frames(plan.key, ticket))[:-1]
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await clients[0].stub.Upload(iter(frames))
        assert isinstance(clients[0].stub.error(failed.value), TransferIncomplete)
        assert (await clients[0].hand_in(plan)).state == pb.RECEIPT_STATE_STAGED


async def test_an_update_signed_by_nobody_it_could_be_from_is_not_admitted(
    start_combiner, controller, client_kits, connect, plan
):
    async with start_combiner() as combiner:
        client, *_ = await joined(connect, combiner, client_kits[:3])
        outgoing, weight = client.update(plan)
        with pytest.raises(CertificateUntrusted):
            await client.admit(plan.key, outgoing, weight, signature=client_kits[1].sign(b"x", b"hierfl.update/1"))


@pytest.mark.parametrize("change", [{"attempt": 2}, {"round": 2}, {"run": "run-9"}])
async def test_an_update_for_an_attempt_that_is_not_open_is_refused_by_name(
    change, start_combiner, controller, client_kits, connect, plan
):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await clients[0].offer()
        with pytest.raises(RoundClosed, match="is not open in this region"):
            await clients[0].hand_in(replace(plan, **change))


async def test_too_few_sites_and_nothing_leaves(start_combiner, controller, client_kits, connect, plan):
    async with start_combiner(policy=ZonePolicy(k=4, max_share=1.0)) as combiner:
        clients = await joined(connect, combiner, client_kits[:4])
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        await asyncio.gather(*(client.hand_in(plan) for client in clients[:3]))
        await clients[3].stub.Decline(pb.DeclineRequest(key=key_to_proto(plan.key), code="train_error"))
        abstained = await controller.abstained.get()
        assert (abstained.code, controller.partials.empty()) == ("too_few_sites", True)
        receipts = [await client.event("receipt") for client in clients[:3]]
        assert {(receipt.state, receipt.reason) for receipt in receipts} == {(5, "too_few_sites")}


async def test_a_client_that_connects_late_gets_the_open_offer_at_once(
    start_combiner, controller, client_kits, connect, plan
):
    async with start_combiner(intakes=2) as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await clients[0].offer()
        late = await connect(client_kits[3], combiner.addresses[1])
        assert await late.offer() == plan


async def test_when_an_intake_dies_its_clients_are_asked_again(start_combiner, controller, client_kits, connect, plan):
    async with start_combiner(intakes=2) as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        await asyncio.gather(*(client.hand_in(plan) for client in clients[:2]))
        await combiner.restart_intake(0)
        await clients[0].ended.wait()
        again = [await connect(client_kits[n], combiner.addresses[0]) for n in (0, 2)]
        await asyncio.gather(*(client.until_sealed(plan) for client in again))
        _, head, _, _ = await controller.partials.get()
        assert head.num_updates == 3


async def test_a_restarted_region_knows_its_receipts_and_sends_the_same_bytes_to_the_next_attempt(
    start_combiner, controller, client_kits, connect, plan, toy_model
):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await asyncio.gather(*(client.until_sealed(plan) for client in clients))
        first = await controller.partials.get()
        await combiner.kill()
    second_attempt = replace(plan, attempt=2)
    controller.withdraw(plan.key, "attempt_abandoned")
    async with start_combiner() as combiner:
        await controller.attached(2)
        assert [pending.digest for pending in controller.attachments[-1].pending] == [first[3]]
        client, *_ = await joined(connect, combiner, client_kits[:3])
        assert [receipt.state for receipt in await client.receipts(plan.key)] == [pb.RECEIPT_STATE_SEALED]
        await controller.offer(second_attempt)
        key, _, partial, digest = await controller.partials.get()
        assert (key, digest, partial) == (second_attempt.key, first[3], first[2])
        controller.commit(second_attempt, digest, toy_model(1.0))
        told = await client.event("receipt")
        assert (told.state, told.model_version, key_from_proto(told.key)) == (4, 1, plan.key)


async def test_a_record_that_does_not_name_the_partial_is_not_believed(
    start_combiner, controller, client_kits, connect, plan, toy_model, caplog
):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await asyncio.gather(*(client.until_sealed(plan) for client in clients))
        _, _, _, digest = await controller.partials.get()
        controller.commit(plan, digest, toy_model(1.0), counted="blake3:" + "00" * 32)
        await until(lambda: "is not believed" in caplog.text)
        assert [receipt.state for receipt in await clients[0].receipts(plan.key)] == [pb.RECEIPT_STATE_SEALED]


async def test_a_plan_that_the_controller_did_not_sign_is_ignored(
    start_combiner, controller, client_kits, combiner_kit, connect, plan, caplog
):
    async with start_combiner() as combiner:
        await joined(connect, combiner, client_kits[:3])
        forged = controller.offer_of(plan)
        forged.signature = combiner_kit.sign(b"anything", b"hierfl.plan/1")
        controller.say(pb.AttachResponse(offer=forged))
        await until(lambda: "an offer is ignored" in caplog.text)
        assert combiner.region.region.attempts == {}


async def test_a_plan_that_asks_for_sums_in_a_form_unknown_here_is_abstained_from(start_combiner, controller, plan):
    async with start_combiner():
        await controller.offer(replace(plan, partial_encoding="packed/2"))
        async with asyncio.timeout(10):
            abstained = await controller.abstained.get()
        assert (abstained.code, controller.partials.empty()) == ("policy", True)


async def test_an_uplink_that_fails_is_tried_again_under_the_same_key(
    start_combiner, controller, client_kits, connect, plan
):
    controller.refuse_uplinks = 2
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await asyncio.gather(*(client.until_sealed(plan) for client in clients))
        key, _, _, _ = await controller.partials.get()
        assert (key, controller.refuse_uplinks) == (plan.key, 0)


async def test_every_crossing_is_in_the_ledger_before_it_and_countersigned_after(
    start_combiner, controller, client_kits, connect, plan, toy_model, combiner_kit, controller_kit
):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await asyncio.gather(*(client.until_sealed(plan) for client in clients))
        _, _, _, digest = await controller.partials.get()
        await until(lambda: combiner.region.region.attempts[plan.key].phase is Phase.SEALED)
        rows = combiner.region.store.ledger.signed_rows()
        crossing, outcome = (row.row() for row in rows)
        assert (crossing.crossing.digest, crossing.crossing.num_sites) == (digest, 3)
        assert (outcome.outcome.of, outcome.outcome.result) == (1, "acknowledged")
        keys = {controller_kit.certificate_der: controller_kit.certificate}
        summary = verify_rows(rows, combiner_kit.ledger.certificate, keys)
        assert (summary.num_rows, summary.num_crossings, summary.countersigned) == (2, 1, 1)


async def test_operators_of_the_region_see_its_clients_by_name(
    start_combiner, controller, client_kits, connect, operator_kit
):
    async with start_combiner(intakes=2) as combiner:
        await joined(connect, combiner, client_kits[:2])
        server = Identity("test", RoleName.COMBINER, region="eu")
        channel = tls.open_channel(operator_kit, combiner.addresses[0], server)
        stub = rpc.stub(channel, "RegionOperatorService")
        listed: list[pb.ConnectedClient] = []
        async with asyncio.timeout(10):
            while len(listed) < 2:  # the intakes tell the Region a little after they welcome a client
                listed = list((await stub.ListClients(pb.ListClientsRequest())).clients)
        await channel.close()
        assert [(client.site, client.state) for client in listed] == [("site-00", "waiting"), ("site-01", "waiting")]


async def test_the_controller_hears_counts_and_no_names(start_combiner, controller, client_kits, connect, plan):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await asyncio.gather(*(client.until_sealed(plan) for client in clients))
        await until(lambda: any(p.phase == "sealed" for r in controller.reports for p in r.progress))
        last = controller.reports[-1]
        assert (last.clients_connected, last.sites_connected, last.bytes_from_sites > 3 * 4 * 3000) == (3, 3, True)
        assert b"site-0" not in b"".join(report.SerializeToString() for report in controller.reports)


async def test_a_drain_seals_what_is_enough_and_sends_it(start_combiner, controller, client_kits, connect, plan):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:4])
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        await asyncio.gather(*(client.hand_in(plan) for client in clients[:3]))
    _, head, _, _ = controller.partials.get_nowait()
    assert head.num_updates == 3


async def test_an_uplink_that_a_lost_session_cut_off_is_made_again(
    start_combiner, controller, client_kits, connect, plan
):
    controller.hang_uplinks = 1
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await asyncio.gather(*(client.until_sealed(plan) for client in clients))
        await until(lambda: controller.hang_uplinks == 0)
        controller.end_sessions()
        async with asyncio.timeout(10):
            key, _, _, _ = await controller.partials.get()
        assert key == plan.key


@pytest.mark.parametrize("trouble", [DiskFull("full"), StorageError("gone"), HierFLError("a bug")])
async def test_trouble_on_the_controllers_own_side_is_waited_for(
    trouble, start_combiner, controller, client_kits, connect, plan
):
    controller.troubles = {"Attach": [trouble], "Uplink": [trouble], "FetchModel": [trouble]}
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await asyncio.gather(*(client.until_sealed(plan) for client in clients))
        async with asyncio.timeout(10):
            key, _, _, _ = await controller.partials.get()
        assert (key, combiner.region.failed.done()) == (plan.key, False)


async def test_a_partial_sealed_for_an_earlier_attempt_is_settled_by_its_round(
    start_combiner, controller, client_kits, connect, plan, toy_model
):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await asyncio.gather(*(client.until_sealed(plan) for client in clients))
        _, _, _, digest = await controller.partials.get()
        controller.commit(replace(plan, attempt=2), digest, toy_model(1.0), of=plan.key)
        told = [await client.event("receipt") for client in clients]
        assert [(one.state, one.model_version) for one in told] == [(4, 1)] * 3
        assert combiner.region.store.pending() == []


async def test_a_verdict_on_training_without_its_record_is_not_believed(
    start_combiner, controller, client_kits, connect, plan, caplog
):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await asyncio.gather(*(client.until_sealed(plan) for client in clients))
        _, _, _, digest = await controller.partials.get()
        verdict = pb.Verdict(
            key=key_to_proto(plan.key), leader_epoch=1, committed=True, partial_digest=digest, model_version=1
        )
        controller.say(pb.AttachResponse(verdict=verdict))
        await until(lambda: "is not believed" in caplog.text)
        assert [receipt.state for receipt in await clients[0].receipts(plan.key)] == [pb.RECEIPT_STATE_SEALED]


async def test_a_last_word_stands_where_a_restarted_region_collects_again(
    start_combiner, controller, client_kits, connect, plan
):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        await clients[0].hand_in(plan)
        refused = Receipt(
            key=UpdateKey(plan.key, clients[0].ref),
            digest=clients[0].update(plan)[0].digest,
            state=ReceiptState.NOT_COUNTED,
            reason="too_few_sites",
        )
        combiner.region.store.record([refused])
        await combiner.kill()
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:4])
        await asyncio.gather(*(client.offer() for client in clients))
        told = await clients[0].hand_in(plan)
        assert (told.state, told.reason) == (pb.RECEIPT_STATE_NOT_COUNTED, "too_few_sites")
        await asyncio.gather(*(client.hand_in(plan) for client in clients[1:]))
        _, head, _, _ = await controller.partials.get()
        assert head.num_updates == 3
        assert [one.state for one in await clients[0].receipts(plan.key)] == [pb.RECEIPT_STATE_NOT_COUNTED]


async def test_two_runs_that_seal_at_once_each_have_their_sums(
    start_combiner, controller, client_kits, connect, plan, toy_model
):
    base = toy_model(2.0)
    controller.models[base.hash] = base.outgoing
    second = replace(plan, run="run-2", base=replace(plan.base, model_hash=base.hash))
    async with start_combiner(intakes=2) as combiner:
        slow = combiner.intakes[1].desk
        freeze, both_are_frozen = slow.freeze, asyncio.Event()

        async def freeze_late(key, seal_id):
            await both_are_frozen.wait()
            return await freeze(key, seal_id)

        slow.freeze = freeze_late
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await controller.offer(second)
        both = {(await client.offer()).run for client in clients for _ in range(2)}
        assert both == {"run-1", "run-2"}
        await asyncio.gather(*(client.hand_in(second) for client in clients))
        await asyncio.gather(*(client.hand_in(plan) for client in clients))
        attempts = combiner.region.region.attempts.values()
        await until(lambda: all(len(attempt.handed_over) == 1 for attempt in attempts))
        both_are_frozen.set()
        async with asyncio.timeout(10):
            runs = {(await controller.partials.get())[0].run for _ in range(2)}
        assert (runs, combiner.region.failed.done()) == ({"run-1", "run-2"}, False)


async def test_a_model_that_the_shelf_let_go_is_fetched_again_for_an_open_attempt(
    start_combiner, controller, client_kits, connect, plan, toy_model
):
    async with start_combiner() as combiner:
        clients = await joined(connect, combiner, client_kits[:3])
        await controller.offer(plan)
        await clients[0].offer()
        combiner.region.models._models.clear()
        assert (await combiner.region.model(plan.base.model_hash)).model_hash == plan.base.model_hash


async def until(condition) -> None:
    """Wait for something that no message announces; each turn of the loop looks again."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
