"""Traces: written where they should be, connected across processes, and naming no site outside it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from hierfl import observe, spanfile
from hierfl.errors import ConfigError, LayoutMismatch, StorageError
from hierfl.observe import SPAN_CHECK, SPAN_ROUND, SPAN_SEAL, SPAN_TRAIN, SPAN_UPLINK, SPAN_UPLOAD


@pytest.fixture(autouse=True)
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    yield
    observe.shutdown()


def written(directory: Path, process: str = "controller") -> list[dict[str, Any]]:
    """Stops recording; the spans in the process's file."""
    observe.shutdown()
    lines = (directory / "traces" / f"{process}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_without_configure_nothing_is_recorded_or_even_imported() -> None:
    code = (
        "import sys; from hierfl import observe\n"
        "with observe.span(observe.SPAN_SEAL, region='eu') as span:\n"
        "    span.set(num_updates=3)\n"
        "    assert observe.traceparent() == '' == span.traceparent and observe.inject() == ()\n"
        "with observe.remote_parent('00-' + '1' * 32 + '-' + '2' * 16 + '-01'), observe.under(observe.begin('x')):\n"
        "    pass\n"
        "observe.flush(); observe.shutdown()\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_span_is_one_line_with_ids_times_and_attributes(tmp_path: Path) -> None:
    observe.configure("controller", tmp_path)
    with observe.span(SPAN_ROUND, run="r1", task="train", round=3) as outer, observe.span(SPAN_SEAL) as inner:
        inner.set(num_sites=4, reason=None)
        assert outer.traceparent != inner.traceparent == observe.traceparent()
    seal, whole = written(tmp_path)
    assert (seal["name"], whole["name"]) == (SPAN_SEAL, SPAN_ROUND)
    assert (seal["trace"], seal["parent"], whole["parent"]) == (whole["trace"], whole["span"], "")
    assert whole["start_unix_ns"] <= seal["start_unix_ns"] <= seal["end_unix_ns"] <= whole["end_unix_ns"]
    assert seal["attributes"] == {"num_sites": 4}
    assert whole["attributes"] == {"run": "r1", "task": "train", "round": 3}
    assert whole["process"] == "controller"
    assert whole["ok"] is True


def test_a_round_keeps_its_trace_id_over_a_restart_of_the_controller(tmp_path: Path) -> None:
    for attempt in (1, 2):
        observe.configure("controller", tmp_path)
        observe.begin(SPAN_ROUND, run="r1", task="train", round=3, attempt=attempt).end()
    observe.begin(SPAN_ROUND, run="r1", task="train", round=4, attempt=1).end()
    observe.begin(SPAN_SEAL).end()
    first, second, other, unrelated = [line["trace"] for line in written(tmp_path)]
    assert first == second
    assert len({first, other, unrelated}) == 3


def test_ids_neither_follow_nor_disturb_the_generator_that_an_app_has_seeded(tmp_path: Path) -> None:
    observe.configure("client.site-00", tmp_path)
    drawn = []
    for _ in range(2):
        random.seed(7)
        observe.begin(SPAN_TRAIN).end()
        drawn.append(random.random())
    first, second = written(tmp_path, "client.site-00")
    assert first["span"] != second["span"]
    assert first["trace"] != second["trace"]
    assert drawn[0] == drawn[1] == random.Random(7).random()


def test_a_span_may_end_in_another_event_than_it_began_in(tmp_path: Path) -> None:
    observe.configure("controller", tmp_path)
    whole = observe.begin(SPAN_ROUND, run="r1")
    with observe.under(whole), observe.span(SPAN_SEAL):
        pass
    assert observe.traceparent() == ""
    whole.end()
    whole.end()  # harmless
    seal, outer = written(tmp_path)
    assert seal["parent"] == outer["span"]


def test_an_offer_carries_the_round_to_who_takes_it_up(tmp_path: Path) -> None:
    observe.configure("combiner.eu", tmp_path)
    offer = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    with observe.remote_parent(offer), observe.span(SPAN_SEAL):
        pass
    observe.begin(SPAN_UPLINK, parent=offer).end()
    for line in written(tmp_path, "combiner.eu"):
        assert (line["trace"], line["parent"], line["kind"]) == ("ab" * 16, "cd" * 8, "consumer")


@pytest.mark.parametrize("bad", ["", "x", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "99-" + "1" * 49, "00-é"])
def test_a_malformed_parent_is_ignored(tmp_path: Path, bad: str) -> None:
    observe.configure("controller", tmp_path)
    with observe.remote_parent(bad), observe.span(SPAN_SEAL):
        pass
    with observe.remote_parent((("traceparent", bad), ("other", b"\xff"))), observe.span(SPAN_SEAL):
        pass
    observe.begin(SPAN_SEAL, parent=bad).end()
    assert [line["parent"] for line in written(tmp_path)] == ["", "", ""]


async def test_the_context_passes_through_an_rpc_in_its_metadata(tmp_path: Path) -> None:
    async def handler(request: bytes, context: Any) -> bytes:
        with observe.remote_parent(context.invocation_metadata()), observe.span(SPAN_CHECK, region="eu"):
            return request

    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(handler)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"Call": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    observe.configure("combiner.eu", tmp_path)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with observe.span(SPAN_UPLOAD):
            await channel.unary_unary("/t.T/Call")(b"", metadata=observe.inject())
    await server.stop(None)
    check, upload = written(tmp_path, "combiner.eu")
    assert (check["trace"], check["parent"], check["kind"]) == (upload["trace"], upload["span"], "server")


async def test_tasks_that_run_at_once_do_not_mix_their_spans(tmp_path: Path) -> None:
    async def one(region: str) -> None:
        with observe.span(SPAN_UPLINK, region=region):
            await asyncio.sleep(0)
            with observe.span(SPAN_SEAL, region=region):
                await asyncio.sleep(0)

    observe.configure("controller", tmp_path)
    await asyncio.gather(*(one(f"r{i}") for i in range(5)))
    lines = written(tmp_path)
    region_of = {line["span"]: line["attributes"]["region"] for line in lines}
    inner = [line for line in lines if line["name"] == SPAN_SEAL]
    assert [region_of[line["parent"]] for line in inner] == [line["attributes"]["region"] for line in inner]


@pytest.mark.parametrize(
    ("process", "names_sites"),
    [("controller", False), ("combiner.eu", False), ("combiner.eu.intake-1", False), ("client.site-00", True)],
)
def test_only_a_sites_own_file_may_name_it(tmp_path: Path, process: str, names_sites: bool) -> None:
    observe.configure(process, tmp_path)
    with observe.span(SPAN_UPLOAD, region="eu", site="st-mary", client="c1", num_examples=17, made_up="st-mary"):
        pass
    with observe.span("an update of st-mary"):
        pass
    (line,) = written(tmp_path, process)
    expected = {"region": "eu", "site": "st-mary", "client": "c1", "num_examples": 17}
    assert line["attributes"] == (expected if names_sites else {"region": "eu"})
    assert ("st-mary" in json.dumps(line)) is names_sites


def test_no_key_is_both_of_a_site_and_of_a_region() -> None:
    for tier, keys in observe.TIER_KEYS.items():
        assert bool(keys & observe.SITE_KEYS) is (tier == "client")


@pytest.mark.parametrize(
    ("error", "ok", "attributes"),
    [
        (LayoutMismatch("tensor patient_17 is missing"), False, {"error": "HFL-410"}),
        (ValueError("row of patient 17"), False, {"error": "HFL-000"}),
        (asyncio.CancelledError(), True, {"outcome": "cancelled"}),
        (KeyboardInterrupt(), True, {"outcome": "cancelled"}),
    ],
)
def test_an_error_leaves_its_code_and_never_its_text(
    tmp_path: Path, error: BaseException, ok: bool, attributes: dict[str, str]
) -> None:
    observe.configure("client.site-00", tmp_path)
    with pytest.raises(type(error)), observe.span(SPAN_TRAIN):
        raise error
    (line,) = written(tmp_path, "client.site-00")
    assert (line["ok"], line["attributes"]) == (ok, attributes)
    assert "patient" not in json.dumps(line)


def test_the_files_of_a_process_keep_within_their_bound(tmp_path: Path) -> None:
    observe.configure("controller", tmp_path)
    for index in range(200):
        observe.begin(SPAN_SEAL, round=index).end()
    observe.shutdown()
    lines = (tmp_path / "traces" / "controller.jsonl").read_bytes().splitlines(keepends=True)

    class Replayed(spanfile.FileExporter):
        def write(self, lines: list[bytes]) -> None:
            self._write(lines)

    bounded = Replayed("small", tmp_path, max_bytes=8_000)
    batches = [lines[:20], *([line] for line in lines[20:100]), lines[100:160], lines[160:]]
    for batch in batches:
        bounded.write(batch)
        kept = [tmp_path / "small.1.jsonl", tmp_path / "small.jsonl"]
        assert sum(path.stat().st_size for path in kept if path.exists()) <= 8_000
    bounded.shutdown()
    bounded.shutdown()
    rounds = [json.loads(line)["attributes"]["round"] for path in kept for line in path.read_bytes().splitlines()]
    assert rounds == list(range(rounds[0], 200))
    assert len(rounds) > 15


def test_a_line_left_half_written_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    path = tmp_path / "traces" / "controller.jsonl"
    path.write_text('{"trace":"00')
    observe.configure("controller", tmp_path)
    observe.begin(SPAN_SEAL).end()
    observe.shutdown()
    half, whole = path.read_text().splitlines()
    assert half == '{"trace":"00'
    assert json.loads(whole)["name"] == SPAN_SEAL


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_only_its_user_reads_a_trace_file(tmp_path: Path) -> None:
    observe.configure("client.site-00", tmp_path)
    assert stat.S_IMODE((tmp_path / "traces" / "client.site-00.jsonl").stat().st_mode) == 0o600


def test_a_directory_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("a file")
    with pytest.raises(StorageError, match=r"traces cannot be written to .*controller\.jsonl"):
        observe.configure("controller", tmp_path)


def test_a_process_name_begins_with_its_tier(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must begin with one of controller, combiner, client, operator"):
        observe.configure("site-00", tmp_path)


def test_a_collector_without_its_exporter_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT = .*pip install 'hierfl\[otlp\]'"):
        observe.configure("controller", tmp_path)
    observe.configure("client.site-00", tmp_path)  # a site's spans stay in its file: nothing to install
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    observe.configure("controller", tmp_path)


def test_a_protocol_that_spans_are_not_sent_by_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(ConfigError, match="must be grpc"):
        observe.configure("controller", tmp_path)


class Collector:
    """A collector over real gRPC that keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    async def export(self, request: Any, context: Any) -> Any:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.mark.parametrize(("process", "sent"), [("combiner.eu", {SPAN_SEAL, SPAN_UPLINK}), ("client.site-00", set())])
async def test_a_collector_gets_no_span_of_a_single_arrival_and_none_of_a_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: str, sent: set[str]
) -> None:
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

    collector = Collector()
    method = grpc.unary_unary_rpc_method_handler(
        collector.export,
        request_deserializer=trace_service_pb2.ExportTraceServiceRequest.FromString,
        response_serializer=trace_service_pb2.ExportTraceServiceResponse.SerializeToString,
    )
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    observe.configure(process, tmp_path)
    for name in (SPAN_TRAIN, SPAN_UPLOAD, SPAN_CHECK, SPAN_SEAL, SPAN_UPLINK):
        observe.begin(name, region="eu", site="st-mary").end()
    await asyncio.to_thread(observe.shutdown)
    await server.stop(None)
    spans = [
        span
        for request in collector.requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert {span.name for span in spans} == sent
    assert all([attribute.key for attribute in span.attributes] == ["hierfl.region"] for span in spans)
    assert len(written(tmp_path, process)) == 5
