"""``hierfl audit``, the half at the controller, which may be running: reads store, records, blobs; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from controller.audit import audit_run
from controller.audit_regions import join, regions_counted
from controller.audit_rows import RunRows, gather, see_blobs
from controller.leader import checker
from controller.replay import replay
from controller.store import SqliteStore, Store
from hierfl.audit import Book, RegionSummary
from hierfl.errors import StorageError
from hierfl.pki import Kit
from hierfl.snapshot import copied
from hierfl.types import RegionId, RunId

__all__ = ["ControllerReport", "audit_controller"]

TRIES = 20


@dataclass(frozen=True, kw_only=True)
class ControllerReport:
    """What the half at the controller looked at."""

    book: Book
    versions: int
    rounds: int
    weights: Mapping[int, int]
    """Weight by version, as the records have it."""
    missing_summaries: tuple[RegionId, ...]
    """Regions of which partials were counted, and no summary is at hand."""
    replayed: int | None
    """Versions made again with the same bits; ``None`` where that was not asked for."""


def audit_controller(
    run: str,
    directory: Path,
    kit: Kit,
    summaries: Mapping[RegionId, RegionSummary],
    *,
    again: bool = False,
    store: Store | None = None,
) -> ControllerReport:
    """Audit a run at the controller.

    Args:
        run: Its id.
        directory: The controller's ``--dir``.
        kit: Any that trusts the controller's CA.
        summaries: Of the regions, their signatures checked.
        again: Also make the models again from the partials.
        store: Where the rows are, if not in the folder's own SQLite file; it is read only.
    Raises:
        NotFound: No store there, or no such run in it.
        AuditMismatch: The run's row is gone, while there are models or records of it.
        StorageError: It cannot be read at all.
    """
    if store is None:
        with _copied(directory, kit.identity.federation) as copy:
            book, rows = _gathered(copy, directory, RunId(run), kit)
    else:
        book, rows = _of_one_moment(store, directory, RunId(run), kit)
    blobs = see_blobs(rows, directory / "blobs")
    audit_run(book, rows, blobs, kit.identity.federation)
    join(book, rows, summaries)
    replayed = replay(book, rows, directory / "blobs") if again else None
    return ControllerReport(
        book=book,
        versions=len(rows.models),
        rounds=len(rows.rounds),
        weights={version: record.weight for version, record in sorted(rows.records.items())},
        missing_summaries=tuple(region for region in regions_counted(rows) if region not in summaries),
        replayed=replayed,
    )


def _gathered(store: Store, directory: Path, run: RunId, kit: Kit) -> tuple[Book, RunRows]:
    book = Book("controller")
    return book, gather(book, store, directory, run, checker(kit))


def _of_one_moment(store: Store, directory: Path, run: RunId, kit: Kit) -> tuple[Book, RunRows]:
    """Read until twice the same is read: a controller may be writing between two of our calls."""
    found = _gathered(store, directory, run, kit)
    for _ in range(TRIES):
        before, found = found, _gathered(store, directory, run, kit)
        if before[1] == found[1]:
            return found
    raise StorageError(f"run {run} is written to without a pause; try again")


@contextmanager
def _copied(directory: Path, federation: str) -> Iterator[Store]:
    """A copy of the folder's own store: a running controller holds that one alone."""
    with copied(directory / "controller.sqlite") as copy:
        opened = SqliteStore(copy, federation)
        try:
            yield opened
        finally:
            opened.close()
