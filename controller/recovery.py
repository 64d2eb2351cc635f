"""A store rebuilt from what stands beside it: the runs as they were submitted, their commit records, the regions' sums.

For a Redis that was wiped. What was committed comes back whole, from signed records: versions, rounds, partials. What
only the store knew is lost, and said: whether a run was paused, cancelled or failed since, abandoned attempts,
evaluations. So a run that is not over by its records comes back paused, for an operator to resume or cancel. Regions
send again what they hold sealed, under the same keys, and it counts once: there is one release for a base and a task.

Doing it again writes the same: it may be cut off anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from controller import committing, planning
from controller.blobs import Blobs
from controller.commits import Commits, SignedRecord
from controller.leader import checker
from controller.rows import AnswerRow, AttemptRow, ModelRow, Row, RunRow
from controller.store import Store
from controller.store_redis import RedisStore
from controller.volume import adopt
from hierfl import documents
from hierfl.errors import StoreDamaged
from hierfl.failpoints import reach
from hierfl.pki import Kit
from hierfl.records import CommitRecord, CountedPartial, PartialHead
from hierfl.rounds import CollectionClosed
from hierfl.runs import OpenAttempt, RunFinished, RunPaused, RunStarted
from hierfl.types import TaskKind

__all__ = ["rebuild", "recover"]

logger = logging.getLogger(__name__)

PAUSED = "rebuilt from commit records after its store was lost; what came after version {version} is not known"


def recover(directory: Path, store: RedisStore, kit: Kit) -> None:
    """Rebuild the lost store of ``directory`` in ``store``, and say what cannot be proved. Raises as ``adopt``."""

    def refill() -> None:
        commits, blobs = Commits(directory / "commits", checker(kit)), Blobs(directory / "blobs")
        epoch = store.lead(commits.highest_epoch(), name="a recovery")
        for sentence in rebuild(store, epoch, commits, blobs):
            logger.warning("%s", sentence)

    adopt(directory, store, refill)


def rebuild(store: Store, epoch: int, commits: Commits, blobs: Blobs) -> list[str]:
    """Write all runs that have records into ``store``; returns what cannot be proved, a sentence each.

    Raises:
        StoreDamaged: A record is not this federation's, or does not continue the one before.
        StorageError: As ``Store.write``.
    """
    said: list[str] = []
    for run, document in commits.described():
        if document is None:
            said.append(f"run {run}: what was submitted is not on file; its records stay, the store has no row of it")
            continue
        row = documents.decode(document, RunRow, f"run {run}")
        reach("controller.write")
        store.write(epoch, row, committing.first_model(row))
        row, ended_ns = row.after(RunStarted()), row.submitted_unix_ns
        for rows in _versions(row, commits, blobs, said):
            row = next(made for made in rows if isinstance(made, RunRow))
            ended_ns = next(made.committed_unix_ns for made in rows if isinstance(made, ModelRow))
            store.write(epoch, *rows)
        row = _ended(row, ended_ns)
        store.write(epoch, row)
        said.append(f"run {run}: version {row.version} of {row.job.job.rounds} rounds is proved; it is {row.state}")
    return said


def _versions(row: RunRow, commits: Commits, blobs: Blobs, said: list[str]) -> Iterator[tuple[Row, ...]]:
    """The rows of each version on record, in order."""
    running = row
    while (signed := commits.find(row.run, running.version + 1)) is not None:
        record = signed.read()
        answers = [_answer(running, record, partial, blobs, said) for partial in record.partials]
        running, rows = _version(running, signed, answers)
        yield (*answers, *rows)


def _version(running: RunRow, signed: SignedRecord, answers: list[AnswerRow]) -> tuple[RunRow, tuple[Row, ...]]:
    record = signed.read()
    attempt = _attempt(running, record).after(CollectionClosed(regions=tuple(answer.region for answer in answers)))
    after, _, rows = committing.rows_of_commit(running, attempt, answers, signed, seconds=0.0)
    return after, rows


def _attempt(run: RunRow, record: CommitRecord) -> AttemptRow:
    wish = OpenAttempt(task=TaskKind.TRAIN, round=record.round, attempt=record.attempt)
    return planning.new_attempt(run, wish, now_unix_ns=record.committed_unix_ns)


def _answer(run: RunRow, record: CommitRecord, partial: CountedPartial, blobs: Blobs, said: list[str]) -> AnswerRow:
    """What a region had sent, from its own bytes; from the record where these are gone."""
    try:
        head, size_bytes = blobs.partial_head(partial.digest, run.groups)
    except StoreDamaged as error:
        said.append(f"run {run.run}: version {record.version} counts a sum of {partial.region} that is gone ({error})")
        head, size_bytes = _head(run, record, partial), 0
    return AnswerRow(
        run=run.run,
        task=TaskKind.TRAIN,
        round=record.round,
        attempt=record.attempt,
        region=partial.region,
        received_unix_ns=record.committed_unix_ns,
        digest=partial.digest,
        head=head,
        blob=partial.digest,
        size_bytes=size_bytes,
    )


def _head(run: RunRow, record: CommitRecord, partial: CountedPartial) -> PartialHead:
    return PartialHead(
        region=partial.region,
        run=run.run,
        base_model_hash=record.previous_hash,
        task_hash=_attempt(run, record).spec.hash,
        groups=run.groups,
        weight=partial.weight,
        num_sites=partial.num_sites,
        num_updates=partial.num_updates,
        metrics={},
        region_epoch=0,
        seal_id="",
    )


def _ended(running: RunRow, now_unix_ns: int) -> RunRow:
    """The run as far as its records go: over, or for an operator to say."""
    if running.rounds_committed == running.job.job.rounds and not running.job.round.evaluate_every:
        return running.after(RunFinished(), now_unix_ns=now_unix_ns)
    return running.after(RunPaused(reason=PAUSED.format(version=running.version)))
