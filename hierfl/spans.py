"""Reading traces: span files in, one round's waterfall out. Pure but for ``read``, and nothing is written.

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
from hierfl.observe import SPAN_CLIENT_WAIT, SPAN_COMMIT, SPAN_ROUND

__all__ = [
    "Leg",
    "Row",
    "SpanLine",
    "Waterfall",
    "clock_offsets",
    "critical_path",
    "in_their_regions",
    "pick_round",
    "read",
    "waterfall",
]

CONTROLLER = "controller"
CLIENT = "client"

Interval = tuple[int, int]


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
    """Spans of one round of ``run`` (a unique beginning will do); by default of the last committed one.

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
    committed = {span.trace for span in spans if span.name == SPAN_COMMIT and span.ok}
    if round_number is None:
        last = max(numbers.values())
        round_number = max((number for trace, number in numbers.items() if trace in committed), default=last)
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


# The waterfall


@dataclass(frozen=True, kw_only=True)
class Row:
    """All spans of one name in one region: a line of the waterfall. Seconds from the round's start."""

    owner: str
    name: str
    num_spans: int
    num_failed: int
    busy: tuple[tuple[float, float], ...]
    """Disjoint intervals in which at least one of them ran."""

    @property
    def busy_s(self) -> float:
        return sum(end - start for start, end in self.busy)


@dataclass(frozen=True, kw_only=True)
class Leg:
    """A stretch of the path that made the round as long as it was."""

    owner: str
    name: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Waterfall:
    """One round, with clocks corrected."""

    run: str
    round: int
    attempts: int
    outcome: str
    trace: str
    seconds: float
    covered: float
    """Part of the round's wall time in which at least one named span ran, 0 to 1."""
    rows: tuple[Row, ...]
    path: tuple[Leg, ...]
    """The critical path, summed by region and phase, longest first."""
    clock_offsets_s: Mapping[str, float]
    """What was added to a process's clock, where that was not 0."""


def waterfall(spans: Sequence[SpanLine]) -> Waterfall:
    """Lay out one round's spans (``pick_round``; at least one)."""
    offsets = clock_offsets(spans)
    moved = [_moved(span, offsets[span.process]) for span in in_their_regions(spans)]
    roots = [span for span in moved if span.name == SPAN_ROUND]
    window = roots or moved
    start = min(span.start_unix_ns for span in window)
    end = max(span.end_unix_ns for span in window)
    inner = [span for span in moved if span.name != SPAN_ROUND]
    named = next(span.attributes for span in moved if "round" in span.attributes)
    return Waterfall(
        run=str(named["run"]),
        round=int(named["round"]),
        attempts=max((int(span.attributes.get("attempt", 1)) for span in moved), default=1),
        outcome=_outcome(moved, roots),
        trace=spans[0].trace,
        seconds=(end - start) / 1e9,
        covered=_length(_union(_clip(inner, start, end))) / max(1, end - start),
        rows=_rows(inner, start),
        path=_summed(critical_path(inner, start, end)),
        clock_offsets_s={process: shift / 1e9 for process, shift in sorted(offsets.items()) if shift},
    )


def _moved(span: SpanLine, shift: int) -> SpanLine:
    return replace(span, start_unix_ns=span.start_unix_ns + shift, end_unix_ns=span.end_unix_ns + shift)


def _outcome(spans: Sequence[SpanLine], roots: Sequence[SpanLine]) -> str:
    if any(span.name == SPAN_COMMIT and span.ok for span in spans):
        return "committed"
    last = max(roots, key=lambda span: span.end_unix_ns, default=None)
    return str(last.attributes.get("outcome", "not committed")) if last else "not committed"


