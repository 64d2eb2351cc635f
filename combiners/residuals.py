"""What rounding left over of a region's sums: one residual a run, added to the next sum that is rounded.

A residual moves on COMMITTED only. The one that a seal leaves is a file, fsynced before the seal's transaction, which
names it, and the one that is in the sum; the transaction of the verdict makes it the run's, if the run still has the
one that is in the sum. So a crash leaves the old one or the new one, a verdict said twice moves nothing twice, and a
partial that is never counted leaves what there was. Another run that counts the same sealed bytes has the same history,
or keeps its own.

One partial at a time carries a run's residual. A seal that comes before the last word on an earlier round goes without
one and leaves nothing: what it leaves out is lost, at most half a step a value, and nothing is sent twice.

A file is kept while a run has it, or the sealed bytes that left it are kept: ``blobs/<digest>.residual``, packed.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from combiners.sealed import write_transfer
from combiners.zonefile import ZoneFile, storage_errors
from hierfl.aggregation import ColumnGroup
from hierfl.errors import StoreDamaged, WireError
from hierfl.packing import PackedSums
from hierfl.plan import Plan
from hierfl.records import PartialHead
from hierfl.rounding import rounded_groups
from hierfl.types import Int64Array, RunId, TaskKind
from hierfl.wire.framefile import read_frames
from hierfl.wire.packed import expect_residual, outgoing_residual, packed_sums
from hierfl.wire.transfer import Outgoing

__all__ = ["Carried", "LeftOver", "ResidualBook", "left_over_of"]

logger = logging.getLogger(__name__)

KEEP_RUNS = 16
"""Runs whose residuals are kept, those that moved last: nobody tells a region that a run without a last evaluation has
finished."""


@dataclass(frozen=True)
class Carried:
    """What a run's earlier rounds left over; ``digest`` is empty and ``sums`` are ``None`` where there is nothing."""

    digest: str = ""
    sums: PackedSums | None = None


@dataclass(frozen=True)
class LeftOver:
    """What a seal leaves over, encoded: to be stored with it."""

    outgoing: Outgoing

    @property
    def digest(self) -> str:
        return self.outgoing.digest


def left_over_of(layout_hash: str, groups: tuple[ColumnGroup, ...], values: Mapping[str, Int64Array]) -> LeftOver:
    """Pack and encode what rounding left over of these groups' sums."""
    rounded = rounded_groups(groups)
    outgoing = outgoing_residual(layout_hash, rounded, values)
    outgoing.encode()
    return LeftOver(outgoing)


class ResidualBook:
    """The residuals in one zone store. Not for two threads at once."""

    def __init__(self, file: ZoneFile, blobs: Path) -> None:
        self._file, self._blobs = file, blobs
        self.sweep()

    # ------------------------------------------------------------ a seal

    def carried(self, plan: Plan) -> Carried | None:
        """What the next sum of the plan's run begins with; ``None`` if it has to go without, and leave nothing.

        Raises:
            StorageError: The disk cannot be read.
        """
        if self._file.rows(
            "select 1 from addresses join residuals using (seal_id) where run = ? and task = ? and not is_judged",
            (plan.run, TaskKind.TRAIN.value),
        ):
            logger.warning("%s: no last word on an earlier sum yet: what rounding leaves out is not kept", plan.key)
            return None
        digest = self._of_run(plan.run)
        if not digest:
            return Carried()
        try:
            return Carried(digest, self._read(digest, plan))
        except StoreDamaged as error:
            logger.error("%s; run %s goes on without", error, plan.run)
            self.forget(plan.run)
            return Carried()

    def _of_run(self, run: RunId) -> str:
        rows = self._file.rows("select digest from carried where run = ?", (run,))
        return str(rows[0][0]) if rows else ""

    def _read(self, digest: str, plan: Plan) -> PackedSums:
        path, groups = self._path(digest), rounded_groups(plan.task.groups)
        try:
            with storage_errors(path):
                incoming = read_frames(path, expect_residual(groups, plan.base.layout_hash, digest))
            return packed_sums(incoming, groups)
        except (WireError, FileNotFoundError) as error:
            raise StoreDamaged(f"{path}, what rounding left over, is damaged: {error}") from None

    def write(self, left_over: LeftOver) -> None:
        """Make its file durable. Raises ``DiskFull``, ``StorageError``."""
        path = self._path(left_over.digest)
        with storage_errors(path):
            write_transfer(path, left_over.outgoing)

    def note(self, database: sqlite3.Connection, head: PartialHead) -> None:
        """In the transaction of a seal: what is in its sum, and what it leaves."""
        if head.left_over:
            row = (head.seal_id, head.carried, head.left_over)
            database.execute("insert into residuals values (?, ?, ?)", row)

    # ------------------------------------------------------------ a verdict

    def advance(self, database: sqlite3.Connection, run: RunId, seal_id: str) -> None:
        """In the transaction of a verdict: ``run`` has counted this seal."""
        row = database.execute("select carried, left_over from residuals where seal_id = ?", (seal_id,)).fetchone()
        if row is None or row[0] != self._of_run(run):
            return
        database.execute(
            "insert into carried values (?, ?, ?) on conflict do update"
            " set digest = excluded.digest, moved_unix_ns = excluded.moved_unix_ns",
            (run, row[1], time.time_ns()),
        )
        database.execute(
            "delete from carried where run not in (select run from carried order by moved_unix_ns desc, run limit ?)",
            (KEEP_RUNS,),
        )

    def forget(self, run: RunId) -> None:
        """The run is over: no sum of it follows."""
        if self._of_run(run):
            with self._file.transaction() as database:
                database.execute("delete from carried where run = ?", (run,))
            self.sweep()

    # ------------------------------------------------------------ files

    def size(self, digest: str) -> int:
        """Bytes of a residual; 0 for none."""
        try:
            return self._path(digest).stat().st_size if digest else 0
        except FileNotFoundError:
            return 0

    def sweep(self) -> None:
        """Remove what no run has and no kept seal left: a crash, a verdict or a pruned partial may leave such files."""
        rows = self._file.rows(
            "select digest from carried"
            " union select left_over from residuals join partials using (seal_id) where is_kept"
        )
        kept = {self._path(digest) for (digest,) in rows}
        for path in self._blobs.glob("*.residual"):
            if path not in kept:
                path.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self._blobs / f"{digest.replace(':', '-')}.residual"
