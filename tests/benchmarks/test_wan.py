"""The WAN bench: its figures by plain calls, its links (where this machine may make them) by what crosses them."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hierfl import documents

ROOT = Path(__file__).parents[2]
LINKS = """
import json, socket, subprocess, sys, threading
sys.path.insert(0, ROOT)
from benchmarks.wan import network

CLIENT = '''
import json, socket, sys, time
start = time.monotonic()
line = socket.create_connection((sys.argv[1], int(sys.argv[2])))
shook = time.monotonic()
line.sendall(bytes(SIZE))
line.shutdown(socket.SHUT_WR)
line.recv(1)
print(json.dumps([shook - start, time.monotonic() - shook]))
'''

if sys.argv[1:] != ["inside"]:
    sys.exit(network.private([sys.executable, __file__, "inside"]))
with network.opened(network.Link(rate_mbit=20, rtt_ms=60), 2) as net:
    server = socket.create_server((network.HUB, 0))

    def serve():
        line, _ = server.accept()
        while line.recv(65536):
            pass
        line.sendall(b".")

    threading.Thread(target=serve, daemon=True).start()
    command = [sys.executable, "-c", CLIENT.replace("SIZE", str(SIZE)), network.HUB, str(server.getsockname()[1])]
    said = subprocess.run(network.in_namespace("region-2", command), capture_output=True, check=True).stdout
    print(json.dumps({"seconds": json.loads(said), "moved": net.bytes_moved(), "reports": net.close()}))
"""
SIZE = 2_000_000


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.bench_wan")


@pytest.fixture
def network(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.wan.network")


@pytest.fixture
def delay(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.wan.delay")


@pytest.fixture
def case(bench):
    return bench.Case(regions=2, clients=3, params=1000, rounds=2, rate_mbit=8.0, rtt_ms=80.0)


def test_bytes_are_a_rounds_over_all_links_and_the_busiest_link_sets_the_time(bench, case):
    before = {"region-1": (1_000, 2_000), "region-2": (0, 0)}
    after = {"region-1": (2_001_000, 2_002_000), "region-2": (1_000_000, 3_000_000)}
    row = bench.measured(case, "flat", [9.0, 3.0, 5.0], (before, after), 0.1)
    assert (row.bytes_up, row.bytes_down) == (1_500_000, 2_500_000)
    assert (row.round_s, row.first_round_s) == (4.0, 9.0)
    assert row.link_s == 2.0  # 2 MB a round on each link, 1 MB a second


def test_a_result_is_a_document_that_reads_back_and_makes_a_table(bench, case):
    row = bench.measured(case, "flat", [9.0, 3.0], ({"a": (0, 0)}, {"a": (4_000_000, 8_000_000)}), 0.1)
    result = bench.WanResult(
        schema=bench.SCHEMA, machine=bench.harness.here(), load=0.0, versions={}, seed=1, measured=(row,)
    )
    assert documents.decode(documents.encode(result), bench.WanResult, "wan") == result
    assert bench.table(result).splitlines()[-1].endswith("| flat | 3.00 | 4.0 | 8.0 | 12.00 s |")


def test_flat_is_one_region_over_all_places_and_hierarchical_one_for_each(bench, case, tmp_path):
    places = ["region-1", "region-2"]
    flat = bench.Federation(case, bench.FLAT, tmp_path, places)
    tiers = bench.Federation(case, bench.HIERARCHICAL, tmp_path, places)
    assert (dict(flat.regions), flat.sites_each, flat.k) == ({bench.ALL: places}, 6, 3)
    assert (dict(tiers.regions), tiers.sites_each, tiers.k) == ({"region-1": places[:1], "region-2": places[1:]}, 3, 3)


@pytest.mark.parametrize(("rate_mbit", "burst_bytes"), [(0.1, 16_384), (50.0, 50_000), (1000.0, 1_000_000)])
def test_a_bucket_holds_what_passes_in_a_tick_of_the_kernel(network, rate_mbit, burst_bytes):
    assert network.Link(rate_mbit=rate_mbit, rtt_ms=1).burst_bytes == burst_bytes


def test_packets_leave_in_order_each_after_the_delay(delay):
    line, sent = delay.Line(0.5), []
    assert line.due == float("inf")
    line.put(b"first", 10.0)
    line.put(b"second", 10.25)
    assert line.due == 10.5
    line.deliver(10.49, sent.append)
    assert sent == []
    line.deliver(10.6, sent.append)
    assert sent == [b"first"]
    line.deliver(11.0, sent.append)
    assert (sent, line.carried, line.due) == ([b"first", b"second"], 2, float("inf"))
    assert line.latest_s == pytest.approx(0.25)
    assert line.late_s == pytest.approx(0.35)


def test_a_packet_that_the_other_end_does_not_take_is_lost_and_holds_up_nobody(delay):
    def full(packet: bytes) -> None:
        raise BlockingIOError

    line, sent = delay.Line(0.0), []
    line.put(b"lost", 1.0)
    line.deliver(1.0, full)
    line.put(b"next", 2.0)
    line.deliver(2.0, sent.append)
    assert sent == [b"next"]


def test_a_link_has_the_rate_and_the_delay_that_it_was_given(network, tmp_path):
    if lacking := network.missing():
        pytest.skip(f"needs {lacking}")
    script = tmp_path / "links.py"
    script.write_text(f"ROOT, SIZE = {str(ROOT)!r}, {SIZE}\n{LINKS}")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=60)
    if ended.returncode and "unshare" in ended.stderr:
        pytest.skip(f"this root may not make namespaces: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    handshake_s, transfer_s = said["seconds"]
    assert handshake_s >= 0.06
    assert transfer_s >= SIZE * 8 / 20e6 * 0.9  # a bucket's worth may go at once
    up, _ = said["moved"]["region-2"]
    assert SIZE < up < 1.15 * SIZE
    assert sum(said["moved"]["region-1"]) < 1000


def test_a_bench_that_is_stopped_stops_what_is_inside_and_says_so(network, tmp_path):
    if lacking := network.missing():
        pytest.skip(f"needs {lacking}")
    script = tmp_path / "sleeps.py"
    script.write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('told') or 3))\n"
        "print('inside', flush=True)\nsignal.pause()\n"
    )
    outer = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks.wan import network;"
        f" sys.exit(network.private([sys.executable, {str(script)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        line = process.stdout.readline()
        if not line and "unshare" in (why := process.stderr.read()):
            pytest.skip(f"this root may not make namespaces: {why.strip()}")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    assert (line, said, process.returncode) == ("inside\n", "told\n", 130)


def test_help_has_examples():
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_wan.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "examples:" in shown.stdout
