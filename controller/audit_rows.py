"""What the controller has on one run, gathered for the audit: rows by the store's reading methods, commit records,
and what its blobs turn out to be. Reads only, and says of each thing that cannot be read what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from controller.blobs import LAYOUT_HASH_BYTES, Blobs
from controller.commits import Commits, SignedRecord
from controller.rows import AnswerRow, AttemptRow, ModelRow, RoundRow, RunRow
from controller.store import Store
from hierfl import documents
from hierfl.aggregation import ColumnGroup
from hierfl.audit import Book
from hierfl.errors import AuditMismatch, HierFLError, NotFound, StorageError, StoreDamaged, WireError
from hierfl.layout import model_hash
from hierfl.records import CommitRecord, PartialHead
from hierfl.types import AttemptKey, ModelHash, RunId, TaskKind
from hierfl.wire.framefile import read_frames
from hierfl.wire.packed import expect_partial

__all__ = ["ATTEMPTS_PROBED", "RunRows", "SeenBlob", "gather", "see_blobs"]

T = TypeVar("T")

ATTEMPTS_PROBED = 3
"""Answers are looked for under so many attempt numbers behind the last row: a row added, or its attempt deleted."""


@dataclass(frozen=True, kw_only=True)
class SeenBlob:
    """A file among the blobs: empty where it is what its name says."""

    error: str = ""
    head: PartialHead | None = None
    """Of a partial."""


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """All of one run."""

    run: RunRow
    models: tuple[ModelRow, ...]
    rounds: tuple[RoundRow, ...]
    attempts: tuple[AttemptRow, ...]
    answers: tuple[AnswerRow, ...]
    commits: Mapping[int, SignedRecord]
    """By version, those whose signature holds."""
    records: Mapping[int, CommitRecord] = field(default_factory=dict)
    """By version: the file's, or where there is no good file that of the store's row."""

    def attempts_at(self, task: TaskKind, round_number: int) -> list[AttemptRow]:
        return [row for row in self.attempts if (row.task, row.round) == (task, round_number)]

    def answers_to(self, attempt: AttemptRow) -> list[AnswerRow]:
        return [row for row in self.answers if row.key == attempt.key]


def gather(book: Book, store: Store, directory: Path, run: RunId, check: Callable[[SignedRecord], None]) -> RunRows:
    """Read everything of a run.

    Args:
        book: Takes what cannot be read.
        store: Its rows.
        directory: The controller's, with ``commits``.
        check: Raises unless a record was signed by this federation's controller.
    Raises:
        NotFound: No such run, and nothing that would be one's.
        AuditMismatch: Its row is gone, and there is something that is its.
    """
    runs = _read(book, "runs", run, store.runs)
    row = next((one for one in runs if one.run == run), None)
    if row is None:
        left = [*_read(book, "models", run, lambda: store.models(run))]
        if left or (directory / "commits" / run).is_dir():
            words = f"there are {len(left)} models and a folder of commit records of it"
            raise AuditMismatch(f"controller: runs {run}: the row is not there, expected one, since {words}")
        there = ", ".join(one.run for one in runs[-5:]) or "none"
        raise NotFound("run", run, f"there are {there}")
    models = _read(book, "models", run, lambda: store.models(run))
    attempts = [one for task, number in _rounds_of(row) for one in _attempts(book, store, row, task, number)]
    answers = [
        answer for key in _keys(row, attempts) for answer in _read(book, "answers", key, partial(store.answers, key))
    ]
    commits = _commits(book, directory / "commits", row, check)
    return RunRows(
        run=row,
        models=tuple(models),
        rounds=tuple(_read(book, "rounds", run, lambda: store.rounds(run))),
        attempts=tuple(attempts),
        answers=tuple(answers),
        commits=commits,
        records=_records(book, models, commits, check),
    )


def _read(book: Book, table: str, key: object, read: Callable[[], Sequence[T]]) -> Sequence[T]:
    try:
        return read()
    except StoreDamaged as error:
        book.wrong(table, key, "rows", error, "rows that can be read")
        return []


def _rounds_of(run: RunRow) -> Iterable[tuple[TaskKind, int]]:
    rounds = run.job.job.rounds
    yield from ((TaskKind.TRAIN, number) for number in range(1, rounds + 2))
    yield TaskKind.EVALUATE, rounds + 1


def _attempts(book: Book, store: Store, run: RunRow, task: TaskKind, number: int) -> Sequence[AttemptRow]:
    return _read(book, "attempts", f"{run.run}/{task}/{number}", lambda: store.attempts(run.run, task, number))


def _keys(run: RunRow, attempts: Sequence[AttemptRow]) -> list[AttemptKey]:
    keys: list[AttemptKey] = []
    for task, number in _rounds_of(run):
        last = max((one.attempt for one in attempts if (one.task, one.round) == (task, number)), default=0)
        keys += [AttemptKey(run.run, task, number, attempt) for attempt in range(1, last + ATTEMPTS_PROBED + 1)]
    return keys


def _commits(
    book: Book, directory: Path, run: RunRow, check: Callable[[SignedRecord], None]
) -> dict[int, SignedRecord]:
    folder = directory / run.run
    if not folder.is_dir():
        return {}
    commits, found = Commits(directory, check), {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".part-"):
            continue
        if not path.name.isdigit() or path.name == "0":
            book.wrong("commits", f"{run.run}/{path.name}", "file", "there", "records of versions from 1 only")
            continue
        book.num_checks += 1
        try:
            record = commits.find(run.run, int(path.name))
        except StorageError as error:
            book.wrong("commits", f"{run.run}/{path.name}", "record", error, "a record signed by the controller")
            continue
        if record is not None:
            found[int(path.name)] = record
    return found


def _records(
    book: Book, models: Sequence[ModelRow], commits: Mapping[int, SignedRecord], check: Callable[[SignedRecord], None]
) -> dict[int, CommitRecord]:
    records = {}
    for model in models:
        if model.version and model.version not in commits:
            signed = SignedRecord(record=model.record, signature=model.signature, certificate=model.certificate)
            try:
                check(signed)
                records[model.version] = signed.read()
            except HierFLError as error:
                words = "a record signed by the controller"
                book.wrong("models", f"{model.run}/{model.version}", "record", error, words)
    stored = {model.version for model in models}
    return {**records, **{version: one.read() for version, one in commits.items() if version in stored}}


# ---------------------------------------------------------------- blobs


def see_blobs(rows: RunRows, directory: Path) -> dict[tuple[str, str], SeenBlob]:
    """Every blob that the rows name, read and held against its name; by kind and name."""
    blobs = Blobs(directory, read_only=True)
    groups = {attempt.key: attempt.spec.groups for attempt in rows.attempts}
    seen: dict[tuple[str, str], SeenBlob] = {}
    hashes = {row.model_hash for row in rows.models} | {record.model_hash for record in rows.records.values()}
    for name in sorted(hashes):
        seen["models", name] = _see_model(blobs, directory, name)
    for digest in sorted({record.state_digest for record in rows.records.values()} - {""}):
        seen["states", digest] = _see(partial(blobs.state, digest))
    for answer in rows.answers:
        if answer.digest and answer.key in groups:
            seen["partials", answer.digest] = _see_partial(directory, answer.digest, groups[answer.key])
    return seen


def _see(read: Callable[[], object]) -> SeenBlob:
    try:
        read()
    except (HierFLError, OSError, ValueError) as error:
        return SeenBlob(error=str(error))
    return SeenBlob()


def _see_model(blobs: Blobs, directory: Path, name: ModelHash) -> SeenBlob:
    """A model's file; where it is another one, which."""
    if not blobs.has_model(name):
        return SeenBlob(error="not there")
    seen = _see(lambda: blobs.model(name))
    if not seen.error:
        return seen
    try:
        layout = blobs.layout_of(name)
        with (directory / "models" / name).open("rb") as file:
            file.seek(LAYOUT_HASH_BYTES)
            vectors = {vector: np.fromfile(file, "<f4", size) for vector, size in layout.vectors.items()}
        return SeenBlob(error=f"a model with SHA-256 {model_hash(layout, vectors)}")
    except (HierFLError, OSError, ValueError):
        return seen


def _see_partial(directory: Path, digest: str, groups: tuple[ColumnGroup, ...]) -> SeenBlob:
    path = directory / "partials" / digest.partition(":")[2]
    if not path.is_file():
        return SeenBlob(error="not there")
    try:
        incoming = read_frames(path, expect_partial(groups, None, digest))
        return SeenBlob(head=documents.decode(incoming.meta, PartialHead, "partial head"))
    except (WireError, OSError) as error:
        return SeenBlob(error=str(error))
