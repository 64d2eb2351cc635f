"""Error feedback: what a client's updates have left out so far, one residual a run, added to its next update.

A residual advances on COMMITTED only. The one that goes with an update is written beside it, before the update is held
(``held.py``: ``updates/<id>.residual``), and a rename makes it the run's when the update is counted; where the update
is dropped for another reason it is dropped with it, and the run's stays what it was. So a crash leaves the old or
the new one, and COMMITTED said twice moves nothing twice.

One update at a time carries a run's residual. A round may begin before the last word on the one before: its update
then waits for that word a while (``session.py``), and goes without a residual if it does not come. What such an
update leaves out is lost; nothing is sent twice, in whatever order the words come.

    DIR/residuals/<run>.float32    float32, little-endian: the vectors with feedback, one after the other
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hierfl import encodings
from hierfl.aggregation import ColumnGroup
from hierfl.client.files import make_folder, replace_durably
from hierfl.encodings import Encoding
from hierfl.errors import StoreDamaged
from hierfl.types import Float32Array, RunId

__all__ = ["Residuals", "encode_with_feedback"]

KEEP_RUNS = 4
"""Runs whose residuals are kept, the newest: nobody tells a client that a run is over."""

Groups = tuple[ColumnGroup, ...]


def encode_with_feedback(
    encoding: Encoding,
    groups: Groups,
    vectors: Mapping[str, Float32Array],
    seed: int,
    residual: Mapping[str, Float32Array] | None,
) -> tuple[dict[str, np.ndarray], dict[str, Float32Array] | None]:
    """An update's wire vectors, and what they leave out of ``vectors`` and ``residual`` together.

    Args:
        seed: The task's.
        residual: Of the updates before, by group, empty at first; ``None``: this update carries none.
    """
    if residual is None or not encoding.feedback:
        return encodings.encode_update(encoding, groups, vectors, seed), None
    totals = dict(vectors)
    for group in feedback_groups(encoding, groups):
        if group.name in residual:
            totals[group.name] = vectors[group.name] + residual[group.name]
    wire = encodings.encode_update(encoding, groups, totals, seed)
    received = {name: [vector] for name, vector in wire.items()}
    left_out = {
        group.name: totals[group.name] - encodings.encoding_of(encoding, group).decode(group, received)
        for group in feedback_groups(encoding, groups)
    }
    return wire, left_out


def feedback_groups(encoding: Encoding, groups: Groups) -> Groups:
    """Those whose vectors have a residual."""
    return tuple(group for group in groups if encodings.encoding_of(encoding, group).feedback)


class Residuals:
    """The residuals of one client."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder / "residuals")

    def load(self, run: RunId, encoding: Encoding, groups: Groups) -> dict[str, Float32Array]:
        """The run's residual, by group; empty where there is none yet.

        Raises:
            StoreDamaged: It is of another length, or cannot be read. It is gone then: a run goes on without.
        """
        path, groups = self._path(run), feedback_groups(encoding, groups)
        if not path.exists():
            return {}
        try:
            values = np.fromfile(path, "<f4").astype(np.float32, copy=False)
        except OSError:
            values = np.empty(0, np.float32)
        if values.size != sum(group.num_values for group in groups) or not np.isfinite(values).all():
            path.unlink(missing_ok=True)
            raise StoreDamaged(f"what the updates of run {run} left out, {path}, was damaged; it begins anew")
        ends = np.cumsum([group.num_values for group in groups])
        return {group.name: part for group, part in zip(groups, np.split(values, ends[:-1]), strict=True)}

    def advance(self, run: RunId, left_out: Path) -> None:
        """``left_out``, the file beside an update that was counted, becomes the run's. Again: nothing."""
        if left_out.exists():
            replace_durably(left_out, self._path(run))
            others = (path for path in self.folder.glob("*.float32") if path != self._path(run))
            for old in sorted(others, key=lambda path: path.stat().st_mtime_ns)[: 1 - KEEP_RUNS]:
                old.unlink(missing_ok=True)

    def drop(self, run: RunId) -> None:
        """The run is over: nothing will be added to a next update."""
        self._path(run).unlink(missing_ok=True)

    def _path(self, run: RunId) -> Path:
        return self.folder / f"{run}.float32"
