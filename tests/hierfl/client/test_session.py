"""A client against a small combiner over real TLS: what it sends, what it keeps, what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hierfl.encodings import EncodingSpec
from hierfl.errors import StoreLocked
from hierfl.plan import Plan, task_seed
from hierfl.receipts import Receipt, ReceiptState
from hierfl.types import ClientRef, TaskKind
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import transfer
from hierfl.wire.convert import key_to_proto, receipt_to_proto

MakePlan = Callable[..., Plan]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something on the client's side that the combiner does not see."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def held_files(directory: Path) -> list[str]:
    return sorted(path.suffix for path in directory.rglob("updates/*"))


async def test_a_round_goes_from_the_offer_to_the_last_word(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: combiner.received)
        update = combiner.received[0]
        assert update.vectors["train"].tolist() == [0.5] * 4
        assert update.head.weight == 100  # clipped to the plan's cap, and said
        assert update.head.metrics == {
            "num_examples": 120,
            "train_loss_sum": 60 << 20,
            "eval_examples": 40,
            "eval_loss_sum": 10 << 20,
            "eval_correct": 30,
        }
        assert held_files(running.directory) == [".json", ".values"]
        combiner.tell_all(ReceiptState.SEALED)
        combiner.tell_all(ReceiptState.COMMITTED, version=1)
        await until(lambda: "counted in model version 1" in running.said)
    assert held_files(running.directory) == []
    assert "client-00: round 1: trained on 120 examples, loss 0.5, f1 0.9; its weight is clipped" in running.said
    assert "evaluated model version 0 on 40 examples, loss 0.25, accuracy 75.0%" in running.said
    assert "sealed in the region's sum" in running.said


async def test_receipts_that_come_along_with_an_offer_are_taken_up_and_the_offer_answered(
    combiner: Any, running: Any, plan: MakePlan
) -> None:
    first = combiner.offer(plan())
    async with running():
        await combiner.until(lambda: combiner.received)
        counted = replace(next(iter(combiner.book.values())), state=ReceiptState.COMMITTED, version=1)
        combiner.offers.remove(first)
        offer = combiner.offer_of(plan(round=2))
        combiner.push(pb.FollowResponse(offer=offer, receipts=[receipt_to_proto(counted)]))
        await combiner.until(lambda: len(combiner.received) == 2)
        assert "counted in model version 1" in running.said
        combiner.push(pb.FollowResponse(receipts=[receipt_to_proto(replace(counted, key=combiner.received[1].key))]))


@pytest.mark.parametrize(("spoil", "num_fetched"), [(False, 0), (True, 1)])
async def test_a_model_that_comes_along_is_not_fetched_unless_it_is_another(
    combiner: Any, running: Any, linear: Any, plan: MakePlan, model: Any, spoil: bool, num_fetched: int
) -> None:
    async with running():
        await combiner.until(lambda: "Follow" in combiner.calls)
        vectors = {name: vector + spoil for name, vector in model.vectors.items()}
        outgoing = transfer.Outgoing("model", model.layout.hash, vectors, meta=model.layout.to_bytes())
        combiner.push(pb.FollowResponse(offer=combiner.offer_of(plan()), model=outgoing.frames()))
        await combiner.until(lambda: combiner.received)
    assert combiner.calls.count("FetchModel") == num_fetched
    assert linear.calls[0].params["w"].tolist() == [1, 1, 1]


async def test_the_task_has_all_that_the_work_may_depend_on(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan(evaluate=False))
    async with running():
        await combiner.until(lambda: combiner.received)
    task = linear.calls[0]
    assert linear.evaluations == 0
    assert {name: array.tolist() for name, array in task.params.items()} == {"w": [1, 1, 1], "b": 0, "steps": 10}
    assert (task.config, task.site_config) == ({"step": 0.5}, {"data": "/here"})
    assert task.strategy == {"proximal_mu": 0.25}
    assert task.seed == task_seed(3, 1, ClientRef("eu", "site-00", "client-00"))  # type: ignore[arg-type]
    assert (task.round, task.run, task.region, task.site, task.client) == (1, "run-1", "eu", "site-00", "client-00")
    assert set(task.local) == {"steps"}


async def test_local_tensors_go_on_from_round_to_round_and_never_travel(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
    combiner.offer(plan(round=2))
    async with running():  # another process
        await combiner.until(lambda: len(combiner.received) == 2)
    assert [int(task.params["steps"]) for task in linear.calls] == [10, 11]
    assert all(update.vectors.keys() == {"train"} for update in combiner.received)


@pytest.mark.parametrize(
    ("signer", "changes", "code", "word"),
    [
        ("combiner", {}, "policy", "signed by the combiner of eu, not by the controller"),
        ("controller", {"region": "us"}, "policy", "for region us"),
        ("controller", {"federation": "other"}, "policy", "for region eu of other"),
        ("controller", {"app": "digits"}, "app_unknown", "for the app digits, here runs linear"),
        ("controller", {"app_version": "2"}, "app_unknown", "linear@2"),
        ("controller", {"encoding": EncodingSpec(name="int3")}, "requirement_unknown", "int3"),
        ("controller", {"requires": ("noise",)}, "requirement_unknown", "noise"),
    ],
)
async def test_an_offer_that_it_may_not_obey_is_declined_and_nothing_is_trained(
    combiner: Any, running: Any, linear: Any, plan: MakePlan, signer: str, changes: dict[str, Any], code: str, word: str
) -> None:
    combiner.offer(plan(**changes), signer=getattr(combiner.federation, signer))
    async with running():
        await combiner.until(lambda: combiner.declined)
    assert [declined for _, declined in combiner.declined] == [code]
    assert word in running.said
    assert not linear.calls


async def test_a_plan_that_was_changed_after_signing_is_refused(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    offer = combiner.offer(plan())
    offer.plan = replace(plan(), k=3).to_bytes()
    async with running():
        await combiner.until(lambda: combiner.declined)
    assert combiner.declined[0][1] == "policy"
    assert not linear.calls


async def test_a_site_may_ask_for_more_sites_in_a_sum(combiner: Any, running: Any, linear: Any, plan: MakePlan) -> None:
    combiner.offer(plan(k=2))
    async with running(min_k=3):
        await combiner.until(lambda: combiner.declined)
    assert combiner.declined[0][1] == "policy"
    assert "at least 3 (--min-k)" in running.said


async def test_an_older_leaders_offer_is_left_unanswered(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan(), epoch=5)
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
    combiner.offers.clear()
    combiner.offer(plan(round=2), epoch=4)  # from before, also for a process started anew
    combiner.offer(plan(round=3), epoch=5)
    async with running():
        await combiner.until(lambda: len(combiner.received) == 2)
    assert [task.round for task in linear.calls] == [1, 3]
    assert combiner.declined == []
    assert "leader epoch 4" in running.said


async def test_an_offer_said_twice_is_trained_once(combiner: Any, running: Any, linear: Any, plan: MakePlan) -> None:
    combiner.offer(plan())
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
        combiner.offer(plan())
        admitted = combiner.calls.count("Admit")
        await combiner.until(lambda: combiner.calls.count("Admit") > admitted)
    assert len(linear.calls) == 1
    assert len(combiner.received) == 1


async def test_an_intake_that_lost_the_update_gets_it_again_without_training(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
        combiner.book.clear()
        combiner.offer(plan())
        await combiner.until(lambda: len(combiner.received) == 2)
    assert combiner.received[0].digest == combiner.received[1].digest
    assert len(linear.calls) == 1


async def test_after_a_restart_the_held_update_is_sent_without_training(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.refuse_uploads = 10**6
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: "Upload refused" in combiner.calls)
    combiner.refuse_uploads = 0
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
    assert len(linear.calls) == 1
    assert "1 update(s) held from before" in running.said


async def test_what_became_of_an_update_is_asked_for_after_an_absence(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
    combiner.offers.clear()
    combiner.tell_all(ReceiptState.COMMITTED, version=1)
    async with running():
        await until(lambda: "counted in model version 1" in running.said)
    assert held_files(running.directory) == []


async def test_what_became_of_an_update_is_asked_for_until_it_is_answered(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
    combiner.offers.clear()
    combiner.tell_all(ReceiptState.COMMITTED, version=1)
    combiner.deaf = 2
    async with running():
        await until(lambda: "counted in model version 1" in running.said)
    assert combiner.calls.count("Follow") == 2, "one stream each: it was not a new one that asked again"


async def test_a_new_attempt_is_answered_with_the_same_bytes(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
        combiner.tell_all(ReceiptState.NOT_COUNTED, reason="attempt_abandoned")
        combiner.offer(plan(attempt=2))
        await combiner.until(lambda: len(combiner.received) == 2)
    first, second = combiner.received
    assert (first.key.attempt.attempt, second.key.attempt.attempt) == (1, 2)
    assert first.digest == second.digest
    assert len(linear.calls) == 1
    assert "round 1, attempt 2: answered with the update made before" in running.said


async def test_a_new_attempt_on_another_model_is_trained_again(
    combiner: Any, running: Any, linear: Any, plan: MakePlan, model: Any
) -> None:
    other = replace(model, vectors={"train": model.vectors["train"] + 1})
    combiner.models[other.hash] = other
    combiner.offer(plan())
    combiner.offer(plan(attempt=2, model=other))
    async with running():
        await combiner.until(lambda: len(combiner.received) == 2)
    assert len(linear.calls) == 2


async def test_a_lost_update_that_the_combiner_has_is_not_trained_again(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
    for path in running.directory.rglob("updates/*"):
        path.unlink()
    async with running():
        await until(lambda: "has this client's update already (staged)" in running.said)
    assert len(linear.calls) == 1


async def test_a_damaged_held_update_is_made_again(combiner: Any, running: Any, linear: Any, plan: MakePlan) -> None:
    combiner.refuse_uploads = 10**6
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: "Upload refused" in combiner.calls)
    combiner.refuse_uploads = 0
    values = next(running.directory.rglob("*.values"))
    values.write_bytes(values.read_bytes()[:-4] + b"\0\0\0\0")
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
    assert len(linear.calls) == 2
    assert "changed on disk" in running.said
    assert combiner.received[0].vectors["train"].tolist() == [0.5] * 4


def raising(task: Any) -> Any:
    raise ValueError("patient 4711 has no age")


def out_of_memory(task: Any) -> Any:
    raise MemoryError("1 TiB")


@pytest.mark.parametrize(
    ("train", "code", "sentence"),
    [
        (raising, "train_error", "train raised ValueError: patient 4711 has no age; details, which stay here, are in"),
        (out_of_memory, "out_of_memory", "train raised MemoryError"),
        (lambda task: {"w": 1}, "train_error", "train must return Update, not dict"),
        (
            lambda task: update({"w": np.full(3, np.nan)}),
            "out_of_range",
            "tensor 'w': its change at flat index 0",
        ),
        (lambda task: update({"b": np.inf}), "out_of_range", "tensor 'b': its change at flat index 0 is inf"),
        (lambda task: update({"w": np.array([0, 100, 0])}), "out_of_range", "flat index 1 is 99.0"),
        (lambda task: update({"w": np.zeros(4)}), "layout_mismatch", "'w' came in shape (4,)"),
        (lambda task: update({"v": np.zeros(4)}), "layout_mismatch", "a tensor 'v' that the run's model does not have"),
        (lambda task: update({}, num_examples=0), "declined", "nothing to count"),
        (lambda task: update({}, num_examples=-1), "train_error", "num_examples = -1"),
        (lambda task: update({}, num_examples=2.5), "train_error", "as a whole number, not 2.5"),
        (lambda task: update({}, metrics={"loss": "low"}), "train_error", "metric 'loss' as str"),
        (lambda task: update({}, metrics={"loss": np.nan}), "out_of_range", "'train_loss_sum' is nan"),
    ],
)
async def test_what_goes_wrong_in_the_app_is_declined_by_code_and_told_at_the_site_only(
    combiner: Any, running: Any, linear: Any, plan: MakePlan, train: Callable[[Any], Any], code: str, sentence: str
) -> None:
    linear.misbehave = train
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: combiner.declined)
    assert [declined for _, declined in combiner.declined] == [code]
    assert sentence in running.said
    assert all(b"4711" not in body for body in combiner.bodies)
    assert combiner.received == []
    if train is raising:
        assert "patient 4711" in next(running.directory.rglob("failures/*.txt")).read_text()


def update(changes: dict[str, Any], **fields: Any) -> Any:
    from hierfl.client.task import Update

    params = {"w": np.ones(3), "b": np.zeros(()), **{name: np.asarray(value) for name, value in changes.items()}}
    return Update(params, **{"num_examples": 5, **fields})


async def test_a_client_sits_a_round_out_by_raising_declined(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    from hierfl.client.task import Declined

    def train(task: Any) -> Any:
        raise Declined("no new patients")

    linear.misbehave = train
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: combiner.declined)
    assert combiner.declined[0][1] == "declined"
    assert "train sat this round out: no new patients" in running.said


async def test_an_app_with_another_model_than_the_runs_declines_before_training(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    linear.init = lambda config: {"w": np.ones(5, np.float32), "b": np.zeros((), np.float32), "steps": np.array(0)}
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: combiner.declined)
    assert combiner.declined[0][1] == "layout_mismatch"
    assert "tensor 'w'" in running.said
    assert not linear.calls


async def test_an_evaluation_sends_sums_and_no_vector(combiner: Any, running: Any, linear: Any, plan: MakePlan) -> None:
    combiner.offer(plan(kind=TaskKind.EVALUATE, groups=(), round=2))
    async with running():
        await combiner.until(lambda: combiner.received)
    update = combiner.received[0]
    assert update.vectors == {}
    assert update.head.weight == 1
    assert update.head.metrics == {"eval_examples": 40, "eval_loss_sum": 10 << 20, "eval_correct": 30}
    assert not linear.calls


async def test_an_app_without_evaluate_answers_an_evaluation_with_nothing(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    linear.can_evaluate = False
    combiner.offer(plan(kind=TaskKind.EVALUATE, groups=(), round=2))
    async with running():
        await combiner.until(lambda: combiner.received)
    assert combiner.received[0].head.metrics == {}


async def test_a_link_that_breaks_is_dialled_again_and_the_update_arrives(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.refuse_uploads = 10**6
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: "Upload refused" in combiner.calls)
        await combiner.stop()
        await until(lambda: "trying again" in running.said)
        combiner.refuse_uploads = 0
        await combiner.start()
        await combiner.until(lambda: len(combiner.received) == 1)
    assert len(linear.calls) == 1


async def test_two_clients_of_a_process_share_the_model_and_train_in_turn(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan())
    async with running(clients=2):
        await combiner.until(lambda: len(combiner.received) == 2)
    assert combiner.calls.count("FetchModel") == 1
    assert {task.client for task in linear.calls} == {"client-00", "client-01"}
    assert linear.calls[0].seed != linear.calls[1].seed


async def test_a_withdrawn_attempt_is_not_handed_in(combiner: Any, running: Any, linear: Any, plan: MakePlan) -> None:
    combiner.refuse_uploads = 10**6
    first = plan()
    combiner.offer(first)
    async with running():
        await combiner.until(lambda: "Upload refused" in combiner.calls)
        combiner.push(pb.FollowResponse(withdrawal=pb.Withdrawal(key=key_to_proto(first.key), reason="late")))
        await until(lambda: "this attempt is over (late)" in running.said)
        combiner.refuse_uploads = 0
        combiner.offers.clear()
        combiner.offer(plan(attempt=2))
        await combiner.until(lambda: len(combiner.received) == 1)
    assert combiner.received[0].key.attempt.attempt == 2
    assert len(linear.calls) == 1


async def test_an_update_the_region_calls_invalid_is_dropped(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
        combiner.tell_all(ReceiptState.NOT_COUNTED, reason="invalid")
        await until(lambda: "not counted (invalid)" in running.said)
        assert held_files(running.directory) == []


async def test_a_receipt_that_was_overtaken_does_not_take_an_acknowledgement_back(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
        combiner.tell_all(ReceiptState.SEALED)
        combiner.tell_all(ReceiptState.STAGED)
        combiner.tell_all(ReceiptState.SEALED)
        combiner.tell_all(ReceiptState.COMMITTED, version=2)
        await until(lambda: "version 2" in running.said)
    assert running.said.count("sealed in the region's sum") == 1


async def test_it_ends_by_itself_after_the_rounds_it_was_asked_for(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan())
    async with running(max_rounds=1) as task:
        await combiner.until(lambda: len(combiner.received) == 1)
        combiner.tell_all(ReceiptState.COMMITTED, version=1)
        async with asyncio.timeout(20):
            assert await task is False


async def test_two_processes_of_one_client_do_not_share_a_folder(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    async with running():
        await combiner.until(lambda: "Follow" in combiner.calls)
        async with running() as second:
            with pytest.raises(StoreLocked, match=r"client eu/site-00/client-00 already runs from .* its own --dir"):
                await second


async def test_a_receipt_of_another_update_changes_nothing(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: len(combiner.received) == 1)
        receipt = next(iter(combiner.book.values()))
        combiner.tell(replace(receipt, digest="blake3:" + "0" * 64, state=ReceiptState.COMMITTED, version=9))
        combiner.tell(replace(receipt, state=ReceiptState.SEALED))
        await until(lambda: "sealed" in running.said)
    assert isinstance(receipt, Receipt)
    assert "version 9" not in running.said
    assert held_files(running.directory) == [".json", ".values"]


async def test_a_ticket_that_grew_too_old_is_asked_for_again(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.late_tickets = 1
    combiner.offer(plan())
    async with running():
        await combiner.until(lambda: combiner.received)
    assert combiner.calls.count("Admit") == 2
    assert len(linear.calls) == 1


async def test_a_round_whose_model_is_gone_is_left_alone(
    combiner: Any, running: Any, linear: Any, plan: MakePlan
) -> None:
    combiner.models.clear()
    combiner.offer(plan())
    async with running():
        await until(lambda: "too late for this attempt" in running.said)
    assert combiner.declined == []
    assert not linear.calls


async def test_another_model_than_the_plan_names_is_not_trained_on(
    combiner: Any, running: Any, linear: Any, plan: MakePlan, model: Any
) -> None:
    combiner.models[model.hash] = replace(model, vectors={"train": model.vectors["train"] + 1})
    combiner.offer(plan())
    async with running():
        await until(lambda: "fetch it again" in running.said)
        combiner.models[model.hash] = model
        await combiner.until(lambda: combiner.received)
    assert linear.calls[0].params["w"].tolist() == [1, 1, 1]
