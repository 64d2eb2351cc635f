"""One trace a round: the names of its spans and attributes, and how its context travels.

Everything that is ever named in a trace is listed here; a span or a key that is not is dropped before
it is written. Sites are named in their own process's file only: combiners and controllers have no key
for them, and what goes to a collector has no span that stands for a single arrival (DESIGN.md section 7).

    observe.configure("combiner.eu-west", directory)           # once a process; its tier comes first
    with observe.span(observe.SPAN_SEAL, run=run, round=3) as span:
        span.set(num_updates=4)
    handle = observe.begin(observe.SPAN_CLIENT_WAIT, ...)      # where start and end are different events
    with observe.under(handle): ...                            # spans opened here are its children
    handle.end()

Between processes: a caller adds ``inject()`` to an RPC's metadata and the handler wraps its work in
``remote_parent(context.invocation_metadata())``; an offer carries ``traceparent()`` as a field, and who
takes it up wraps its work in ``remote_parent(offer.traceparent)``. Only the W3C ``traceparent`` is ever
sent: ``tracestate`` and baggage could carry anything across a border.

Until ``configure`` is called all of this does nothing, and OpenTelemetry is not even imported.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hierfl.errors import HierFLError

if TYPE_CHECKING:
    from contextvars import Token

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import SpanKind, Tracer

    from hierfl.spanfile import RoundIds

__all__ = [
    "ARRIVAL_SPANS",
    "SITE_KEYS",
    "SPAN_ANNOUNCE",
    "SPAN_CHECK",
    "SPAN_CLIENT_WAIT",
    "SPAN_COMMIT",
    "SPAN_EVALUATE",
    "SPAN_FOLD",
    "SPAN_MERGE",
    "SPAN_MODEL_FETCH",
    "SPAN_NAMES",
    "SPAN_PLAN",
    "SPAN_RECEIVE",
    "SPAN_ROUND",
    "SPAN_SEAL",
    "SPAN_TRAIN",
    "SPAN_UPLINK",
    "SPAN_UPLOAD",
    "SPAN_WORDS",
    "TIERS",
    "TIER_KEYS",
    "Span",
    "begin",
    "configure",
    "flush",
    "inject",
    "remote_parent",
    "shutdown",
    "span",
    "tier_of",
    "traceparent",
    "under",
]

SPAN_ROUND: Final = "hierfl.round"
SPAN_PLAN: Final = "hierfl.plan"
SPAN_MODEL_FETCH: Final = "hierfl.model_fetch"
SPAN_CLIENT_WAIT: Final = "hierfl.client_wait"
SPAN_TRAIN: Final = "hierfl.train"
SPAN_EVALUATE: Final = "hierfl.evaluate"
SPAN_UPLOAD: Final = "hierfl.upload"
SPAN_CHECK: Final = "hierfl.check"
SPAN_FOLD: Final = "hierfl.fold"
SPAN_SEAL: Final = "hierfl.seal"
SPAN_UPLINK: Final = "hierfl.uplink"
SPAN_RECEIVE: Final = "hierfl.receive"
SPAN_MERGE: Final = "hierfl.merge"
SPAN_COMMIT: Final = "hierfl.commit"
SPAN_ANNOUNCE: Final = "hierfl.announce"

SPAN_WORDS: Final[dict[str, str]] = {
    SPAN_ROUND: "outside every named span",
    SPAN_PLAN: "planning",
    SPAN_MODEL_FETCH: "fetching the model",
    SPAN_CLIENT_WAIT: "waiting for its clients",
    SPAN_TRAIN: "training",
    SPAN_EVALUATE: "evaluating",
    SPAN_UPLOAD: "uploading updates",
    SPAN_CHECK: "checking updates",
    SPAN_FOLD: "folding updates",
    SPAN_SEAL: "sealing",
    SPAN_UPLINK: "sending its partial",
    SPAN_RECEIVE: "receiving partials",
    SPAN_MERGE: "merging",
    SPAN_COMMIT: "committing",
    SPAN_ANNOUNCE: "announcing the model",
}
"""Every span in the order of a round, and what someone did in it: "eu spent 1.9 s training"."""

SPAN_NAMES: Final = frozenset(SPAN_WORDS)

ARRIVAL_SPANS: Final = frozenset({SPAN_TRAIN, SPAN_EVALUATE, SPAN_UPLOAD, SPAN_CHECK, SPAN_FOLD})
"""One of these stands for one client's arrival: kept in files inside the region, never sent to a collector."""

TIERS: Final = ("controller", "combiner", "client", "operator")
"""First part of a process's name, as in ``combiner.eu-west.intake-1``."""

