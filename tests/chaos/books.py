"""What the stores say after a case, read with plain SQL and held against each other: a second opinion on the audit.

Every update that a region sealed has its last word; it is in one version at most; and what a version counts of a
region is, site for site and unit of weight for unit of weight, what that region's receipts say.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from controller.rows import RoundRow
from hierfl import documents
from hierfl.border import Crossing, LedgerRow
from hierfl.types import TaskKind

__all__ = ["Books", "crossings_below", "open_receipts", "read_books", "released_twice"]


@dataclass(frozen=True)
class Books:
    """What was found; ``wrong`` is empty where all of it fits together."""

    rounds: int
    """Committed, of training."""
    counted: int
    """Updates in committed versions, by the regions' receipts."""
    not_counted: int
    wrong: tuple[str, ...]


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as database:
        yield database


def open_receipts(zone: Path, run: str) -> int:
    """Sealed updates of a run that wait for their last word."""
    with _opened(zone / "zone.sqlite") as database:
        query = "select count(*) from receipts where run = ? and state = 'sealed'"
        return int(database.execute(query, (run,)).fetchone()[0])


def read_books(controller: Path, zones: Mapping[str, Path]) -> Books:
    """Hold the stores of a federation that has stopped against each other: the controller's, and each region's."""
    rounds = [row for row in _rounds(controller / "controller.sqlite") if row.task is TaskKind.TRAIN]
    shares = [(row, share) for row in rounds for share in row.regions if share.collected_in == row.run]
    told = {(row.run, row.version, share.region): share for row, share in shares}
    wrong: list[str] = []
    counted = not_counted = 0
    for region, zone in zones.items():
        with _opened(zone / "zone.sqlite") as database:
            wrong += _of_one_region(database, region)
            versions = database.execute(
                "select run, version, sum(weight), count(*), count(distinct site) from receipts"
                " where state = 'committed' group by run, version"
            ).fetchall()
            (lost,) = database.execute("select count(*) from receipts where state = 'not_counted'").fetchone()
        not_counted += lost
        for run, version, weight, updates, sites in versions:
            counted += updates
            share = told.pop((run, version, region), None)
            found = (share.weight, share.num_updates, share.num_sites) if share is not None else None
            if found != (weight, updates, sites):
                wrong.append(f"{region}: receipts in version {version} are {(weight, updates, sites)}, it has {found}")
    wrong += [f"{region}: version {version} counts it, no receipt says so" for _, version, region in told]
    return Books(len(rounds), counted, not_counted, tuple(wrong))


def _crossings(zone: Path) -> list[Crossing]:
    """Releases that left a region, by its own border ledger."""
    with _opened(zone / "zone.sqlite") as database:
        rows = database.execute("select data from ledger order by sequence").fetchall()
    entries = (documents.decode(data, LedgerRow, "ledger row").crossing for (data,) in rows)
    return [crossing for crossing in entries if crossing is not None]


def crossings_below(zones: Mapping[str, Path], k: int) -> int:
    """Releases over fewer than ``k`` sites, of all regions."""
    return sum(crossing.num_sites < k for zone in zones.values() for crossing in _crossings(zone))


def released_twice(zones: Mapping[str, Path]) -> list[str]:
    """Bases and tasks over which a region sent two different sums: their difference could be a single site."""
    wrong = []
    for region, zone in zones.items():
        digests: dict[tuple[str, str], set[str]] = {}
        for crossing in _crossings(zone):
            digests.setdefault((crossing.base_model_hash, crossing.task_hash), set()).add(crossing.digest)
        wrong += [
            f"{region}: {len(found)} sums over base {base[:12]}"
            for (base, _), found in digests.items()
            if len(found) > 1
        ]
    return wrong


def _of_one_region(database: sqlite3.Connection, region: str) -> list[str]:
    twice = database.execute(
        "select run, round, site, client from receipts where state = 'committed'"
        " group by run, task, round, site, client having count(*) > 1"
    ).fetchall()
    without = database.execute("select run, round, site from receipts where state = 'sealed'").fetchall()
    releases = database.execute(
        "select base_model_hash, task_hash from partials group by base_model_hash, task_hash having count(*) > 1"
    ).fetchall()
    return [
        *(f"{region}: {row} is counted twice" for row in twice),
        *(f"{region}: {row} has no last word" for row in without),
        *(f"{region}: {row} was released twice" for row in releases),
    ]


def _rounds(path: Path) -> list[RoundRow]:
    with _opened(path) as database:
        rows = database.execute("select document from rounds").fetchall()
    return [documents.decode(row, RoundRow, "round") for (row,) in rows]
