"""One round's spans laid out: region by region, how much of it they cover, and its critical path. Pure.

The critical path is what the round was doing at each moment, asked from its end backwards: of all that
was at work, what finished last. Its longest stretch is the leg to look at first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hierfl.observe import SPAN_CLIENT_WAIT, SPAN_COMMIT, SPAN_ROUND
from hierfl.spans import CONTROLLER, SpanLine, clock_offsets, in_their_regions, on_one_clock

__all__ = ["Leg", "Row", "Waterfall", "critical_path", "waterfall"]

Interval = tuple[int, int]
"""Start and end, Unix nanoseconds."""


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
    moved = on_one_clock(in_their_regions(spans), offsets)
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
