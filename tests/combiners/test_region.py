"""The region's state machine: plain calls, events in and instructions out."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from combiners.attempt import TRANSITIONS, Phase, Step, next_phase
from combiners.events import (
    Abstain,
    AskAgain,
    AttemptOver,
    ClaimsAnswered,
    ClientDeclined,
    ClientJoined,
    ClientLeft,
    CloseAtIntakes,
    Drained,
    FetchModel,
    Freeze,
    HandedOver,
    IntakeJoined,
    IntakeVoid,
    ModelFailed,
    ModelReady,
    OfferTaken,
    OpenAtIntakes,
    PartialAcknowledged,
    PartialPruned,
    PartialSealed,
    Resume,
    Seal,
    SealFailed,
    SendPartial,
    SetTimer,
    StopSending,
    SumsGone,
    Tell,
    Timer,
    TimerFired,
    TimerKind,
    UpdateFolded,
    UpdateLetGo,
    VoidIntake,
)
from combiners.messages import Answer, App, Claim
from combiners.region import PRUNED, Region
from hierfl.errors import InvalidTransition
from hierfl.plan import Plan
from hierfl.receipts import Reason, ReceiptState
from hierfl.residency import ZonePolicy
from hierfl.types import ClientId, ClientRef, RegionId, RunId, SiteId, UpdateKey

TOY = (App("toy", "1"),)


def client(number: int) -> ClientRef:
    return ClientRef(RegionId("eu"), SiteId(f"site-{number}"), ClientId("client-00"))


def claim(plan: Plan, number: int, digest: str = "blake3:aa", weight: int = 1) -> Claim:
    return Claim(key=UpdateKey(plan.key, client(number)), digest=digest, weight=weight, signature=b"s")


class Harness:
    """A region with intakes a and b, and what it said last."""

    def __init__(self, policy: ZonePolicy | None = None, **more: object) -> None:
        policy = policy or ZonePolicy(k=2, max_share=1.0)
        self.region = Region(region_epoch=4, policy=policy, **more)  # type: ignore[arg-type]
        self.do(IntakeJoined("a"), IntakeJoined("b"))
        self.said: list[object] = []

    def do(self, *events: object) -> list[object]:
        self.said = self.region.handle(*events)  # type: ignore[arg-type]
        return self.said

    def join(self, *numbers: int, incarnation: str = "a") -> list[object]:
        return self.do(*(ClientJoined(incarnation=incarnation, client=client(n), apps=TOY) for n in numbers))

    def open(self, plan: Plan, *numbers: int) -> list[object]:
        """Take the plan with these clients there."""
        self.join(*numbers)
        self.do(OfferTaken(plan=plan, offer=b"offer"))
        return self.do(ModelReady(plan.key))

    def fold(self, plan: Plan, *numbers: int, incarnation: str = "a") -> list[object]:
        for number in numbers:
            assert self.region.claim(incarnation, claim(plan, number)).answer is Answer.GRANTED
        return self.do(*(UpdateFolded(incarnation, claim(plan, number).key) for number in numbers))

    def hand_over(self, plan: Plan, seal_id: str, a: tuple[int, ...], b: tuple[int, ...] = ()) -> list[object]:
        said: list[object] = []
        for incarnation, numbers in (("a", a), ("b", b)):
            entries = tuple(claim(plan, number) for number in numbers)
            said += self.do(HandedOver(incarnation=incarnation, key=plan.key, seal_id=seal_id, entries=entries))
        return said

    def seal(self, plan: Plan, *numbers: int) -> Seal:
        """All the way to the seal being written, all folded at intake a."""
        self.open(plan, *numbers)
        self.fold(plan, *numbers)
        (instruction,) = self.hand_over(plan, self.freeze.seal_id, numbers)
        assert isinstance(instruction, Seal)
        return instruction

    @property
    def freeze(self) -> Freeze:
        return next(one for one in self.said if isinstance(one, Freeze))

    def phase(self, plan: Plan) -> Phase:
        return self.region.attempts[plan.key].phase


@pytest.fixture
def harness() -> Harness:
    return Harness()


def only(said: list[object], kind: type) -> list[object]:
    return [one for one in said if isinstance(one, kind)]


@pytest.mark.parametrize(("phase", "step"), list(product(Phase, Step)))
def test_every_phase_and_step_is_in_the_table_or_refused(phase, step):
    if (phase, step) in TRANSITIONS:
        assert next_phase(phase, step) is TRANSITIONS[phase, step]
    else:
        with pytest.raises(InvalidTransition):
            next_phase(phase, step)


def test_an_attempt_fetches_waits_for_its_clients_and_opens(harness, plan):
    fetch = harness.do(OfferTaken(plan=plan, offer=b"offer"))
    deadline = Timer(kind=TimerKind.DEADLINE, key=plan.key)
    assert fetch == [SetTimer(deadline, pytest.approx(54.0)), FetchModel(plan)]
    assert harness.do(ModelReady(plan.key)) == []
    assert harness.join(0, 1) == []
    assert harness.join(2) == [OpenAtIntakes(key=plan.key, offer=b"offer")]
    assert [opening.key for opening in harness.region.openings()] == [plan.key]


def test_clients_of_another_app_are_not_waited_for(harness, plan):
    harness.do(ClientJoined(incarnation="a", client=client(9), apps=(App("other", "1"),)))
    assert harness.open(plan, 0, 1) == []
    assert harness.phase(plan) is Phase.WAITING


def test_it_closes_when_all_that_are_expected_are_in(harness, plan):
    harness.open(plan, 0, 1, 2, 3)
    assert only(harness.fold(plan, 0, 1, 2), Freeze) == []
    harness.fold(plan, 3)
    assert harness.said == [Freeze(key=plan.key, seal_id="4-1", incarnations=("a", "b"))]


def test_it_closes_when_all_are_granted_and_the_freeze_waits_for_what_is_being_folded(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.fold(plan, 0, 1)
    assert harness.region.claim("a", claim(plan, 2)).answer is Answer.GRANTED
    assert harness.do(ClaimsAnswered(plan.key)) == [Freeze(key=plan.key, seal_id="4-1", incarnations=("a", "b"))]
    (seal,) = harness.hand_over(plan, "4-1", (0, 1, 2))
    assert len(seal.receipts) == 3


def test_what_is_granted_and_not_handed_over_is_asked_again_before_the_seal(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.fold(plan, 0, 1)
    harness.region.claim("a", claim(plan, 2))
    harness.do(ClaimsAnswered(plan.key))
    said = harness.hand_over(plan, harness.freeze.seal_id, (0, 1))
    assert only(said, AskAgain) == [AskAgain(key=plan.key, clients=(client(2),))]
    assert only(said, Seal) == []
    assert harness.phase(plan) is Phase.COLLECTING


def test_a_client_that_joins_while_it_is_open_is_waited_for(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.join(3)
    assert only(harness.fold(plan, 0, 1, 2), Freeze) == []


def test_who_declines_or_stays_away_is_not_waited_for_once_enough_are_in(harness, plan):
    harness.open(plan, 0, 1, 2, 3, 4)
    harness.fold(plan, 0, 1, 2)
    harness.do(ClientDeclined(claim(plan, 3).key))
    timer = Timer(kind=TimerKind.GONE, client=client(4))
    assert harness.do(ClientLeft(incarnation="a", client=client(4))) == [SetTimer(timer, 6.0)]
    assert only(harness.do(TimerFired(timer)), Freeze)


def test_a_client_that_comes_back_within_the_grace_is_waited_for(harness, plan):
    harness.open(plan, 0, 1, 2, 3)
    harness.fold(plan, 0, 1, 2)
    harness.do(ClientLeft(incarnation="a", client=client(3)))
    harness.join(3, incarnation="b")
    assert harness.do(TimerFired(Timer(kind=TimerKind.GONE, client=client(3)))) == []


def test_the_deadline_seals_what_is_enough(harness, plan):
    harness.open(plan, 0, 1, 2, 3)
    harness.fold(plan, 0, 1, 2)
    assert only(harness.do(TimerFired(Timer(kind=TimerKind.DEADLINE, key=plan.key))), Freeze)


def test_the_deadline_abstains_where_it_is_too_few(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.fold(plan, 0, 1)
    tell, close, abstain = harness.do(TimerFired(Timer(kind=TimerKind.DEADLINE, key=plan.key)))
    assert [(receipt.state, receipt.reason) for receipt in tell.receipts] == [("not_counted", "too_few_sites")] * 2
    assert (close, abstain) == (
        CloseAtIntakes(plan.key, Reason.TOO_FEW_SITES),
        Abstain(plan.key, Reason.TOO_FEW_SITES),
    )


def test_it_abstains_soon_when_too_few_can_still_answer(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.do(ClientDeclined(claim(plan, 0).key))
    hopeless = Timer(kind=TimerKind.HOPELESS, key=plan.key)
    assert harness.said == [SetTimer(hopeless, 6.0)]
    assert only(harness.do(TimerFired(hopeless)), Abstain) == [Abstain(plan.key, Reason.TOO_FEW_SITES)]


def test_one_site_with_two_clients_is_one_site(plan):
    harness = Harness()
    two = [ClientRef(RegionId("eu"), SiteId("site-0"), ClientId(f"client-{n}")) for n in range(3)]
    harness.do(*(ClientJoined(incarnation="a", client=one, apps=TOY) for one in two))
    harness.do(OfferTaken(plan=plan, offer=b"offer"), ModelReady(plan.key))
    assert harness.phase(plan) is Phase.WAITING


def test_a_site_that_dominates_keeps_the_sum_at_home(plan):
    harness = Harness(ZonePolicy(k=2, max_share=0.5))
    harness.open(plan, 0, 1, 2)
    for number, weight in ((0, 60), (1, 1), (2, 1)):
        harness.region.claim("a", claim(plan, number, weight=weight))
        harness.do(UpdateFolded("a", claim(plan, number).key))
    entries = tuple(claim(plan, number, weight=weight) for number, weight in ((0, 60), (1, 1), (2, 1)))
    harness.do(HandedOver(incarnation="b", key=plan.key, seal_id="4-1", entries=()))
    said = harness.do(HandedOver(incarnation="a", key=plan.key, seal_id="4-1", entries=entries))
    assert only(said, Abstain) == [Abstain(plan.key, Reason.DOMINATED)]


# ---------------------------------------------------------------- claims


def test_a_claim_is_granted_once_and_the_same_answer_comes_again(harness, plan):
    harness.open(plan, 0, 1, 2)
    first, again = (harness.region.claim("a", claim(plan, 0)) for _ in range(2))
    assert first == again
    assert first.answer is Answer.GRANTED
    elsewhere = harness.region.claim("b", claim(plan, 0))
    assert (elsewhere.answer, elsewhere.receipt.state) == (Answer.KNOWN, ReceiptState.CLAIMED)


def test_another_digest_under_a_key_is_refused(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.region.claim("a", claim(plan, 0))
    other = harness.region.claim("a", claim(plan, 0, digest="blake3:bb"))
    assert (other.answer, other.reason) == (Answer.REFUSED, Reason.DIGEST_CONFLICT)


def test_claims_beyond_the_region_share_of_the_weight_are_refused(harness, plan):
    plan = replace(plan, caps=replace(plan.caps, region_weight=150))
    harness.open(plan, 0, 1, 2)
    assert harness.region.claim("a", claim(plan, 0, weight=100)).answer is Answer.GRANTED
    refused = harness.region.claim("a", claim(plan, 1, weight=51))
    assert (refused.answer, refused.reason) == (Answer.REFUSED, Reason.WEIGHT_SHARE)
    assert harness.region.claim("a", claim(plan, 1, weight=50)).answer is Answer.GRANTED


@pytest.mark.parametrize("attempt", [2, 3])
def test_a_claim_for_an_attempt_that_is_not_open_is_refused_by_name(harness, plan, attempt):
    harness.open(plan, 0, 1, 2)
    refused = harness.region.claim("a", claim(replace(plan, attempt=attempt), 0))
    assert (refused.answer, refused.reason) == (Answer.REFUSED, Reason.UNKNOWN_ATTEMPT)


def test_a_void_incarnation_is_granted_nothing(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.do(IntakeVoid("a"))
    assert harness.region.claim("a", claim(plan, 0)).answer is Answer.REFUSED


def test_while_it_seals_claims_have_to_wait(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.fold(plan, 0, 1, 2)
    assert harness.region.claim("a", claim(plan, 3)).answer is Answer.LATER


def test_after_the_seal_claims_are_late(harness, plan):
    harness.seal(plan, 0, 1, 2)
    harness.do(PartialSealed(plan.key, "blake3:sealed"))
    late = harness.region.claim("a", claim(plan, 3))
    assert (late.answer, late.reason) == (Answer.REFUSED, Reason.LATE)


def test_a_claim_that_was_let_go_can_be_made_again(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.region.claim("a", claim(plan, 0, weight=7))
    harness.do(UpdateLetGo("a", claim(plan, 0).key))
    assert harness.region.attempts[plan.key].cohort.weight == 0
    assert harness.region.claim("b", claim(plan, 0, digest="blake3:bb")).answer is Answer.GRANTED


# ---------------------------------------------------------------- the seal


def test_a_seal_takes_what_every_live_incarnation_handed_over(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.fold(plan, 0, 1)
    harness.fold(plan, 2, incarnation="b")
    (instruction,) = harness.hand_over(plan, "4-1", (0, 1), (2,))
    assert instruction.entries == {"a": (claim(plan, 0), claim(plan, 1)), "b": (claim(plan, 2),)}
    assert {receipt.state for receipt in instruction.receipts} == {ReceiptState.SEALED}
    assert harness.do(PartialSealed(plan.key, "blake3:sealed")) == [
        CloseAtIntakes(plan.key, Reason.LATE),
        SendPartial(plan.key, "blake3:sealed"),
    ]
    harness.do(PartialAcknowledged(plan.key))
    assert harness.phase(plan) is Phase.SEALED


def test_an_incarnation_that_dies_while_sealing_sends_its_clients_back_to_be_asked(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.fold(plan, 0, 1)
    harness.fold(plan, 2, incarnation="b")
    harness.do(HandedOver(incarnation="a", key=plan.key, seal_id="4-1", entries=(claim(plan, 0), claim(plan, 1))))
    assert harness.do(IntakeVoid("b")) == [
        AskAgain(key=plan.key, clients=(client(2),)),
        Resume(plan.key, "4-1"),
        OpenAtIntakes(key=plan.key, offer=b"offer"),
    ]
    assert harness.region.claim("a", claim(plan, 2)).answer is Answer.GRANTED
    assert only(harness.do(UpdateFolded("a", claim(plan, 2).key)), Freeze)[0].seal_id == "4-2"


def test_past_the_deadline_it_seals_without_the_incarnation_that_died(harness, plan):
    harness.open(plan, 0, 1, 2, 3)
    harness.fold(plan, 0, 1, 2)
    harness.fold(plan, 3, incarnation="b")
    harness.do(TimerFired(Timer(kind=TimerKind.DEADLINE, key=plan.key)))
    entries = tuple(claim(plan, number) for number in (0, 1, 2))
    harness.do(HandedOver(incarnation="a", key=plan.key, seal_id="4-1", entries=entries))
    _, seal = harness.do(IntakeVoid("b"))
    assert [receipt.key.client for receipt in seal.receipts] == [client(0), client(1), client(2)]


def test_sums_that_are_lost_before_they_are_sealed_send_their_clients_back_to_be_asked(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.fold(plan, 0, 1)
    harness.fold(plan, 2, incarnation="b")
    (seal,) = harness.hand_over(plan, "4-1", (0, 1), (2,))
    assert isinstance(seal, Seal)
    assert harness.do(IntakeVoid("a"))[-1] != Abstain(plan.key, Reason.STORAGE), "its sums may be read by now"
    assert harness.phase(plan) is Phase.WRITING
    assert harness.do(SumsGone(plan.key, "a")) == [
        AskAgain(key=plan.key, clients=(client(0), client(1))),
        Resume(plan.key, "4-1"),
        OpenAtIntakes(key=plan.key, offer=b"offer"),
    ]
    harness.join(0, 1, incarnation="b")
    harness.fold(plan, 0, 1, incarnation="b")
    assert harness.freeze.seal_id == "4-2"
    (again,) = harness.do(
        HandedOver(
            incarnation="b", key=plan.key, seal_id="4-2", entries=tuple(claim(plan, number) for number in (0, 1, 2))
        )
    )
    assert len(again.receipts) == 3


def test_past_the_deadline_it_seals_without_the_sums_that_are_lost(harness, plan):
    harness.open(plan, 0, 1, 2, 3)
    harness.fold(plan, 0, 1, 2)
    harness.fold(plan, 3, incarnation="b")
    harness.do(TimerFired(Timer(kind=TimerKind.DEADLINE, key=plan.key)))
    harness.hand_over(plan, "4-1", (0, 1, 2), (3,))
    _, seal = harness.do(SumsGone(plan.key, "b"))
    assert [receipt.key.client for receipt in seal.receipts] == [client(0), client(1), client(2)]


def test_sums_that_are_lost_after_they_were_sealed_are_no_loss(harness, plan):
    harness.seal(plan, 0, 1, 2)
    harness.do(PartialSealed(plan.key, "blake3:sealed"))
    assert harness.do(SumsGone(plan.key, "a"), SumsGone(replace(plan, attempt=9).key, "a")) == []


def test_an_intake_that_lists_what_it_never_claimed_is_void(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.fold(plan, 0, 1, 2)
    said = harness.do(HandedOver(incarnation="b", key=plan.key, seal_id="4-1", entries=(claim(plan, 3),)))
    assert only(said, VoidIntake) == [VoidIntake("b")]
    entries = tuple(claim(plan, number) for number in (0, 1, 2))
    assert only(harness.do(HandedOver(incarnation="a", key=plan.key, seal_id="4-1", entries=entries)), Seal)


def test_an_intake_that_lists_another_weight_than_it_claimed_is_void(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.fold(plan, 0, 1, 2)
    entries = (claim(plan, 0), claim(plan, 1), claim(plan, 2, weight=9))
    said = harness.do(HandedOver(incarnation="a", key=plan.key, seal_id="4-1", entries=entries))
    assert only(said, VoidIntake) == [VoidIntake("a")]


def test_a_hand_over_of_an_older_seal_is_ignored(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.fold(plan, 0, 1, 2)
    assert harness.hand_over(plan, "3-1", (0, 1, 2)) == []


def test_a_seal_that_cannot_be_written_is_not_counted(harness, plan):
    harness.seal(plan, 0, 1, 2)
    tell, _, abstain = harness.do(SealFailed(plan.key, Reason.STORAGE))
    assert {receipt.reason for receipt in tell.receipts} == {"storage"}
    assert abstain == Abstain(plan.key, Reason.STORAGE)


def test_the_base_model_that_cannot_be_had_means_to_abstain(harness, plan):
    harness.do(OfferTaken(plan=plan, offer=b"offer"))
    assert harness.do(ModelFailed(plan.key, Reason.STORAGE)) == [Abstain(plan.key, Reason.STORAGE)]


# ---------------------------------------------------------------- one release for one base


def test_a_new_attempt_on_the_same_base_gets_the_same_sealed_bytes(harness, plan):
    harness.seal(plan, 0, 1, 2)
    harness.do(PartialSealed(plan.key, "blake3:sealed"))
    again = replace(plan, attempt=2)
    said = harness.do(OfferTaken(plan=again, offer=b"offer"))
    assert said[0] == StopSending(plan.key)
    assert said[-1] == SendPartial(again.key, "blake3:sealed")
    assert plan.key not in harness.region.attempts


def test_what_was_released_and_pruned_is_never_released_again(harness, plan):
    pair = (plan.base.model_hash, plan.task.hash)
    harness = Harness(released={pair: "blake3:sealed"})
    harness.do(PartialPruned(*pair))
    assert harness.region.released == {pair: PRUNED}
    said = harness.do(OfferTaken(plan=plan, offer=b"offer"))
    assert only(said, Abstain) == [Abstain(plan.key, Reason.ALREADY_RELEASED)]


def test_two_runs_over_the_same_base_and_task_share_one_collection(harness, plan):
    other = replace(plan, run=RunId("run-2"))
    harness.open(plan, 0, 1, 2)
    harness.do(OfferTaken(plan=other, offer=b"offer"))
    assert harness.phase(other) is Phase.DEFERRED
    harness.fold(plan, 0, 1, 2)
    harness.hand_over(plan, "4-1", (0, 1, 2))
    said = harness.do(PartialSealed(plan.key, "blake3:sealed"))
    assert [one.key for one in only(said, SendPartial)] == [plan.key, other.key]


def test_when_the_first_of_two_runs_gives_up_the_other_collects_itself(harness, plan):
    other = replace(plan, run=RunId("run-2"))
    harness.open(plan, 0, 1, 2)
    harness.do(OfferTaken(plan=other, offer=b"offer"))
    assert only(harness.do(AttemptOver(plan.key, Reason.RUN_CANCELLED)), FetchModel) == [FetchModel(other)]


# ---------------------------------------------------------------- ends


def test_a_withdrawn_attempt_tells_its_clients_and_an_older_one_ends_by_itself(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.fold(plan, 0)
    said = harness.do(OfferTaken(plan=replace(plan, attempt=2), offer=b"offer"))
    tell = only(said, Tell)[0]
    assert [receipt.reason for receipt in tell.receipts] == ["attempt_abandoned"]
    assert only(said, CloseAtIntakes) == [CloseAtIntakes(plan.key, Reason.ATTEMPT_ABANDONED)]


def test_a_verdict_on_a_sealed_attempt_leaves_its_receipts_to_the_store(harness, plan):
    harness.seal(plan, 0, 1, 2)
    harness.do(PartialSealed(plan.key, "blake3:sealed"), PartialAcknowledged(plan.key))
    assert harness.do(AttemptOver(plan.key, Reason.LATE)) == []
    assert harness.region.attempts == {}


def test_events_of_an_attempt_that_is_over_are_ignored(harness, plan):
    harness.open(plan, 0, 1, 2)
    harness.do(AttemptOver(plan.key, Reason.RUN_CANCELLED))
    late = [
        ModelReady(plan.key),
        UpdateFolded("a", claim(plan, 0).key),
        UpdateLetGo("a", claim(plan, 0).key),
        ClientDeclined(claim(plan, 0).key),
        HandedOver(incarnation="a", key=plan.key, seal_id="4-1", entries=()),
        SealFailed(plan.key, Reason.STORAGE),
        PartialAcknowledged(plan.key),
        AttemptOver(plan.key, Reason.LATE),
        TimerFired(Timer(kind=TimerKind.DEADLINE, key=plan.key)),
        TimerFired(Timer(kind=TimerKind.HOPELESS, key=plan.key)),
    ]
    assert harness.do(*late) == []


def test_more_runs_than_it_can_serve_are_refused(plan):
    harness = Harness(capacity=1)
    harness.do(OfferTaken(plan=plan, offer=b"offer"))
    other = replace(plan, run=RunId("run-2"), base=replace(plan.base, model_hash="another"))
    assert only(harness.do(OfferTaken(plan=other, offer=b"offer")), Abstain) == [Abstain(other.key, Reason.CAPACITY)]


def test_an_offer_said_again_is_answered_as_it_stands(harness, plan):
    harness.open(plan, 0, 1, 2)
    assert harness.do(OfferTaken(plan=plan, offer=b"signed anew")) == [
        OpenAtIntakes(key=plan.key, offer=b"signed anew")
    ]
    harness.do(TimerFired(Timer(kind=TimerKind.DEADLINE, key=plan.key)))
    assert harness.do(OfferTaken(plan=plan, offer=b"")) == [Abstain(plan.key, Reason.TOO_FEW_SITES)]


def test_a_drain_seals_what_is_enough_and_hands_the_rest_back(harness, plan):
    enough, few = plan, replace(plan, run=RunId("run-2"), base=replace(plan.base, model_hash="another"))
    harness.open(enough, 0, 1, 2, 3)
    harness.open(few)
    harness.fold(enough, 0, 1, 2)
    harness.fold(few, 0)
    said = harness.do(Drained())
    assert [one.key for one in only(said, Freeze)] == [enough.key]
    assert only(said, CloseAtIntakes) == [CloseAtIntakes(few.key, Reason.REGION_SILENT)]
    assert only(said, Tell) == []
    assert few.key not in harness.region.attempts


def test_an_intake_that_joins_during_a_seal_is_told_of_the_attempt_when_that_goes_on(harness, plan):
    harness.open(plan, 0, 1)
    harness.join(2, incarnation="b")
    harness.fold(plan, 0, 1)
    harness.fold(plan, 2, incarnation="b")
    seal_id = harness.freeze.seal_id
    harness.do(IntakeVoid("b"), IntakeJoined("c"))
    assert harness.region.openings() == ()
    handed = HandedOver(incarnation="a", key=plan.key, seal_id=seal_id, entries=(claim(plan, 0), claim(plan, 1)))
    said = harness.do(handed)
    assert said == [Resume(plan.key, seal_id), OpenAtIntakes(key=plan.key, offer=b"offer")]


def test_a_partial_on_its_way_is_sent_again_when_it_is_asked_for_again(harness, plan):
    harness.seal(plan, 0, 1, 2)
    harness.do(PartialSealed(plan.key, "blake3:ff"))
    assert harness.do(OfferTaken(plan=plan, offer=b"anew")) == [SendPartial(plan.key, "blake3:ff")]
