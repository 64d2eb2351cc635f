"""What all runs share: identity and epoch, store and blobs, the regions; and the runs themselves.

A leader's epoch is above that of every controller before it, as far as store, commit records and regions know.
What is signed (plans, commit records, ledger heads) is signed here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from controller import committing, messages, planning
from controller.blobs import Blobs
from controller.collection import Collection
from controller.commits import Commits, SignedRecord
from controller.loop import RunLoop
from controller.registry import Registry, Session
from controller.rows import AttemptRow, RegionRow
from controller.store import Store
from hierfl import documents
from hierfl.errors import CertificateUntrusted, NotFound, RoundClosed, StorageError, WireError
from hierfl.failpoints import reach
from hierfl.job import Job
from hierfl.layout import Layout
from hierfl.pki import Kit, RoleName, verify, verify_leaf
from hierfl.plan import PLAN_CONTEXT, plan_statement
from hierfl.receipts import Reason
from hierfl.records import COMMIT_CONTEXT, LEDGER_HEAD_CONTEXT, CommitRecord
from hierfl.runs import RunCancelled, RunResumed, RunState
from hierfl.types import AttemptKey, Float32Array, ModelHash, RegionId, RunId, TaskKind
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.convert import key_to_proto

__all__ = ["SILENCE_S", "Leader", "checker"]

logger = logging.getLogger(__name__)

SILENCE_S = 6.0
"""What regions are told while no run asks for less."""

MAX_EPOCH_STEP = 2**20
"""How far a region's word alone raises the leader epoch: no region can use up what epochs there are."""