_REGION_KEYS = frozenset(
    {
        "attempt",
        "bytes",
        "error",
        "intake",
        "model_version",
        "num_clients",
        "num_partials",
        "num_regions",
        "num_sites",
        "num_updates",
        "outcome",
        "reason",
        "region",
        "round",
        "run",
        "task",
    }
)
SITE_KEYS: Final = frozenset({"site", "client", "num_examples"})
"""They name or describe one site: only its own file has them."""

TIER_KEYS: Final[dict[str, frozenset[str]]] = {
    "controller": _REGION_KEYS,
    "combiner": _REGION_KEYS,
    "client": _REGION_KEYS | SITE_KEYS,
    "operator": _REGION_KEYS,
}
"""Attribute keys that a process of each tier may write (as ``hierfl.<key>``); all others are dropped."""

KEY_PREFIX: Final = "hierfl."
TRACEPARENT: Final = "traceparent"

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_KIND = "hierfl.remote_kind"  # key in OpenTelemetry's context, not an attribute

Value = str | int | float | bool


class Span:
    """One span being recorded; with no tracing configured it does nothing."""

    def __init__(self, recorded: OtelSpan | None = None, context: Context | None = None) -> None:
        self._recorded = recorded
        self._context = context

    def set(self, **attributes: Value | None) -> None:
        """Add attributes by their short names (``num_sites=4``); ``None`` is left out."""
        if self._recorded is not None:
            self._recorded.set_attributes(_full_keys(attributes))

    def end(self, error: BaseException | None = None) -> None:
        """Close the span; of an error it keeps the code alone, since texts may describe a site."""
        if self._recorded is None or not self._recorded.is_recording():
            return
        if error is not None:
            _set_outcome(self._recorded, error)
        self._recorded.end(end_time=_now_ns())

    @property
    def traceparent(self) -> str:
        """The span as a W3C ``traceparent``; empty where nothing is recorded."""
        return "" if self._recorded is None else _format(self._recorded)


class _Tracing:
    """What ``configure`` made; its absence is what makes everything else a no-op."""

    def __init__(self, provider: TracerProvider, trace_ids: RoundIds) -> None:
        from opentelemetry import context, trace

        self.context, self.trace = context, trace
        self.provider = provider
        self.tracer: Tracer = provider.get_tracer("hierfl")
        self.trace_ids = trace_ids


_tracing: _Tracing | None = None
_WALL_AT_START_NS = time.time_ns() - time.perf_counter_ns()


def _now_ns() -> int:
    """Unix nanoseconds that never step: wall time once, the monotonic clock from there."""
    return _WALL_AT_START_NS + time.perf_counter_ns()


def tier_of(process: str) -> str:
    """Tier of a process's name. Raises ValueError where its first part is none of ``TIERS``."""
    tier = process.partition(".")[0]
    if tier not in TIERS:
        raise ValueError(f"process name {process!r} must begin with one of {', '.join(TIERS)}")
    return tier


def configure(process: str, directory: Path) -> None:
    """Record this process's spans in ``directory/traces/<process>.jsonl``, and by OTLP where asked.

    Args:
        process: Name that begins with the tier: ``controller``, ``combiner.eu-west``, ``client.site-00``.
        directory: The process's own directory.
    Raises:
        ConfigError: ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set and cannot be obeyed.
        StorageError: The file cannot be written.
    """
    global _tracing  # noqa: PLW0603 - one per process, like OpenTelemetry's own provider
    from hierfl import spanfile

    shutdown()
    trace_ids = spanfile.RoundIds()
    _tracing = _Tracing(spanfile.provider(process, tier_of(process), directory, trace_ids), trace_ids)


def flush() -> None:
    """Write what has ended so far, within a second."""
    if _tracing is not None:
        _tracing.provider.force_flush(1000)


def shutdown() -> None:
    """Write what is left and stop recording. Calling it twice, or without ``configure``, is harmless."""
    global _tracing
    tracing, _tracing = _tracing, None
    if tracing is not None:
        tracing.provider.shutdown()


def begin(name: str, *, parent: str = "", **attributes: Value | None) -> Span:
    """Start a span that ``Span.end`` closes, under ``parent`` (a traceparent) or the current span.

    A ``SPAN_ROUND`` without a parent gets a trace id made from run, task and round, so that a restarted
    controller, or a second attempt, continues the round's one trace.
    """
    return _begin(name, parent, attributes)


def _begin(name: str, parent: str, attributes: dict[str, Value | None]) -> Span:
    if _tracing is None:
        return Span()
    context, trace = _tracing.context, _tracing.trace
    base = (_remote_context(parent, server=False) if parent else None) or context.get_current()
    over = trace.get_current_span(base).get_span_context()
    if name == SPAN_ROUND and not over.is_valid:
        _tracing.trace_ids.set_next(_round_trace_id(attributes))
    recorded = _tracing.tracer.start_span(
        name, base, _kind(base, remote=over.is_remote), _full_keys(attributes), start_time=_now_ns()
    )
    return Span(recorded, trace.set_span_in_context(recorded, base))


