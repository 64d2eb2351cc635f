"""The audit where its halves meet: what was counted at the controller against each region's signed summary.

Pure. What came after a summary was made is not held against it: the federation may be running.
"""

from __future__ import annotations

from collections.abc import Mapping

from controller.audit_rows import RunRows
from controller.rows import RoundRow
from hierfl.audit import Book, Kind, RegionSummary, SealSummary
from hierfl.receipts import ReceiptState
from hierfl.types import RegionId

__all__ = ["join", "regions_counted"]


def regions_counted(rows: RunRows) -> list[RegionId]:
    """Regions of which a partial was counted: whose summaries the audit needs."""
    told = {share.region for row in rows.rounds for share in row.regions}
    return sorted(told | {partial.region for record in rows.records.values() for partial in record.partials})


def join(book: Book, rows: RunRows, summaries: Mapping[RegionId, RegionSummary]) -> None:
    """Hold every counted partial against its region's summary, and every summary against what was counted.

    What came after a summary was made is not held against it: the federation may be running.
    """
    for region, summary in sorted(summaries.items()):
        if summary.num_wrong:
            book.wrong("summary", region, "rows that are wrong in the region", summary.num_wrong, 0)
        book.expect("summary", region, "run", summary.run, rows.run.run)
        for row in rows.rounds:
            shares = [share for share in row.regions if share.region == region]
            if row.committed_unix_ns > summary.made_unix_ns:
                key = f"{row.run}/{row.task}/{row.round} of {region}"
                book.note(Kind.OPEN, "summary", key, "round", "committed after the summary was made")
                shares = []
            for share in shares:
                counts = (share.weight, share.num_sites, share.num_updates)
                _join_counted(book, summary, row, share.digest, counts)
        _join_answers(book, rows, summary)
        for seal in summary.seals:
            _join_seal(book, rows, region, seal)


def _join_counted(book: Book, summary: RegionSummary, row: RoundRow, digest: str, counts: tuple[int, int, int]) -> None:
    key, seal = f"{row.run}/{row.task}/{row.round} of {summary.region}", summary.seal(digest)
    if seal is None:
        book.wrong("rounds", key, "partial", digest, "one that the region's summary has")
        return
    expected = (seal.weight, seal.num_sites, seal.num_updates)
    book.expect("rounds", key, "weight, sites, updates, as in the region's receipts", counts, expected)
    if seal.collected_in != row.run:
        return  # its receipts are another run's, and say what became of them there
    if seal.state is ReceiptState.SEALED:
        book.note(Kind.OPEN, "summary", key, "last word", "the region has not heard yet that it was counted")
        return
    word = (ReceiptState.COMMITTED, row.version)
    book.expect("summary", key, "word to the clients", (seal.state, seal.version), word)


def _join_answers(book: Book, rows: RunRows, summary: RegionSummary) -> None:
    """Nothing is held here as a region's that the region did not announce in its border ledger."""
    for answer in rows.answers:
        if answer.region != summary.region or not answer.digest or answer.received_unix_ns > summary.made_unix_ns:
            continue
        seal = summary.seal(answer.digest)
        announced = seal is not None and seal.crossings > 0
        book.expect(
            "answers", f"{answer.key} of {answer.region}", "in the region's border ledger", announced, expected=True
        )


def _join_seal(book: Book, rows: RunRows, region: RegionId, seal: SealSummary) -> None:
    """What a region calls counted in this run is counted here, and once."""
    if seal.collected_in != rows.run.run:
        return
    counted = [
        row for row in rows.rounds for share in row.regions if (share.region, share.digest) == (region, seal.digest)
    ]
    if seal.state is ReceiptState.COMMITTED and not counted:
        expected = f"no word but that it was not counted: no round of {rows.run.run} has it"
        book.wrong("summary", f"{region} {seal.seal_id}", "word to the clients", f"committed({seal.version})", expected)
    for row in counted[1:]:
        book.wrong("rounds", f"{row.run}/{row.task}/{row.round} of {region}", "partial", seal.digest, "counted once")
