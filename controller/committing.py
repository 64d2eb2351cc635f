"""What a committed round writes down. Pure: from sums and records to rows, whoever merged.

A round of training is committed by its commit record (``commits.py``): the rows are made from the record that
is there, which is another controller's where that one was first. An evaluation has rows only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from controller.commits import SignedRecord
from controller.merge import NextModel
from controller.planning import BYTES_PER_VALUE, partial_encoding
from controller.rows import AnswerRow, AttemptRow, ModelRow, RegionShare, RoundRow, Row, RunRow
from hierfl.aggregation import PartialAggregate
from hierfl.errors import StoreDamaged
from hierfl.metrics import STANDARD_METRICS, metric_values, with_means
from hierfl.records import CommitRecord, CountedPartial, PartialHead
from hierfl.rounds import MetricsCommitted, ModelCommitted

__all__ = ["commit_record", "first_model", "rows_of_commit", "rows_of_evaluation"]


def commit_record(
    run: RunRow,
    attempt: AttemptRow,
    answers: Sequence[AnswerRow],
    total: PartialAggregate,
    made: NextModel,
    *,
    federation: str,
    leader_epoch: int,
    now_unix_ns: int,
) -> CommitRecord:
    """The record of a new version, before it is signed."""
    return CommitRecord(
        federation=federation,
        run=run.run,
        round=attempt.round,
        attempt=attempt.attempt,
        version=attempt.base_version + 1,
        model_hash=made.model_hash,
        layout_hash=run.layout_hash,
        previous_hash=attempt.base_hash,
        leader_epoch=leader_epoch,
        strategy=run.job.strategy.name,
        exact_in_two_tiers=run.exact_in_two_tiers,
        partials=tuple(answer.counted for answer in answers),
        weight=total.weight,
        metrics=dict(total.metrics),
        state_digest=made.state_digest,
        committed_unix_ns=now_unix_ns,
        updates=attempt.spec.encoding.name,
        model_digest=made.model_digest,
        partial_encoding=partial_encoding(run, attempt.task),
    )


def _head(answer: AnswerRow) -> PartialHead:
    assert answer.head is not None, "only partials are counted"
    return answer.head


def rows_of_commit(
    run: RunRow, attempt: AttemptRow, answers: Sequence[AnswerRow], signed: SignedRecord, *, seconds: float
) -> tuple[RunRow, AttemptRow, tuple[Row, ...]]:
    """The run and attempt after the record's version, and all rows to write, in one transaction.

    Raises:
        StoreDamaged: The record does not continue this run, or counts what the store does not have.
    """
    record = signed.read()
    if (record.version, record.previous_hash, record.layout_hash) != (run.version + 1, run.model_hash, run.layout_hash):
        raise StoreDamaged(f"commit record {record.run}/{record.version} does not continue version {run.version}")
    by_digest = {answer.digest: answer for answer in answers}
    missing = [partial.region for partial in record.partials if partial.digest not in by_digest]
    if missing:
        raise StoreDamaged(
            f"commit record {record.run}/{record.version} counts a partial of {missing[0]}, unknown here"
        )
    after = replace(
        run,
        version=record.version,
        model_hash=record.model_hash,
        model_digest=record.model_digest,
        state_digest=record.state_digest,
        rounds_committed=record.round,
        abandoned_in_a_row=0,
        last_reason="",
    )
    done = attempt.after(ModelCommitted(version=record.version))
    now = record.committed_unix_ns
    told = _round_row(after, done, record.partials, by_digest, record.metrics, seconds, now)
    return after, done, (after, done, _model_row(run, signed, record), told)


def rows_of_evaluation(
    run: RunRow, attempt: AttemptRow, answers: Sequence[AnswerRow], total: PartialAggregate, *, seconds: float, now: int
) -> tuple[RunRow, AttemptRow, tuple[Row, ...]]:
    """The run and attempt after the last evaluation, and all rows to write; ``now`` in Unix nanoseconds."""
    by_digest = {answer.digest: answer for answer in answers}
    counted = tuple(answer.counted for answer in answers)
    after = replace(run, evaluation_over=True, abandoned_in_a_row=0, last_reason="")
    done = attempt.after(MetricsCommitted(version=run.version))
    return after, done, (after, done, _round_row(after, done, counted, by_digest, total.metrics, seconds, now))


def _round_row(
    run: RunRow,
    attempt: AttemptRow,
    counted: Sequence[CountedPartial],
    answers: Mapping[str, AnswerRow],
    metrics: Mapping[str, int],
    seconds: float,
    now_unix_ns: int,
) -> RoundRow:
    return RoundRow(
        run=attempt.run,
        task=attempt.task,
        round=attempt.round,
        attempt=attempt.attempt,
        version=run.version,
        model_hash=run.model_hash,
        weight=sum(partial.weight for partial in counted),
        num_sites=sum(partial.num_sites for partial in counted),
        num_updates=sum(partial.num_updates for partial in counted),
        metrics=with_means(metric_values(STANDARD_METRICS, metrics)),
        seconds=seconds,
        committed_unix_ns=now_unix_ns,
        regions=tuple(
            RegionShare(
                region=partial.region,
                weight=partial.weight,
                num_sites=partial.num_sites,
                num_updates=partial.num_updates,
                size_bytes=answers[partial.digest].size_bytes,
                digest=partial.digest,
                collected_in=_head(answers[partial.digest]).run,
            )
            for partial in counted
        ),
    )


def _model_row(run: RunRow, signed: SignedRecord, record: CommitRecord) -> ModelRow:
    return ModelRow(
        run=run.run,
        version=record.version,
        model_hash=record.model_hash,
        layout_hash=record.layout_hash,
        num_params=run.num_params,
        size_bytes=run.num_params * BYTES_PER_VALUE,
        committed_unix_ns=record.committed_unix_ns,
        record=signed.record,
        signature=signed.signature,
        certificate=signed.certificate,
    )


def first_model(run: RunRow) -> ModelRow:
    """Version 0, as it was uploaded."""
    return ModelRow(
        run=run.run,
        version=0,
        model_hash=run.model_hash,
        layout_hash=run.layout_hash,
        num_params=run.num_params,
        size_bytes=run.num_params * BYTES_PER_VALUE,
        committed_unix_ns=run.submitted_unix_ns,
    )