class span:  # noqa: N801 - reads as a call where it is used
    """A span around a block, current inside it; an exception goes through and leaves its code."""

    __slots__ = ("_attributes", "_name", "_opened", "_token")

    def __init__(self, name: str, **attributes: Value | None) -> None:
        self._name, self._attributes = name, attributes

    def __enter__(self) -> Span:
        self._opened = _begin(self._name, "", self._attributes)
        self._token = _attach(self._opened._context)
        return self._opened

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        _detach(self._token)
        self._opened.end(error)


class under:  # noqa: N801 - as above
    """Make a span that was begun elsewhere the current one."""

    __slots__ = ("_context", "_token")

    def __init__(self, parent: Span) -> None:
        self._context = parent._context

    def __enter__(self) -> None:
        self._token = _attach(self._context)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        _detach(self._token)


class remote_parent(under):  # noqa: N801 - as above
    """Make the caller's span the current one: from RPC metadata, or from an offer's ``traceparent``.

    What is missing or malformed is ignored: a peer's header can spoil its own trace and nothing else.
    """

    __slots__ = ()

    def __init__(self, source: str | Iterable[tuple[str, str | bytes]] | None) -> None:
        self._context = None
        if _tracing is not None and source:
            text = source if isinstance(source, str) else _from_metadata(source)
            self._context = _remote_context(text, server=not isinstance(source, str))


def traceparent() -> str:
    """The current span as a W3C ``traceparent``; empty where there is none."""
    return "" if _tracing is None else _format(_tracing.trace.get_current_span())


def inject() -> tuple[tuple[str, str], ...]:
    """The current span as gRPC metadata; empty where there is none."""
    current = traceparent()
    return ((TRACEPARENT, current),) if current else ()


def _attach(context: Context | None) -> Token[Context] | None:
    """Make a context the current one; what ``_detach`` takes to undo it."""
    if context is None or _tracing is None:
        return None
    token: Token[Context] = _tracing.context.attach(context)
    return token


def _detach(token: Token[Context] | None) -> None:
    if token is None:
        return
    from opentelemetry import context  # recording may have stopped meanwhile

    context.detach(token)


def _remote_context(text: str, *, server: bool) -> Context | None:
    """Context whose current span is the remote one; ``None`` for what is no traceparent."""
    found = _TRACEPARENT.fullmatch(text)
    if found is None or _tracing is None:
        return None
    context, trace = _tracing.context, _tracing.trace
    remote = trace.SpanContext(int(found[1], 16), int(found[2], 16), is_remote=True, trace_flags=trace.TraceFlags(1))
    base = trace.set_span_in_context(trace.NonRecordingSpan(remote), context.get_current())
    made: Context = context.set_value(_KIND, trace.SpanKind.SERVER if server else trace.SpanKind.CONSUMER, base)
    return made


def _kind(base: Context, *, remote: bool) -> SpanKind:
    """SERVER: answers an RPC, so lies inside its caller's span (clocks are compared by it); CONSUMER: does not."""
    from opentelemetry import context, trace

    if not remote:
        return trace.SpanKind.INTERNAL
    kind = context.get_value(_KIND, base)
    return kind if isinstance(kind, trace.SpanKind) else trace.SpanKind.CONSUMER


def _from_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    for key, value in metadata:
        if key == TRACEPARENT and isinstance(value, str):
            return value
    return ""


def _format(recorded: OtelSpan) -> str:
    context = recorded.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01" if context.is_valid else ""


def _full_keys(attributes: dict[str, Value | None]) -> dict[str, Value]:
    return {KEY_PREFIX + key: value for key, value in attributes.items() if value is not None}


def _round_trace_id(attributes: dict[str, Value | None]) -> int:
    text = f"hierfl.trace/1\0{attributes.get('run')}\0{attributes.get('task')}\0{attributes.get('round')}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big") or 1


def _set_outcome(recorded: OtelSpan, error: BaseException) -> None:
    import asyncio

    from opentelemetry.trace import Status, StatusCode

    if isinstance(error, asyncio.CancelledError | GeneratorExit | KeyboardInterrupt | SystemExit):
        recorded.set_attribute(KEY_PREFIX + "outcome", "cancelled")
        return
    recorded.set_status(Status(StatusCode.ERROR))
    code = error.code if isinstance(error, HierFLError) else HierFLError.code
    recorded.set_attribute(KEY_PREFIX + "error", code)