class Leader:
    """One controller at work."""

    def __init__(self, kit: Kit, store: Store, blobs: Blobs, commits: Commits, clock: Callable[[], float]) -> None:
        self.kit, self.store, self.blobs, self.commits, self.clock = kit, store, blobs, commits, clock
        self.federation = kit.identity.federation
        self.epoch = 0
        self.registry = Registry(_regions(kit, store), clock, self._news)
        self.runs: dict[RunId, RunLoop] = {}
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception that ends this controller: it was replaced, its store is gone, or a bug of ours."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._unknown: dict[RegionId, set[str]] = {}
        """Digests of partials held here of which their region's zone store does not know."""
        self.silence_s = SILENCE_S
        """After so many seconds a region is silent; what the most impatient run needs."""

    def start(self) -> None:
        """Take the lead, and every run up where it is.

        Raises:
            StorageError: The store cannot be used.
        """
        self.epoch = self.store.lead(at_least=self.commits.highest_epoch())
        for row in self.store.regions():
            self.registry.restore(row.region, row.region_epoch, row.store_id)
        for run in self.store.runs():
            loop = self.runs[run.run] = RunLoop(self, run)
            if not run.state.is_terminal:
                self._recover(loop)
        for loop in self.runs.values():
            self._begin(loop)

    def _recover(self, loop: RunLoop) -> None:
        try:
            loop.recover()
        except StorageError as error:
            logger.exception("run %s cannot be taken up", loop.row.run)
            if loop.row.state is RunState.RUNNING:
                loop.pause(str(error))

    def _begin(self, loop: RunLoop) -> None:
        if loop.row.state.is_terminal:
            return
        task = asyncio.create_task(loop.run(), name=f"run {loop.row.run}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        self.run_ended()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def stop(self) -> None:
        """Stop every run where it is; a later controller takes it up there."""
        for session in self.registry.sessions():
            session.end()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.failed.cancel()

    def _news(self) -> None:
        for loop in self.runs.values():
            loop.bell.ring()

    # -------------------------------------------------------------- signatures

    def signed(self, record: CommitRecord) -> SignedRecord:
        data = documents.encode(record)
        return SignedRecord(
            record=data, signature=self.kit.sign(data, COMMIT_CONTEXT), certificate=self.kit.certificate_der
        )

    def countersign(self, ledger_head: bytes) -> bytes:
        """This controller's word that it was shown a border ledger up to ``ledger_head``."""
        return self.kit.sign(ledger_head, LEDGER_HEAD_CONTEXT)

    def offer(self, open_: Collection, region: RegionId) -> None:
        """Sign a region's plan under this epoch, and send it if the region is attached.

        Not to a region whose partial is held here while its store does not know of it: it would collect again, and
        two sums over one base would give away who is in one of them only.
        """
        answer = open_.answers.get(region)
        if answer is not None and answer.digest in self._unknown.get(region, ()):
            return
        plan = open_.plans[region].to_bytes()
        offer = pb.Offer(
            key=key_to_proto(open_.row.key),
            leader_epoch=self.epoch,
            plan=plan,
            signature=self.kit.sign(plan_statement(self.epoch, plan), PLAN_CONTEXT),
            certificate=self.kit.certificate_der,
            traceparent=open_.span.traceparent,
        )
        self.registry.send(region, pb.AttachResponse(offer=offer))

    # -------------------------------------------------------------- regions

    def attach(self, region: RegionId, request: pb.AttachRequest) -> Session:
        """Open a region's session; its queue holds verdicts for what is pending, and the open offers.

        Raises:
            StaleEpoch: A newer start of this region is known.
        """
        if request.leader_epoch > self.epoch + MAX_EPOCH_STEP:
            raise WireError(f"leader epoch {request.leader_epoch} is out of range: this controller has {self.epoch}")
        self.registry.check_epoch(region, request.region_epoch, request.store_id)
        row = RegionRow(region=region, region_epoch=request.region_epoch, store_id=request.store_id)
        reach("controller.write")
        self.store.write(self.epoch, row)
        session = self.registry.attach(region, request.region_epoch, request.store_id)
        self._reconcile(region, {one.digest for one in request.pending})
        if request.leader_epoch > self.epoch:
            self._lead_above(request.leader_epoch)
        else:
            self._offer_all(region)
        return session

    def _reconcile(self, region: RegionId, known: set[str]) -> None:
        """Say which partials are held here that the region's store, lost or restored from a backup, does not know."""
        held = {digest: key for loop in self.runs.values() for digest, key in loop.partials_of(region).items()}
        self._unknown[region] = held.keys() - known
        for digest in self._unknown[region]:
            words = "region %s does not know of its partial %s for %s, which is held here: was its store lost?"
            logger.warning(words, region, digest, held[digest])

    def _offer_all(self, region: RegionId) -> None:
        for loop in self.runs.values():
            if loop.open is not None and loop.open.offer_again_to(region):
                self.offer(loop.open, region)

    def _lead_above(self, epoch: int) -> None:
        """A region has seen a higher epoch than any that our store remembers: go above it, and sign anew."""
        logger.warning("a region has seen leader epoch %d, this controller had %d", epoch, self.epoch)
        self.epoch = self.store.lead(at_least=epoch)
        for session in self.registry.sessions():
            session.events.put_nowait(messages.attached(self.epoch, self.silence_s))
            self._offer_all(session.region)

    def attached(self) -> pb.AttachResponse:
        return messages.attached(self.epoch, self.silence_s)

    def run_ended(self) -> None:
        """Regions report as often as the most impatient run needs."""
        patience = [loop.row.job.round.silence_s for loop in self.runs.values() if not loop.row.state.is_terminal]
        silence_s = min([SILENCE_S, *patience])
        if silence_s != self.silence_s:
            self.registry.excuse(self.silence_s / 3 + silence_s)
            self.silence_s = silence_s
            for session in self.registry.sessions():
                session.events.put_nowait(self.attached())

    def verdict(self, key: AttemptKey, region: RegionId) -> pb.AttachResponse | None:
        """The last word on an attempt for one region; None while its round is not decided."""
        loop = self.runs.get(key.run)
        if loop is None:
            return messages.ended_verdict(key, Reason.UNKNOWN_ATTEMPT, self.epoch)
        told = loop.told.get((key.task, key.round))
        if told is not None:
            made = self.store.model(key.run, told.version) if key.task is TaskKind.TRAIN else None
            return messages.committed_verdict(key, region, told, made, self.epoch)
        if loop.row.state.is_terminal:
            return messages.ended_verdict(key, messages.REASON_OF_END[loop.row.state], self.epoch)
        return None

    def collecting(self, key: AttemptKey, region: RegionId) -> Collection:
        """The open attempt of this key, if ``region`` may still answer it. Raises ``RoundClosed``.

        The region is told the last word again, where there is one: it seems to have missed it.
        """
        try:
            if key.run not in self.runs:
                raise RoundClosed(f"{key} is not known here")
            return self.runs[key.run].collecting(key, region)
        except RoundClosed:
            verdict = self.verdict(key, region)
            if verdict is not None:
                self.registry.send(region, verdict)
            raise

    def attempt(self, key: AttemptKey) -> AttemptRow | None:
        rows = self.store.attempts(key.run, key.task, key.round)
        return next((row for row in rows if row.attempt == key.attempt), None)

    # -------------------------------------------------------------- operators

    def run(self, run: str) -> RunLoop:
        """A run by its id. Raises ``NotFound``, naming the newest runs there are."""
        loop = self.runs.get(RunId(run))
        if loop is None:
            there = ", ".join(list(self.runs)[-5:])
            raise NotFound("run", run, f"there are {there}" if there else "none was submitted yet")
        return loop

    def submit(self, job: Job, layout: Layout, model_hash: ModelHash, request_id: str) -> RunId:
        """Store a new run and begin it. The same request id again is the same run.

        Raises:
            ConfigError: This federation cannot run that job.
        """
        for loop in self.runs.values():
            if request_id and loop.row.request_id == request_id:
                return loop.row.run
        row = planning.new_run(
            job,
            layout,
            model_hash,
            sorted(map(RegionId, self.kit.trust.regions)),
            run=planning.run_id(job, secrets.token_hex(3)),
            request_id=request_id,
            now_unix_ns=time.time_ns(),
        )
        self.commits.describe(row.run, documents.encode(row))
        reach("controller.write")
        self.store.write(self.epoch, row, committing.first_model(row))
        loop = self.runs[row.run] = RunLoop(self, row)
        self._begin(loop)
        return row.run

    async def cancel(self, run: str) -> RunState:
        """End a run; returns the state that it has afterwards, which may be another end that came first."""
        loop = self.run(run)
        await loop.ask(RunCancelled())
        return loop.row.state

    async def resume(self, run: str) -> RunState:
        """Go on with a paused run; nothing happens to another. Returns its state afterwards."""
        loop = self.run(run)
        await loop.ask(RunResumed())
        return loop.row.state

    async def put_model(self, layout: Layout, vectors: Mapping[str, Float32Array]) -> ModelHash:
        return await asyncio.to_thread(self.blobs.put_model, layout, vectors)


def _regions(kit: Kit, store: Store) -> set[RegionId]:
    """All that are provisioned, and those that a run began with and that have been retired since."""
    going_on = (run for run in store.runs() if not run.state.is_terminal)
    return {*map(RegionId, kit.trust.regions), *(region for run in going_on for region in run.regions)}


def checker(kit: Kit) -> Callable[[SignedRecord], None]:
    """A check that a commit record was signed by this federation's controller, at the time that it says."""

    def check(signed: SignedRecord) -> None:
        from cryptography import x509

        at = datetime.fromtimestamp(signed.read().committed_unix_ns / 1e9, UTC)
        identity = verify_leaf(signed.certificate, kit.trust, at)
        if identity.role is not RoleName.CONTROLLER:
            raise CertificateUntrusted(f"a commit record is signed by {identity}, not by the controller")
        verify(x509.load_der_x509_certificate(signed.certificate), signed.signature, signed.record, COMMIT_CONTEXT)

    return check
