"""``hierfl audit --replay``: every version of a run made once more, from the partials that are kept, and compared.

By what made it the first time: ``merge_partials`` and ``apply_strategy``. Partials are taken as they were released.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from controller.audit_rows import RunRows
from controller.blobs import Blobs, state_bytes
from controller.merge import apply_strategy, merge_partials
from hierfl import documents
from hierfl.audit import Book, Kind
from hierfl.errors import HierFLError
from hierfl.layout import model_hash
from hierfl.records import CommitRecord
from hierfl.types import TaskKind

__all__ = ["replay"]


def replay(book: Book, rows: RunRows, directory: Path) -> int:
    """Make each version that has its record again; returns how many came out with the same bits."""
    blobs = Blobs(directory, read_only=True)
    return sum(_replay_version(book, rows, record, blobs) for _, record in sorted(rows.records.items()))


def _replay_version(book: Book, rows: RunRows, record: CommitRecord, blobs: Blobs) -> bool:
    key = f"{record.run}/{record.version}"
    attempt = next((a for a in rows.attempts_at(TaskKind.TRAIN, record.round) if a.attempt == record.attempt), None)
    answers = {} if attempt is None else {answer.digest: answer for answer in rows.answers_to(attempt)}
    named = [answers[partial.digest] for partial in record.partials if partial.digest in answers]
    if attempt is None or len(named) < len(record.partials):
        book.note(Kind.OPEN, "models", key, "replay", "not possible: rows of its attempt are missing")
        return False
    earlier = rows.records.get(record.version - 1)
    state_digest = earlier.state_digest if earlier is not None else ""
    run = replace(rows.run, model_hash=record.previous_hash, state_digest=state_digest)
    try:
        total = merge_partials(blobs, attempt, named)
        layout, model, state = apply_strategy(blobs, run, total)
    except HierFLError as error:
        book.note(Kind.OPEN, "models", key, "replay", f"not possible: {error}")
        return False
    same = book.expect("models", key, "model_hash, against its partials", record.model_hash, model_hash(layout, model))
    made = documents.digest(state_bytes(state)) if state else ""
    kept = book.expect("models", key, "state_digest, against its partials", record.state_digest, made)
    weight = book.expect("models", key, "weight, against its partials", record.weight, total.weight)
    return same and kept and weight
