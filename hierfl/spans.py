"""Reading traces: span files in, one round's spans out, on one clock. Pure but for ``read``.

Files come from several processes, perhaps on machines whose clocks differ, perhaps with some missing and
their last lines cut: what can be read is used, and what was skipped is counted.

Clocks: a span that answers an RPC (``server``) lies inside its caller's span, and one that follows an
offer (``consumer``) starts after it. From all such pairs between two processes comes an interval for the
difference of their clocks (as in NTP: Mills et al., RFC 5905, section 8). Where it holds 0 nothing is
moved; else its middle is taken.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from hierfl.errors import NotFound
from hierfl.observe import SPAN_COMMIT, SPAN_ROUND

__all__ = ["CONTROLLER", "SpanLine", "clock_offsets", "in_their_regions", "on_one_clock", "pick_round", "read"]

CONTROLLER = "controller"
CLIENT = "client"


@dataclass(frozen=True, kw_only=True)
class SpanLine:
    """One line of a span file (``hierfl/spanfile.py``); times in Unix nanoseconds of its process's clock."""

    trace: str
    span: str
    parent: str
    name: str
    kind: str
    process: str
    start_unix_ns: int
    end_unix_ns: int
    ok: bool = True
    attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """The region whose time it is; ``controller`` (or the process) where it names none."""
        region = self.attributes.get("region")
        if region is not None:
            return str(region)
        tier, _, rest = self.process.partition(".")
        return rest.partition(".")[0] if tier == "combiner" and rest else tier


_decoder = msgspec.json.Decoder(SpanLine)


def read(directory: Path) -> tuple[list[SpanLine], int]:
    """All spans in ``traces/*.jsonl`` below ``directory``, and how many lines or files could not be read."""
    spans: list[SpanLine] = []
    skipped = 0
    for path in sorted(directory.rglob("traces/*.jsonl")):
        try:
            lines = path.read_bytes().splitlines()
        except OSError:
            skipped += 1
            continue
        for line in lines:
            try:
                spans.append(_decoder.decode(line))
            except (msgspec.MsgspecError, UnicodeDecodeError):
                skipped += 1
    return spans, skipped


def pick_round(spans: Iterable[SpanLine], run: str, round_number: int | None = None) -> list[SpanLine]:
    """Spans of one round of ``run`` (a unique beginning will do); by default of the last one of training that
    was committed.

    Raises:
        NotFound: No such run, or no such round, in these spans.
    """
    spans = list(spans)
    keys = {
        span.trace: (str(span.attributes["run"]), int(span.attributes["round"]))
        for span in spans
        if "run" in span.attributes and "round" in span.attributes
    }
    chosen = _only_run({name for name, _ in keys.values()}, run)
    numbers = {trace: number for trace, (name, number) in keys.items() if name == chosen}
    if round_number is None:
        committed = {span.trace for span in spans if span.name == SPAN_COMMIT and span.ok}
        evaluations = {span.trace for span in spans if span.attributes.get("task") == "evaluate"}
        round_number = max((t in committed, t not in evaluations, number) for t, number in numbers.items())[-1]
    picked = [span for span in spans if numbers.get(span.trace) == round_number]
    if not picked:
        known = sorted(set(numbers.values()))
        raise NotFound("trace of round", str(round_number), f"there are {known[0]} to {known[-1]}")
    return picked


def _only_run(runs: set[str], wanted: str) -> str:
    found = [wanted] if wanted in runs else sorted(run for run in runs if run.startswith(wanted))
    if len(found) != 1:
        known = ", ".join(found or sorted(runs)) or "none"
        raise NotFound("trace of run", wanted, f"{'it begins several' if found else 'traced runs'}: {known}")
    return found[0]


# Clocks


def clock_offsets(spans: Sequence[SpanLine]) -> dict[str, int]:
    """Nanoseconds to add to each process's times; the process of the round itself is the reference.

    Processes are joined nearest first: by the pair of processes whose interval is the narrowest.
    """
    bounds = _bounds(spans)
    reference = min(spans, key=lambda span: (span.name != SPAN_ROUND, span.start_unix_ns)).process
    offsets = {reference: 0}
    while True:
        edges = [
            (high - low, known, new, low, high)
            for (new, known), (low, high) in bounds.items()
            if known in offsets and new not in offsets
        ]
        if not edges:
            break
        _, known, new, low, high = min(edges)
        offsets[new] = offsets[known] + _nearest_shift(low, high)
    return {span.process: offsets.get(span.process, 0) for span in spans}


def on_one_clock(spans: Iterable[SpanLine], offsets: Mapping[str, int]) -> list[SpanLine]:
    """The spans with their processes' offsets added."""
    return [
        replace(
            span,
            start_unix_ns=span.start_unix_ns + offsets[span.process],
            end_unix_ns=span.end_unix_ns + offsets[span.process],
        )
        for span in spans
    ]


def _bounds(spans: Sequence[SpanLine]) -> dict[tuple[str, str], tuple[float, float]]:
    """For processes (a, b): least and largest (shift of a - shift of b) that their pairs of spans allow."""
    by_id = {span.span: span for span in spans}
    found: dict[tuple[str, str], tuple[float, float]] = defaultdict(lambda: (-math.inf, math.inf))
    for child in spans:
        parent = by_id.get(child.parent)
        if parent is None or parent.process == child.process:
            continue
        low = float(parent.start_unix_ns - child.start_unix_ns)
        high = float(parent.end_unix_ns - child.end_unix_ns) if child.kind == "server" else math.inf
        if high < low:  # it outlived its caller, who had given up
            high = math.inf
        for pair, new_low, new_high in (
            ((child.process, parent.process), low, high),
            ((parent.process, child.process), -high, -low),
        ):
            old_low, old_high = found[pair]
            found[pair] = (max(old_low, new_low), min(old_high, new_high))
    return found


def _nearest_shift(low: float, high: float) -> int:
    """0 where it fits, the middle of a closed interval, the only end of an open one."""
    if low <= 0 <= high:
        return 0
    if math.isinf(low) or math.isinf(high):
        return round(high if math.isinf(low) else low)
    return round((low + high) / 2)


# Regions


def in_their_regions(spans: Sequence[SpanLine]) -> list[SpanLine]:
    """The spans of sites' processes, with the region that the process or the combiner it called belongs to."""
    by_id = {span.span: span for span in spans}
    regions = {span.process: span.owner for span in spans if "region" in span.attributes}
    for child in spans:
        caller = by_id.get(child.parent)
        if caller is not None and child.kind == "server" and child.owner != CONTROLLER:
            regions.setdefault(caller.process, child.owner)
    return [
        replace(span, attributes={**span.attributes, "region": regions[span.process]})
        if span.owner == CLIENT and span.process in regions
        else span
        for span in spans
    ]
