"""The audit's half at the controller: models, records, rounds, attempts, answers, blobs.

Pure: rows in, findings out. The controller's signature over each commit record holds the run together: it names the
model before, the model made, and every partial that went into it. Rows have to say what the records say, blobs have to
be what they are named. ``controller/audit_regions.py`` holds it against the regions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

from controller.audit_rows import RunRows, SeenBlob
from controller.committing import first_model
from controller.merge import check_head
from controller.planning import BYTES_PER_VALUE, partial_encoding, plan_for
from controller.rows import AnswerRow, AttemptRow, ModelRow, RoundRow
from hierfl.audit import Book, Kind
from hierfl.errors import HierFLError
from hierfl.metrics import STANDARD_METRICS, add_metrics, metric_values, with_means
from hierfl.records import CommitRecord, CountedPartial
from hierfl.rounds import RoundState
from hierfl.types import RegionId, TaskKind

__all__ = ["audit_run"]

Blobs = Mapping[tuple[str, str], SeenBlob]


def audit_run(book: Book, rows: RunRows, blobs: Blobs, federation: str) -> None:
    """Hold everything of a run against everything else of it."""
    _check_versions(book, rows)
    for version, record in sorted(rows.records.items()):
        _check_record(book, rows, version, record, federation)
    _check_rounds(book, rows)
    for attempt in rows.attempts:
        _check_attempt(book, rows, attempt)
    for answer in rows.answers:
        _check_answer(book, rows, answer, blobs, federation)
    _check_carried(book, rows)
    _check_run(book, rows)
    _check_blobs(book, rows, blobs)


# ---------------------------------------------------------------- versions and records


def _check_versions(book: Book, rows: RunRows) -> None:
    """Versions without a gap; each but the first with its record, in the store and as a file, byte for byte."""
    run, found = rows.run, {row.version: row for row in rows.models}
    for version in range(run.version + 1):
        book.expect("models", f"{run.run}/{version}", "row", _there(version in found), "there")
    for version in sorted(found.keys() - set(range(run.version + 1))):
        book.wrong("models", f"{run.run}/{version}", "row", "there", f"versions up to the run's, {run.version}")
    for model in rows.models:
        _check_model_row(book, rows, model)
    for version in sorted(rows.commits.keys() - found.keys()):
        if version > run.version and not run.state.is_terminal:  # the files were read after the rows
            book.note(Kind.OPEN, "commits", f"{run.run}/{version}", "record", "of a version that is just being stored")
        else:
            book.wrong("commits", f"{run.run}/{version}", "file", "there", "no record of a version that is not stored")


def _check_model_row(book: Book, rows: RunRows, model: ModelRow) -> None:
    run, key = rows.run, f"{rows.run.run}/{model.version}"
    pairs: dict[str, tuple[object, object]] = {
        "run": (model.run, run.run),
        "num_params": (model.num_params, run.num_params),
        "size_bytes": (model.size_bytes, run.num_params * BYTES_PER_VALUE),
    }
    book.expect_all("models", key, pairs)
    if model.version:
        _check_committed_row(book, rows, model, key)
    else:
        first = first_model(replace(run, model_hash=model.model_hash))
        book.expect("models", key, "row of the first model", model, first)


def _check_committed_row(book: Book, rows: RunRows, model: ModelRow, key: str) -> None:
    record, file = rows.records.get(model.version), rows.commits.get(model.version)
    if file is None:
        if not any(f.table == "commits" and f.key == key for f in book.findings):  # else said already
            book.wrong("commits", key, "file", "not there", "the record of each version")
    else:
        book.expect("models", key, "record", model.record, file.record)
        book.expect("models", key, "signature", model.signature.hex(), file.signature.hex())
        book.expect("models", key, "certificate", model.certificate.hex(), file.certificate.hex())
    if record is not None:
        book.expect_all(
            "models",
            key,
            {
                "model_hash": (model.model_hash, record.model_hash),
                "layout_hash": (model.layout_hash, record.layout_hash),
                "committed_unix_ns": (model.committed_unix_ns, record.committed_unix_ns),
            },
        )


def _check_record(book: Book, rows: RunRows, version: int, record: CommitRecord, federation: str) -> None:
    """A record against the run, the version before it, and its own partials."""
    run, key = rows.run, f"{rows.run.run}/{version}"
    before = next((row.model_hash for row in rows.models if row.version == version - 1), None)
    earlier = [one.leader_epoch for number, one in rows.records.items() if number < version]
    expected = {
        "federation": (record.federation, federation),
        "run": (record.run, run.run),
        "version": (record.version, version),
        "round": (record.round, version),
        "layout_hash": (record.layout_hash, run.layout_hash),
        "strategy": (record.strategy, run.job.strategy.name),
        "exact_in_two_tiers": (record.exact_in_two_tiers, run.exact_in_two_tiers),
        "updates": (record.updates, run.job.updates.encoding),
        "partial_encoding": (record.partial_encoding, partial_encoding(run, TaskKind.TRAIN)),
        "weight": (record.weight, sum(partial.weight for partial in record.partials)),
    }
    if before is not None:
        expected["previous_hash"] = (record.previous_hash, before)
    book.expect_all("commits", key, expected)
    if record.leader_epoch < max(earlier, default=0):
        book.wrong("commits", key, "leader_epoch", record.leader_epoch, f"at least {max(earlier)}, as before it")
    for region, times in Counter(partial.region for partial in record.partials).items():
        book.expect("commits", key, f"partials of {region}", times, 1)
    _check_counted(book, rows, version, record)


def _check_counted(book: Book, rows: RunRows, version: int, record: CommitRecord) -> None:
    """Each partial of a record is an answer to its attempt, with the same counts."""
    key = f"{rows.run.run}/{version}"
    attempt = _attempt_of(rows, TaskKind.TRAIN, record.round, record.attempt)
    if attempt is None:
        book.wrong("attempts", f"{key}: round {record.round}, attempt {record.attempt}", "row", "not there", "there")
        return
    answers = {answer.digest: answer for answer in rows.answers_to(attempt) if answer.digest}
    for partial in record.partials:
        answer = answers.get(partial.digest)
        if answer is None:
            book.wrong("answers", f"{attempt.key} of {partial.region}", partial.digest, "not there", "a row")
        elif answer.head is not None:
            book.expect("answers", f"{attempt.key} of {partial.region}", "counts", answer.counted, partial)
    heads = [answers[p.digest].head for p in record.partials if p.digest in answers]
    if len(heads) == len(record.partials):
        sums: Mapping[str, int] = reduce(add_metrics, (head.metrics for head in heads if head is not None), {})
        book.expect("commits", key, "metrics", _without_zeros(record.metrics), _without_zeros(sums))


def _without_zeros(metrics: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in sorted(metrics.items()) if value}


# ---------------------------------------------------------------- rounds and attempts


def _check_rounds(book: Book, rows: RunRows) -> None:
    run = rows.run
    train = {row.round: row for row in rows.rounds if row.task is TaskKind.TRAIN}
    for number in range(1, run.rounds_committed + 1):
        book.expect("rounds", f"{run.run}/train/{number}", "row", _there(number in train), "there")
    for number in sorted(train.keys() - set(range(1, run.rounds_committed + 1))):
        book.wrong("rounds", f"{run.run}/train/{number}", "row", "there", f"rounds up to {run.rounds_committed}")
    for number, told in sorted(train.items()):
        if number in rows.records:
            _check_told(book, rows, told, rows.records[number])
    for told in rows.rounds:
        book.expect("rounds", f"{run.run}/{told.task}/{told.round}", "run", told.run, run.run)
        if told.task is TaskKind.EVALUATE:
            _check_evaluation(book, rows, told)


def _check_told(book: Book, rows: RunRows, told: RoundRow, record: CommitRecord) -> None:
    book.expect_all(
        "rounds",
        f"{rows.run.run}/{told.task}/{told.round}",
        {
            **_sums_of(told, record.partials),
            "attempt": (told.attempt, record.attempt),
            "version": (told.version, record.version),
            "model_hash": (told.model_hash, record.model_hash),
            "metrics": (dict(told.metrics), with_means(metric_values(STANDARD_METRICS, record.metrics))),
        },
    )


def _check_evaluation(book: Book, rows: RunRows, told: RoundRow) -> None:
    """The last evaluation makes no model and has no record: its row is held against the answers it names."""
    key, attempt = f"{rows.run.run}/{told.task}/{told.round}", _attempt_of(rows, told.task, told.round, told.attempt)
    of = next((row.model_hash for row in rows.models if row.version == told.version), "")
    book.expect("rounds", key, "model_hash", told.model_hash, of)
    if attempt is None:
        book.wrong("attempts", key, "row", "not there", "there")
        return
    answers = {answer.digest: answer for answer in rows.answers_to(attempt) if answer.head is not None}
    for share in told.regions:
        book.expect(
            "answers", f"{attempt.key} of {share.region}", share.digest, _there(share.digest in answers), "there"
        )
    named = [answers[share.digest] for share in told.regions if share.digest in answers]
    if len(named) == len(told.regions):
        heads = [answer.head for answer in named if answer.head is not None]
        sums: Mapping[str, int] = reduce(add_metrics, (head.metrics for head in heads), {})
        pairs = _sums_of(told, [answer.counted for answer in named])
        metrics = with_means(metric_values(STANDARD_METRICS, sums))
        book.expect_all("rounds", key, {**pairs, "metrics": (dict(told.metrics), metrics)})


def _sums_of(told: RoundRow, counted: Sequence[CountedPartial]) -> dict[str, tuple[object, object]]:
    shares = {s.region: (s.digest, s.weight, s.num_sites, s.num_updates) for s in told.regions}
    return {
        "weight": (told.weight, sum(partial.weight for partial in counted)),
        "num_sites": (told.num_sites, sum(partial.num_sites for partial in counted)),
        "num_updates": (told.num_updates, sum(partial.num_updates for partial in counted)),
        "regions": (shares, {p.region: (p.digest, p.weight, p.num_sites, p.num_updates) for p in counted}),
    }


def _attempt_of(rows: RunRows, task: TaskKind, number: int, attempt: int) -> AttemptRow | None:
    return next((row for row in rows.attempts_at(task, number) if row.attempt == attempt), None)


def _check_attempt(book: Book, rows: RunRows, attempt: AttemptRow) -> None:
    """Attempts at a round count from 1; the one that was committed is the record's, all others are over."""
    run, at = rows.run, rows.attempts_at(attempt.task, attempt.round)
    book.expect("attempts", attempt.key, "run", attempt.run, run.run)
    if attempt is at[-1]:
        for missing in sorted(set(range(1, attempt.attempt)) - {row.attempt for row in at}):
            book.wrong("attempts", f"{run.run}/{attempt.task}/{attempt.round}.{missing}", "row", "not there", "there")
    told = next((row for row in rows.rounds if (row.task, row.round) == (attempt.task, attempt.round)), None)
    is_committed = told is not None and told.attempt == attempt.attempt
    if told is not None or run.state.is_terminal:
        state = RoundState.COMMITTED if is_committed else RoundState.ABANDONED
        book.expect("attempts", attempt.key, "state", attempt.state, state)
    else:
        book.expect("attempts", attempt.key, "committed", attempt.state is RoundState.COMMITTED, expected=False)
    base = next((row.model_hash for row in rows.models if row.version == attempt.base_version), None)
    if base is not None:
        book.expect("attempts", attempt.key, "base_hash", attempt.base_hash, base)
    book.expect("attempts", attempt.key, "base_version", attempt.base_version, attempt.round - 1)
    if attempt.task is TaskKind.TRAIN:
        book.expect("attempts", attempt.key, "groups of its task", attempt.spec.groups, run.groups)