def _rows(spans: Sequence[SpanLine], start: int) -> tuple[Row, ...]:
    groups: dict[tuple[str, str], list[SpanLine]] = defaultdict(list)
    for span in spans:
        groups[span.owner, span.name].append(span)
    first = {key: min(span.start_unix_ns for span in group) for key, group in groups.items()}
    order = sorted(groups, key=lambda key: (key[0] != CONTROLLER, key[0], first[key]))
    return tuple(
        Row(
            owner=owner,
            name=name,
            num_spans=len(groups[owner, name]),
            num_failed=sum(not span.ok for span in groups[owner, name]),
            busy=tuple(
                ((low - start) / 1e9, (high - start) / 1e9)
                for low, high in _union([(span.start_unix_ns, span.end_unix_ns) for span in groups[owner, name]])
            ),
        )
        for owner, name in order
    )


def _clip(spans: Iterable[SpanLine], start: int, end: int) -> list[Interval]:
    return [(max(start, span.start_unix_ns), min(end, span.end_unix_ns)) for span in spans]


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals that cover the same points, in order."""
    merged: list[Interval] = []
    for low, high in sorted(interval for interval in intervals if interval[0] <= interval[1]):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged


def _length(intervals: Iterable[Interval]) -> int:
    return sum(high - low for low, high in intervals)


# The critical path


def critical_path(spans: Sequence[SpanLine], start: int, end: int) -> list[Leg]:
    """What the round was doing, from its end backwards, at each moment the thing that finished last.

    It follows one region down: once a region's span is on the path, only that region is asked what came
    before, and the controller where it has nothing. Where a span has spans inside it, their time is
    theirs. Time in which nothing worked is the region's wait for its clients, or belongs to no named span.
    """
    work = [span for span in spans if span.name not in (SPAN_ROUND, SPAN_CLIENT_WAIT)]
    inside = _descendants(work)
    legs: list[Leg] = []
    owner, now = CONTROLLER, end
    while now > start:
        before = [span for span in work if span.start_unix_ns < now]
        if owner != CONTROLLER:
            before = [s for s in before if s.owner == owner] or [s for s in before if s.owner == CONTROLLER]
        last = max(before, key=lambda span: (min(span.end_unix_ns, now), span.start_unix_ns), default=None)
        if last is None or last.end_unix_ns <= start:
            legs += _idle(spans, owner, start, now)
            break
        if last.end_unix_ns < now:
            legs += _idle(spans, last.owner if owner == CONTROLLER else owner, last.end_unix_ns, now)
            now = last.end_unix_ns
        owner = last.owner
        below = [span.end_unix_ns for span in inside[last.span] if span.end_unix_ns < now]
        low = max([start, last.start_unix_ns, *below])
        legs.append(Leg(owner=owner, name=last.name, seconds=(now - low) / 1e9))
        now = low
    return legs


def _descendants(spans: Sequence[SpanLine]) -> dict[str, list[SpanLine]]:
    """For each span id, the spans anywhere below it."""
    by_id = {span.span: span for span in spans}
    found: dict[str, list[SpanLine]] = defaultdict(list)
    for span in spans:
        seen = {span.span}
        above = by_id.get(span.parent)
        while above is not None and above.span not in seen:  # a damaged file might hold a circle
            found[above.span].append(span)
            seen.add(above.span)
            above = by_id.get(above.parent)
    return found


def _idle(spans: Iterable[SpanLine], owner: str, start: int, end: int) -> list[Leg]:
    """A stretch without work: so much of it waiting for clients, the rest unnamed."""
    waits = [span for span in spans if span.name == SPAN_CLIENT_WAIT and span.owner == owner]
    waited = _length(_union(_clip(waits, start, end)))
    parts = ((SPAN_CLIENT_WAIT, waited), (SPAN_ROUND, end - start - waited))
    return [Leg(owner=owner, name=name, seconds=length / 1e9) for name, length in parts if length > 0]


def _summed(legs: Iterable[Leg]) -> tuple[Leg, ...]:
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for leg in legs:
        sums[leg.owner, leg.name] += leg.seconds
    made = [Leg(owner=owner, name=name, seconds=seconds) for (owner, name), seconds in sums.items()]
    return tuple(sorted(made, key=lambda leg: (-leg.seconds, leg.owner, leg.name)))
