"""``hierfl runs``: what was submitted, how each round went, and its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hierfl.cli.output import emit, output_option, say, table
from hierfl.cli.reach import call, operator_options
from hierfl.errors import ConfigError, RunFailed, Unreachable

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from hierfl.cli.progress import Progress
    from hierfl.operator import Operator
    from hierfl.wire import hierfl_pb2 as pb

TICK_S = 1.0
"""How long a round may wait before it is said for what."""
RETRY_S = 1.0
"""Between two tries to reach a controller that went away."""
ENDED = ("finished", "failed", "cancelled")
"""States after which nothing follows."""
RESUME = "`hierfl runs resume {run}`"
MOVES = {
    "already_released": "a region gives one sum over a base model and a task, and its bytes are gone, or in another "
    "form than the job's [partials] ask for: submit a new run with another first model or other [app] keys",
    "too_few_sites": "too few clients handed in, or fewer than round.min_clients or k are there; the clients' logs "
    "at the sites say why; mend that, then " + RESUME,
}
"""What to do about a code of a region, the first that a paused run's reason names."""

__all__ = ["follow", "message_document", "raise_for_outcome", "runs"]


def message_document(message: Message) -> dict[str, Any]:
    """A protobuf message as a plain document: field names as in the schema, integers as integers."""
    return {field.name: _plain(getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _plain(value: Any) -> Any:
    if hasattr(value, "DESCRIPTOR"):
        return message_document(value)
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (str, bytes, int, float)):
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return [_plain(item) for item in value]


def raise_for_outcome(summary: pb.RunSummary) -> None:
    """Exit with the run's outcome: silent where it goes on or is finished."""
    if summary.state == "paused":
        moves = (move for code, move in MOVES.items() if f"({code})" in summary.reason)
        move = next(moves, f"mend that, then {RESUME}").format(run=summary.run)
        raise RunFailed(f"run {summary.run} is paused: {summary.reason}; {move}")
    if summary.state in ("failed", "cancelled"):
        raise RunFailed(f"run {summary.run} {summary.state}: {summary.reason or 'by an operator'}")


async def follow(operator: Operator, run: str, *, goes_on: bool = True) -> pb.RunSummary:
    """Show a run until it ends or pauses; on Ctrl-C say how to come back to it, where it ``goes_on`` without us."""
    from hierfl.cli.progress import Progress

    summary = (await operator.run(run)).summary
    try:
        with Progress() as progress:
            ticking = asyncio.create_task(_tick(progress))
            try:
                async for snapshot in _snapshots(operator, summary.run):
                    summary = snapshot.summary
                    progress.show(snapshot)
                    if summary.state == "paused":
                        break
            finally:
                ticking.cancel()
    except asyncio.CancelledError:
        if goes_on:
            say(f"detached; the run goes on. Back to it: `hierfl status {run} -w`; its end: `hierfl runs cancel {run}`")
        raise
    return summary


async def _snapshots(operator: Operator, run: str) -> AsyncIterator[pb.FollowRunResponse]:
    """Snapshots until the run ends, each committed round once. A controller that goes away is waited for."""
    told: set[tuple[int, int]] = set()
    said, state = False, ""
    while True:
        why = f"the controller at {operator.address} closed the connection"
        try:
            async for snapshot in operator.follow(run):
                said, state = False, snapshot.summary.state
                key = (snapshot.committed.task, snapshot.committed.round)
                if snapshot.HasField("committed") and key in told:
                    continue
                told.add(key)
                yield snapshot
        except Unreachable as error:
            why = str(error)
        if state in ENDED:
            return
        if not said:
            say(f"{why}; the run goes on when it is back, and is followed again")
            said = True
        await asyncio.sleep(RETRY_S)
        if operator.can_move:
            with contextlib.suppress(Unreachable):
                await operator.reconnect()


async def _tick(progress: Progress) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        progress.tick()


@click.group()
def runs() -> None:
    """List, show, cancel and resume training runs."""


@runs.command("list")
@operator_options
@output_option
def list_(kit: Path | None, address: tuple[str, ...], output: str) -> None:
    """Runs, newest first."""
    found = call(kit, address, lambda operator: operator.runs())
    found.sort(key=lambda run: run.submitted_unix_ns, reverse=True)
    document = {"runs": [message_document(run) for run in found]}
    emit(document, "hierfl.runs/1", output, lambda: _runs_table(found))


def _runs_table(found: list[pb.RunSummary]) -> None:
    headings = ("run", "name", "state", "rounds", "version", "submitted", "why")
    rows = [
        (
            run.run,
            run.name,
            run.state,
            f"{run.rounds_committed}/{run.rounds_planned}",
            run.model_version,
            _when(run.submitted_unix_ns),
            run.reason,
        )
        for run in found
    ]
    table(headings, rows, empty="no runs yet: submit one with `hierfl train job.toml`")


def _when(unix_ns: int) -> str:
    return datetime.fromtimestamp(unix_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S") if unix_ns else ""


@runs.command()
@click.argument("run")
@click.option(
    "--history",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write one row a round to FILE: .csv or .parquet.",
)
@operator_options
@output_option
def show(run: str, history: Path | None, kit: Path | None, address: tuple[str, ...], output: str) -> None:
    """One run, round by round.

    \b
    Examples:
      hierfl runs show digits-7f3a2b
      hierfl runs show digits-7f3a2b --history history.csv
    """
    found = call(kit, address, lambda operator: operator.run(run))
    if history is not None:
        write_history(history, [round_row(item) for item in found.rounds])
        say(f"{len(found.rounds)} rounds written to {history}")
    document = message_document(found.summary) | {"rounds": [message_document(item) for item in found.rounds]}
    emit(document, "hierfl.run/1", output, lambda: _rounds_table(found))


def round_row(item: pb.RoundSummary) -> dict[str, Any]:
    """One round as a flat row: fixed columns, then one a metric, then bytes out a region."""
    row: dict[str, Any] = {
        "round": item.round,
        "task": "train" if item.task == 1 else "evaluate",
        "attempts": item.attempts,
        "model_version": item.model_version,
        "model_hash": item.model_hash,
        "weight": item.weight,
        "num_sites": item.num_sites,
        "num_updates": item.num_updates,
        "seconds": item.seconds,
        "committed_unix_ns": item.committed_unix_ns,
    }
    row |= {name: item.metrics[name] for name in sorted(item.metrics)}
    return row | {f"bytes_out.{share.region}": share.bytes_out for share in item.regions}


def write_history(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV or Parquet, by the file's suffix; whole or not at all."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    from hierfl.folders import whole_file

    writers: Mapping[str, Callable[[pa.Table, str], None]] = {".csv": csv.write_csv, ".parquet": parquet.write_table}
    writer = writers.get(path.suffix)
    if writer is None:
        raise ConfigError("--history", str(path), f"must end in {' or '.join(writers)}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = pa.table({name: [row.get(name) for row in rows] for name in names})
    with whole_file(path) as temporary:
        writer(columns, str(temporary))


def _rounds_table(found: pb.GetRunResponse) -> None:
    from hierfl import documents
    from hierfl.job import Job

    run = found.summary
    exact = "the same bits whatever the grouping" if run.exact_in_two_tiers else "approximate across regions"
    say(f"{run.run} {run.name}: {run.state} {run.reason}".rstrip())
    say(f"app {run.app}, strategy {run.strategy} ({exact}), updates {run.updates}, model {run.model_hash}")
    if drop_bits := documents.decode(found.job, Job, "job").partials.drop_bits:
        say(f"each region rounds its sums by {drop_bits} bits; what is left over goes into its next round")
    metrics = sorted({name for item in found.rounds for name in item.metrics if "loss" in name or "accuracy" in name})
    metrics = [name for name in metrics if not name.endswith("_sum")]
    headings = ("round", "task", "version", "attempts", "sites", "updates", *metrics, "seconds", "model")
    rows = [
        (
            item.round,
            "train" if item.task == 1 else "evaluate",
            item.model_version,
            item.attempts,
            item.num_sites,
            item.num_updates,
            *(f"{item.metrics[name]:.4f}" if name in item.metrics else "" for name in metrics),
            f"{item.seconds:.2f}",
            item.model_hash[:12],
        )
        for item in found.rounds
    ]
    table(headings, rows, empty="no round committed yet")


@runs.command()
@click.argument("run")
@operator_options
def cancel(run: str, kit: Path | None, address: tuple[str, ...]) -> None:
    """End a run now; its last committed model stays."""
    state = call(kit, address, lambda operator: operator.cancel(run))
    say(f"run {run} is {state}")


@runs.command()
@click.argument("run")
@operator_options
def resume(run: str, kit: Path | None, address: tuple[str, ...]) -> None:
    """Go on with a paused run."""
    state = call(kit, address, lambda operator: operator.resume(run))
    say(f"run {run} is {state}; follow it with `hierfl status {run} -w`")
