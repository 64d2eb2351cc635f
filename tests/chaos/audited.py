"""What `hierfl audit --replay` says after a case, of every run of a federation that has stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from combiners.auditing import audit_region
from controller.auditing import audit_controller
from controller.store import SqliteStore
from hierfl.audit import Finding, Kind
from hierfl.pki import Kit
from hierfl.snapshot import copied
from hierfl.types import RunId

__all__ = ["wrong_by_audit"]


def wrong_by_audit(state: Path) -> tuple[str, ...]:
    """Every row that is wrong, and every sealed update without a last word, in a state folder of ``hierfl up``."""
    return tuple(f"audit of {run}: {finding}" for run in _runs(state) for finding in _findings(state, run))


def _runs(state: Path) -> list[RunId]:
    kit = Kit.load(state / "kits" / "controller")
    with copied(state / "controller" / "controller.sqlite") as copy:
        store = SqliteStore(copy, kit.identity.federation)
        runs = [row.run for row in store.runs()]
        store.close()
    return runs


def _findings(state: Path, run: RunId) -> Iterator[Finding]:
    summaries = {}
    for folder in sorted((state / "kits" / "regions").glob("*/combiner")):
        kit = Kit.load(folder)
        region = kit.identity.region
        sites = state / "kits" / "sites" / region
        book, summary, _ = audit_region(run, state / "regions" / region, kit, sites, anyway=True)
        summaries[summary.region] = summary
        yield from _said(book.findings)
    report = audit_controller(run, state / "controller", Kit.load(state / "kits" / "controller"), summaries, again=True)
    yield from _said(report.book.findings)


def _said(findings: list[Finding]) -> Iterator[Finding]:
    return (finding for finding in findings if finding.kind is Kind.WRONG or finding.what == "last word")
