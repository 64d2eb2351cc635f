"""What the controller's words do to the region: offers, verdicts, withdrawals; and the partials sent to it.

Every plan and record is checked against the controller's CA before it means anything. A ledger row is
durable before the bytes of a partial leave, and another says what came of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from combiners.events import AttemptOver, OfferTaken, PartialAcknowledged, PartialPruned, SealFailed
from combiners.models import MAX_MODEL_BYTES
from combiners.sealed import Sealed
from combiners.trust import accept_offer, accept_record, check_countersignature
from hierfl import observe
from hierfl.border import Control, Outcome
from hierfl.errors import DigestMismatch, HierFLError, IdentityError, Refused, RoundClosed, StaleEpoch, StorageError
from hierfl.failpoints import reach
from hierfl.identity import Identity, RoleName
from hierfl.plan import Plan
from hierfl.receipts import Reason, ReceiptEvent
from hierfl.records import CommitRecord
from hierfl.residency import objection_to_resending
from hierfl.types import AttemptKey, RunId, TaskKind
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.convert import key_from_proto, key_to_proto

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from combiners.host import RegionHost

__all__ = ["Session"]

logger = logging.getLogger(__name__)

ACKNOWLEDGED = "acknowledged"
ENDS_RUN = (Reason.RUN_CANCELLED, Reason.RUN_FAILED)
SETTLE_S = 10.0
"""A sum that is to be rounded waits for so long for a verdict on an earlier one that is being settled."""
INFORMED_S = 2.0
"""Seconds after attaching within which the controller has sent every open offer."""


class Session:
    """See the module. Implements ``UplinkEvents``."""

    def __init__(self, host: RegionHost) -> None:
        self._host = host
        self._destination = Identity(federation=host.kit.identity.federation, role=RoleName.CONTROLLER).uri
        self._greeted_by = 0
        """Highest leader epoch that greeted this start of the region; those of offers and verdicts are durable."""
        self.is_informed = False
        """Whether the controller has said, since this start, which attempts are open."""
        self._settling: dict[asyncio.Task[None], RunId] = {}
        self._away_since_s: float | None = time.monotonic()

    @property
    def is_orphaned(self) -> bool:
        """Whether the controller has been away for ``orphan_s``."""
        since_s = self._away_since_s
        return since_s is not None and time.monotonic() - since_s > self._host.settings.orphan_s

    # ------------------------------------------------------------ UplinkEvents

    async def attach_request(self) -> pb.AttachRequest:
        host = self._host
        pending = await host.on_disk(host.store.pending)
        return pb.AttachRequest(
            region_epoch=host.store.region_epoch,
            store_id=host.store.store_id,
            capacity=host.settings.capacity,
            leader_epoch=await self._known_epoch(),
            pending=[pb.PendingPartial(key=key_to_proto(one.key), digest=one.digest) for one in pending],
        )

    async def _known_epoch(self) -> int:
        """Highest leader epoch seen: whoever has a lower one has been replaced."""
        store = self._host.store
        return max(self._greeted_by, await self._host.on_disk(lambda: store.leader_epoch))

    def report_request(self) -> pb.ReportRequest:
        return self._host.reception.report_request()

    async def attached(self, leader_epoch: int) -> None:
        """What is open is said right after this: from then on, what was not said is closed.

        Raises:
            StaleEpoch: A later leader is known: this one has been replaced, and learns nothing from us.
        """
        known = await self._known_epoch()
        if leader_epoch < known:
            raise StaleEpoch(f"a controller of leader epoch {leader_epoch} spoke after one of {known}; it must stop")
        self._greeted_by = leader_epoch
        self._away_since_s = None
        asyncio.get_running_loop().call_later(INFORMED_S, self._inform)

    def _inform(self) -> None:
        self.is_informed = True

    async def detached(self, control: Control) -> None:
        """One ledger row for the session's control traffic; none where nothing went out."""
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
        if control.counts:
            await self._append(control)

    async def offered(self, offer: pb.Offer) -> None:
        """Take a plan whose signature holds; refuse, in words of the table, one that cannot be obeyed."""
        host = self._host
        known_epoch = await self._known_epoch()
        try:
            with observe.remote_parent(offer.traceparent), observe.span(observe.SPAN_PLAN, region=host.name) as span:
                plan = accept_offer(offer, host.kit.identity, host.kit.trust, known_epoch, datetime.now(UTC))
                span.set(run=plan.run, round=plan.round, attempt=plan.attempt, task=plan.task.kind.value)
                await host.on_disk(host.store.raise_leader_epoch, offer.leader_epoch)
        except Refused as error:
            logger.error("an offer is refused: %s", error)
            self._abstain_from(offer, Reason.POLICY)
        except StorageError as error:
            logger.error("an offer is refused: %s", error)
            self._abstain_from(offer, Reason.STORAGE)
        except (IdentityError, StaleEpoch) as error:
            logger.error("an offer is ignored: %s", error)
        else:
            self._inform()
            reach("region.offer")
            await host.apply_between_seals(OfferTaken(plan=plan, offer=offer.SerializeToString()))

    def _abstain_from(self, offer: pb.Offer, reason: Reason) -> None:
        self._host.spawn(self.abstain(key_from_proto(offer.key), reason))

    async def withdrawn(self, withdrawal: pb.Withdrawal) -> None:
        key, reason = key_from_proto(withdrawal.key), _reason(withdrawal.reason)
        await self._host.apply_between_seals(AttemptOver(key, reason))
        if reason in ENDS_RUN:
            await self._host.on_disk(self._host.store.residuals.forget, key.run)

    async def judged(self, verdict: pb.Verdict) -> None:
        """The last word on an attempt. What was sealed for it is settled once the new model is verified."""
        host = self._host
        try:
            await host.on_disk(host.store.raise_leader_epoch, verdict.leader_epoch)
        except StaleEpoch as error:
            logger.error("a verdict is ignored: %s", error)
            return
        await host.apply_between_seals(AttemptOver(key_from_proto(verdict.key), _reason(verdict.reason)))
        run = RunId(verdict.key.run)
        task = host.spawn(self._settle(verdict))
        self._settling[task] = run
        task.add_done_callback(self._settling.pop)

    async def settled(self, run: RunId) -> None:
        """Wait until the verdicts that came on this run are settled, but not for ever: a model may have to come."""
        tasks = [task for task, of in self._settling.items() if of == run]
        if tasks:
            await asyncio.wait(tasks, timeout=SETTLE_S)

    async def _settle(self, verdict: pb.Verdict) -> None:
        host, key = self._host, key_from_proto(verdict.key)
        pending = await host.on_disk(host.store.pending)
        digest = next((one.digest for one in pending if one.key.of_same_round(key)), "")
        try:
            counted = await self._is_counted(verdict, digest)
        except HierFLError as error:
            logger.error("the verdict on %s is not believed, its updates stay sealed: %s", key, error)
            return
        reach("region.verdict")
        event = ReceiptEvent.COMMIT if counted else ReceiptEvent.REFUSE
        receipts = await host.on_disk(
            host.store.settle, key, event, version=verdict.model_version, reason=_reason(verdict.reason)
        )
        reach("region.settled")
        host.reception.deliver(tuple(receipts))
        if key.task is TaskKind.EVALUATE or _reason(verdict.reason) in ENDS_RUN:  # an evaluation is a run's last round
            await host.on_disk(host.store.residuals.forget, key.run)
        for base, task in await host.on_disk(host.store.prune, host.settings.keep_partial_bytes):
            host.apply(PartialPruned(base, task))

    async def _is_counted(self, verdict: pb.Verdict, digest: str) -> bool:
        """Whether our sealed bytes are in the committed model, whose record and hash are verified here.

        Raises:
            HierFLError: The record is not the controller's, or says otherwise, or the model is another.
        """
        if not verdict.committed:
            return False
        if verdict.record or key_from_proto(verdict.key).task is TaskKind.TRAIN:
            record = accept_record(verdict, self._host.kit.trust)
            await self._host.models.get(record.model_hash, record.layout_hash, MAX_MODEL_BYTES, record.model_digest)
            self._check_counted(record, verdict.partial_digest)
        return bool(digest) and verdict.partial_digest == digest

    def _check_counted(self, record: CommitRecord, digest: str) -> None:
        counted = {partial.region: partial.digest for partial in record.partials}
        if counted.get(self._host.name, "") != digest:
            raise DigestMismatch("the verdict and its signed record name different partials of this region")

    # ------------------------------------------------------------ calls

    async def abstain(self, key: AttemptKey, reason: Reason) -> None:
        try:
            await self._host.uplink.abstain(key, self._host.store.region_epoch, reason)
        except HierFLError as error:
            logger.warning("%s: the controller does not take that this region abstains: %s", key, error)

    async def send(self, key: AttemptKey, digest: str) -> None:
        """Send sealed bytes under ``key``: ledger row, bytes, outcome row."""
        host = self._host
        attempt = host.region.attempts.get(key)
        if attempt is None:
            return
        parent = pb.Offer.FromString(attempt.offer).traceparent
        try:
            sealed = await host.on_disk(host.store.load_sealed, digest)
            if not self._may_go(sealed, attempt.plan):
                return
            await host.on_disk(host.store.readdress, digest, key)
            crossing = await host.on_disk(host.store.ledger.crossing, sealed, key, self._destination)
            sequence, head = await host.on_disk(host.store.ledger.append, crossing, self._ledger_key)
        except StaleEpoch:
            raise
        except StorageError as error:
            logger.error("%s: the sealed partial cannot be sent: %s", key, error)
            host.apply(SealFailed(key, Reason.STORAGE))
            return
        reach("region.uplink")
        with (
            observe.remote_parent(parent),
            observe.span(
                observe.SPAN_UPLINK, run=key.run, round=key.round, attempt=key.attempt, region=host.name
            ) as span,
        ):
            span.set(bytes=sealed.outgoing.length_bytes)
            outcome = await self._send(sealed, key, sequence, head)
        reach("region.acknowledged")
        await self._append(outcome)
        if outcome.result == ACKNOWLEDGED:
            host.apply(PartialAcknowledged(key))

    def _may_go(self, sealed: Sealed, plan: Plan) -> bool:
        reason = objection_to_resending(self._host.settings.policy, plan, sealed.head)
        if reason is not None:
            self._host.apply(SealFailed(plan.key, reason))
        return reason is None

    async def _send(self, sealed: Sealed, key: AttemptKey, sequence: int, head: str) -> Outcome:
        try:
            response = await self._host.uplink.send(sealed, key, head)
            check_countersignature(response, head, self._host.kit.trust, datetime.now(UTC))
        except RoundClosed:
            return Outcome(of=sequence, digest=sealed.digest, result=Reason.LATE)  # its verdict says more
        except HierFLError as error:
            logger.error("%s: the controller does not take the partial: %s", key, error)
            return Outcome(of=sequence, digest=sealed.digest, result=Reason.INVALID)
        return Outcome(
            of=sequence,
            digest=sealed.digest,
            result=ACKNOWLEDGED,
            head=head,
            countersignature=response.countersignature,
            certificate=response.certificate,
        )

    # ------------------------------------------------------------ the border ledger

    @property
    def _ledger_key(self) -> Ed25519PrivateKey:
        assert self._host.kit.ledger is not None, "checked when the host was made"
        return self._host.kit.ledger.key

    async def _append(self, entry: Outcome | Control) -> None:
        host = self._host
        await host.on_disk(host.store.ledger.append, entry, self._ledger_key)


def _reason(code: str) -> Reason:
    """A reason that a later release has is told as "late"."""
    return Reason(code) if code in set(Reason) else Reason.LATE
