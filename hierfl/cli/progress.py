"""A run as it happens: a live table on a terminal, plain lines otherwise. Talk, so all of it on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hierfl.wire import hierfl_pb2 as pb

__all__ = ["Progress", "describe_round"]


def describe_round(committed: pb.RoundSummary, run: str) -> str:
    """One committed round of ``run`` in one line."""
    parts = [f"round {committed.round}" if committed.task == 1 else "evaluation"]
    names = {"train_loss": "train loss", "eval_loss": "eval loss", "eval_accuracy": "eval accuracy"}
    parts += [f"{words} {committed.metrics[key]:.4f}" for key, words in names.items() if key in committed.metrics]
    parts.append(
        f"{committed.num_updates} updates from {committed.num_sites} sites in {len(committed.regions)} regions"
    )
    again = sorted({share.collected_in for share in committed.regions} - {run, ""})
    if again:
        parts.append(f"the sums of {', '.join(again)} sent again: same model, same task")
    if committed.attempts > 1:
        parts.append(f"attempt {committed.attempts}")
    return ", ".join(parts) + f" ({committed.seconds:.1f} s)"


class Progress:
    """Shows snapshots of one run. ``show`` for each, ``tick`` now and then; use as a context manager.

    In plain lines, what a round waits for is said only if it still waits at the next tick.
    """

    def __init__(self, say: Callable[[str], None] | None = None, live: bool | None = None) -> None:
        self._say = say or (lambda line: click.echo(line, err=True))
        self._live = sys.stderr.isatty() if live is None else live
        self._display: Any = None
        self._waits = self._said = ""

    def __enter__(self) -> Progress:
        if self._live:
            from rich.console import Console
            from rich.live import Live

            self._display = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
            self._display.__enter__()
            self._say = self._display.console.print
        return self

    def __exit__(self, *exc: object) -> None:
        if self._display is not None:
            self._display.__exit__(*exc)

    def show(self, snapshot: pb.FollowRunResponse) -> None:
        """Take a snapshot in; a committed round is said at once."""
        self._waits = ""
        if snapshot.HasField("committed"):
            self._say(describe_round(snapshot.committed, snapshot.summary.run))
        elif snapshot.waiting_for:
            about = f"round {snapshot.round}" if snapshot.round else "next round"
            self._waits = f"{about}: {snapshot.phase}, {snapshot.waiting_for}"
        if self._display is not None:
            self._display.update(self._table(snapshot))

    def tick(self) -> None:
        """Say what is waited for, where that is news."""
        if self._display is None and self._waits not in ("", self._said):
            self._said = self._waits
            self._say(self._waits)

    @staticmethod
    def _table(snapshot: pb.FollowRunResponse) -> Any:
        from rich.table import Table

        run = snapshot.summary
        title = f"{run.run}: round {snapshot.round} of {run.rounds_planned}, {snapshot.phase}"
        table = Table(title=title, title_justify="left", caption=snapshot.waiting_for, caption_justify="left")
        for heading in ("region", "is", "ready", "reported", "needed"):
            table.add_column(heading, justify="left" if heading in ("region", "is") else "right")
        for region in snapshot.regions:
            counts = (region.clients_ready, region.clients_reported, region.clients_needed)
            table.add_row(region.region, region.phase, *map(str, counts))
        return table