def _check_answer(book: Book, rows: RunRows, answer: AnswerRow, blobs: Blobs, federation: str) -> None:
    """An answer is to an attempt that was offered, and its partial is one that the plan allows."""
    key = f"{answer.key} of {answer.region}"
    attempt = _attempt_of(rows, answer.task, answer.round, answer.attempt)
    if attempt is None or answer.run != rows.run.run or answer.region not in rows.run.regions:
        book.wrong("answers", key, "row", "there", "answers of the run's regions to its attempts only")
        return
    if not answer.digest:
        book.expect("answers", key, "code of an abstention", bool(answer.code), expected=True)
        return
    if answer.head is None:
        book.wrong("answers", key, "head", "none", "what the partial says of itself")
        return
    book.expect("answers", key, "blob", answer.blob, answer.digest)
    try:
        check_head(plan_for(rows.run, attempt, answer.region, federation), answer.region, answer.head)
    except HierFLError as error:
        book.wrong("answers", key, "head", error, "counts within the plan")
    seen = blobs.get(("partials", answer.digest), SeenBlob())
    if seen.head is not None:
        book.expect("answers", key, "head, as the partial's bytes have it", answer.head, seen.head)


def _check_carried(book: Book, rows: RunRows) -> None:
    """What rounding left over of a region's counted sum goes into one later sum of it, or is lost, and never into two.

    Sums of other runs have a history of their own.
    """
    left_over: dict[RegionId, str] = {}
    for number, record in sorted(rows.records.items()):
        attempt = _attempt_of(rows, TaskKind.TRAIN, number, record.attempt)
        answers = {} if attempt is None else {answer.digest: answer for answer in rows.answers_to(attempt)}
        for answer in (answers[partial.digest] for partial in record.partials if partial.digest in answers):
            head = answer.head
            if head is None or head.run != rows.run.run:
                continue
            if head.carried:
                expected = left_over.get(answer.region, "")
                book.expect("answers", f"{answer.key} of {answer.region}", "carried", head.carried, expected)
            left_over[answer.region] = head.left_over or left_over.get(answer.region, "")


# ---------------------------------------------------------------- the run and its blobs


def _check_run(book: Book, rows: RunRows) -> None:
    run, newest = rows.run, max(rows.records, default=0)
    committed = sum(row.task is TaskKind.TRAIN for row in rows.rounds)
    book.expect("runs", run.run, "rounds_committed", run.rounds_committed, committed)
    last = next((row for row in rows.models if row.version == run.version), None)
    if last is not None:
        book.expect("runs", run.run, "model_hash", run.model_hash, last.model_hash)
    if run.version in rows.records:
        record = rows.records[run.version]
        book.expect("runs", run.run, "state_digest", run.state_digest, record.state_digest)
    elif newest > run.version and run.state.is_terminal:
        book.wrong("runs", run.run, "version", run.version, newest)
    if not run.state.is_terminal:
        book.note(Kind.OPEN, "runs", run.run, "state", run.state)


def _check_blobs(book: Book, rows: RunRows, blobs: Blobs) -> None:
    for (kind, name), seen in sorted(blobs.items()):
        book.num_checks += 1
        if seen.error:
            book.wrong("blobs", f"{kind}/{name}", "contents", seen.error, "what its name says")


def _there(is_there: bool) -> str:
    return "there" if is_there else "not there"
