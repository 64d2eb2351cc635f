"""From rows to the messages that regions and operators get. Pure: nothing is decided here."""

from __future__ import annotations

from collections.abc import Iterable

from controller.rows import ModelRow, RoundRow, RunRow
from hierfl import documents
from hierfl.receipts import Reason
from hierfl.records import CommitRecord
from hierfl.rounds import RegionView
from hierfl.runs import RunState
from hierfl.types import AttemptKey, RegionId, TaskKind
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.convert import key_to_proto

__all__ = [
    "attached",
    "committed_verdict",
    "ended_verdict",
    "model",
    "region_progress",
    "round_summary",
    "run_summary",
    "withdrawal",
]

REASON_OF_END = {
    RunState.CANCELLED: Reason.RUN_CANCELLED,
    RunState.FAILED: Reason.RUN_FAILED,
    RunState.FINISHED: Reason.ATTEMPT_ABANDONED,  # the last evaluation: all else of a finished run is committed
}
"""Why what an ended run did not commit was not counted."""


def attached(leader_epoch: int, silence_s: float) -> pb.AttachResponse:
    """First message of Attach; sent again when a run with another ``silence_s`` begins or ends."""
    return pb.AttachResponse(
        attached=pb.Attached(leader_epoch=leader_epoch, report_every_s=silence_s / 3, silence_s=silence_s)
    )


def withdrawal(key: AttemptKey, reason: Reason) -> pb.AttachResponse:
    return pb.AttachResponse(withdrawal=pb.Withdrawal(key=key_to_proto(key), reason=reason))


def committed_verdict(
    key: AttemptKey, region: RegionId, told: RoundRow, made: ModelRow | None, leader_epoch: int
) -> pb.AttachResponse:
    """A round is committed: with this region's partial, or without it. ``made`` is None for an evaluation."""
    digest = next((share.digest for share in told.regions if share.region == region), "")
    return pb.AttachResponse(
        verdict=pb.Verdict(
            key=key_to_proto(key),
            leader_epoch=leader_epoch,
            committed=True,
            partial_digest=digest,
            model_version=told.version,
            record=made.record if made else b"",
            signature=made.signature if made else b"",
            certificate=made.certificate if made else b"",
            reason="" if digest else Reason.LATE,
        )
    )


def ended_verdict(key: AttemptKey, reason: Reason, leader_epoch: int) -> pb.AttachResponse:
    """Nothing of this attempt was counted, and nothing will be."""
    return pb.AttachResponse(
        verdict=pb.Verdict(key=key_to_proto(key), leader_epoch=leader_epoch, committed=False, reason=reason)
    )


def run_summary(run: RunRow) -> pb.RunSummary:
    return pb.RunSummary(
        run=run.run,
        name=run.job.job.name,
        state=run.state,
        reason=run.reason,
        rounds_committed=run.rounds_committed,
        rounds_abandoned=run.rounds_abandoned,
        rounds_planned=run.job.job.rounds,
        model_version=run.version,
        model_hash=run.model_hash,
        submitted_unix_ns=run.submitted_unix_ns,
        ended_unix_ns=run.ended_unix_ns,
        app=run.job.job.app,
        strategy=run.job.strategy.name,
        exact_in_two_tiers=run.exact_in_two_tiers,
        updates=run.job.updates.encoding,
    )


def round_summary(told: RoundRow) -> pb.RoundSummary:
    return pb.RoundSummary(
        round=told.round,
        attempts=told.attempt,
        task=pb.TASK_KIND_TRAIN if told.task is TaskKind.TRAIN else pb.TASK_KIND_EVALUATE,
        model_version=told.version,
        model_hash=told.model_hash,
        weight=told.weight,
        num_sites=told.num_sites,
        num_updates=told.num_updates,
        metrics=dict(told.metrics),
        seconds=told.seconds,
        regions=[
            pb.RegionShare(
                region=share.region,
                weight=share.weight,
                num_sites=share.num_sites,
                num_updates=share.num_updates,
                bytes_out=share.size_bytes,
                collected_in=share.collected_in,
            )
            for share in told.regions
        ],
        committed_unix_ns=told.committed_unix_ns,
    )


def region_progress(regions: Iterable[RegionView], min_clients: int) -> list[pb.RegionProgress]:
    """Per region the phase it reported for the open attempt, or whether it is there at all."""
    return [
        pb.RegionProgress(
            region=view.region,
            phase=view.phase if view.phase and view.presence.is_live else str(view.presence),
            clients_ready=view.clients_ready,
            clients_reported=view.clients_reported,
            clients_needed=max(view.cohort, min_clients),
        )
        for view in regions
    ]


def model(row: ModelRow, layout: bytes) -> pb.Model:
    return pb.Model(
        run=row.run,
        version=row.version,
        model_hash=row.model_hash,
        layout_hash=row.layout_hash,
        num_params=row.num_params,
        size_bytes=row.size_bytes,
        committed_unix_ns=row.committed_unix_ns,
        layout=layout,
        approximate_across_regions=bool(row.record) and not _is_exact(row.record),
    )


def _is_exact(record: bytes) -> bool:
    return documents.decode(record, CommitRecord, "commit record").exact_in_two_tiers
