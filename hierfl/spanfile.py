"""Where spans are written: a bounded file in the process's own directory, and a collector where one is named.

The one place that imports OpenTelemetry's SDK; ``hierfl.observe.configure`` calls it. Every span passes
``cleared``: known names and keys only, no events, no texts. A client's spans go to its own file and
nowhere else; a combiner's go to a collector without those that stand for a single arrival.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Status

from hierfl.errors import ConfigError, StorageError
from hierfl.observe import ARRIVAL_SPANS, KEY_PREFIX, SPAN_NAMES, TIER_KEYS

__all__ = ["FILE_BYTES", "CollectorExporter", "FileExporter", "RoundIds", "cleared", "line_of", "provider"]

FILE_BYTES: Final = 16 * 2**20
"""Most bytes that one process keeps: about 40,000 spans, in two files of half of it."""

WRITE_EVERY_MS: Final = 500
"""A killed process loses at most this much of its trace."""

_BINARY: Final = getattr(os, "O_BINARY", 0)  # Windows would else write other line ends

_log = logging.getLogger(__name__)


class RoundIds(IdGenerator):
    """Random ids, but for a trace id that was set for the next root span (``observe.begin``).

    From the operating system, not from ``random`` as OpenTelemetry's own: an app's tasks seed that, so
    ids would come again, and drawing them would change what the app draws.
    """

    def __init__(self) -> None:
        self._next = threading.local()

    def set_next(self, trace_id: int) -> None:
        """Of the next root span that this thread starts."""
        self._next.trace_id = trace_id

    def generate_trace_id(self) -> int:
        chosen: int = getattr(self._next, "trace_id", 0)
        self._next.trace_id = 0
        return chosen or int.from_bytes(os.urandom(16), "big") or 1  # 0 means none

    def generate_span_id(self) -> int:
        return int.from_bytes(os.urandom(8), "big") or 1


def provider(process: str, tier: str, directory: Path, trace_ids: RoundIds) -> TracerProvider:
    """A provider of its own, never the global one: a host program's collector gets none of these spans.

    Raises:
        ConfigError: A collector is named and cannot be used.
        StorageError: The file cannot be written.
    """
    made = TracerProvider(
        sampler=ALWAYS_ON,
        resource=Resource({"service.name": f"hierfl-{tier}", "service.instance.id": process}),
        id_generator=trace_ids,
    )
    exporters: list[SpanExporter] = [FileExporter(process, directory / "traces")]
    endpoint = _collector()
    if endpoint and tier == "client":
        _log.info("OTLP is not used at a site: its spans stay in its own file")
    elif endpoint:
        exporters.append(CollectorExporter(_otlp_exporter(endpoint)))
    for exporter in exporters:
        kept = _Cleared(exporter, TIER_KEYS[tier])
        made.add_span_processor(BatchSpanProcessor(kept, schedule_delay_millis=WRITE_EVERY_MS))
    return made


def cleared(span: ReadableSpan, keys: frozenset[str]) -> ReadableSpan:
    """The span with the attributes that ``keys`` names, without events and without a status text."""
    return ReadableSpan(
        name=span.name,
        context=span.get_span_context(),
        parent=span.parent,
        resource=span.resource,
        attributes={
            key: value
            for key, value in (span.attributes or {}).items()
            if key.startswith(KEY_PREFIX) and key.removeprefix(KEY_PREFIX) in keys
        },
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


class _Cleared(SpanExporter):
    """The process's border for spans: what its tier may not write does not reach ``to``."""

    def __init__(self, to: SpanExporter, keys: frozenset[str]) -> None:
        self._to, self._keys = to, keys

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._to.export([cleared(span, self._keys) for span in spans if span.name in SPAN_NAMES])

    def shutdown(self) -> None:
        self._to.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._to.force_flush(timeout_millis)


class CollectorExporter(SpanExporter):
    """To a collector, which may stand anywhere: no span that stands for one arrival."""

    def __init__(self, to: SpanExporter) -> None:
        self._to = to

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        kept = [span for span in spans if span.name not in ARRIVAL_SPANS]
        return self._to.export(kept) if kept else SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._to.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._to.force_flush(timeout_millis)


class FileExporter(SpanExporter):
    """One JSON line a span in ``<process>.jsonl``; the half before it is kept in ``<process>.1.jsonl``."""

    def __init__(self, process: str, directory: Path, max_bytes: int = FILE_BYTES) -> None:
        self._process = process
        self._path = directory / f"{process}.jsonl"
        self._older = directory / f"{process}.1.jsonl"
        self._half = max_bytes // 2
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        except OSError as error:
            raise StorageError(f"traces cannot be written to {self._path}: {error.strerror}") from None

    def _open(self) -> int:
        """Append, for this user's eyes only; a line that a killed process left half-written is ended."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _BINARY, 0o600)
        size = os.fstat(file).st_size
        if size:
            os.lseek(file, size - 1, os.SEEK_SET)
            if os.read(file, 1) != b"\n":
                os.write(file, b"\n")
        return file

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write the lines; a full disk costs spans and never the round."""
        try:
            self._write([line_of(span, self._process) for span in spans])
        except OSError as error:
            _log.warning("spans lost: %s: %s", self._path, error.strerror)
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def _write(self, lines: Sequence[bytes]) -> None:
        """As many at once as the file still takes."""
        size, first = os.fstat(self._file).st_size, 0
        for number, line in enumerate(lines):
            if size and size + len(line) > self._half:
                os.write(self._file, b"".join(lines[first:number]))
                os.close(self._file)
                self._path.replace(self._older)
                self._file, size, first = self._open(), 0, number
            size += len(line)
        os.write(self._file, b"".join(lines[first:]))

    def shutdown(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True  # nothing is buffered here


def line_of(span: ReadableSpan, process: str) -> bytes:
    """A span as one line of JSON; times in Unix nanoseconds, ids in lower-case hex."""
    context = span.get_span_context()
    assert context is not None
    line = {
        "trace": f"{context.trace_id:032x}",
        "span": f"{context.span_id:016x}",
        "parent": f"{span.parent.span_id:016x}" if span.parent else "",
        "name": span.name,
        "kind": span.kind.name.lower(),
        "process": process,
        "start_unix_ns": span.start_time,
        "end_unix_ns": span.end_time,
        "ok": span.status.is_ok,
        "attributes": {key.removeprefix(KEY_PREFIX): value for key, value in (span.attributes or {}).items()},
    }
    return msgspec.json.encode(line) + b"\n"


_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def _first_set(names: Sequence[str]) -> str:
    """The first of these standard variables that is set and not empty: its name."""
    return next((name for name in names if os.environ.get(name)), "")


def _collector() -> str:
    """Name of the variable that asks for OTLP; empty where none does, or where traces are switched off."""
    if os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return ""
    return _first_set(_ENDPOINTS)


def _otlp_exporter(variable: str) -> SpanExporter:
    """OpenTelemetry's own exporter, which reads the rest of the standard variables itself."""
    protocol = _first_set(_PROTOCOLS)
    if protocol and os.environ[protocol] != "grpc":
        raise ConfigError(protocol, os.environ[protocol], "must be grpc, the one protocol spans are sent by")
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(
            variable, os.environ[variable], "needs the exporter: pip install 'hierfl[otlp]', or unset it"
        ) from None
    return OTLPSpanExporter()
