"""The peers' bench: what is pure of it. Nothing is installed here."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from hierfl import documents

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.bench_peers")


@pytest.fixture
def running(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.peers.running")


def test_a_round_is_read_from_clients_x_values(bench):
    assert bench.Round.parse("16x2_500_000") == bench.Round(16, 2_500_000)
    assert str(bench.Round(16, 2_500_000)) == "16 clients x 10 MB"


@pytest.mark.parametrize("text", ["", "4", "x", "4x", "x4", "0x5", "5x0", "-1x5", "4x5x6", "4 x 5"])
def test_what_is_no_round_is_refused(bench, text):
    with pytest.raises(ValueError, match="must be CLIENTSxPARAMS"):
        bench.Round.parse(text)


def test_a_log_gives_the_seconds_between_its_times_and_the_process_counts_for_nothing(running):
    assert running.read_log([{"pid": 7}, {"at": 1.0}, {"at": 4.0}, {"at": 4.5}]) == (3.0, 0.5)
    assert running.read_log([{"pid": 7}, {"at": 1.0}]) == ()


def test_the_first_round_does_not_count(running):
    assert running.Rounds((9.0, 1.0, 3.0, 2.0), 0).median_s == 2.0


def test_a_ratio_is_held_against_the_runs_of_ours_around_it(bench, running):
    ours = [bench.Ours(round_s=seconds, runs_s=(seconds,), peak_mib=100.0) for seconds in (0.5, 1.5)]
    row = bench.measured("nvflare", bench.Round(4, 1000), "1.0", running.Rounds((9.0, 2.0, 4.0, 3.0), 2**28), ours)
    assert (row.time_ratio, row.memory_ratio) == (3.0, 2.56)
    assert row.ours.runs_s == (0.5, 1.5)


def test_without_ours_there_are_figures_and_no_ratios(bench, running):
    row = bench.measured("nvflare", bench.Round(4, 1000), "1.0", running.Rounds((9.0, 2.0, 4.0, 3.0), 2**28), ())
    assert (row.round_s, row.ours, row.time_ratio, row.memory_ratio) == (3.0, None, None, None)


def test_a_peer_that_was_not_run_is_a_sentence_and_no_figures(bench):
    row = bench.measured("fedn", bench.Round(4, 1000), "", "it would not", ())
    assert (row.failed, row.round_s, row.time_ratio) == ("it would not", None, None)


def test_an_environment_that_cannot_be_made_says_why_without_a_path_of_the_machine(running, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(running.PeerFailed, match=r"^`python\S* -m venv") as caught:
        running.installed("file", ("nothing",), tmp_path)
    assert "ended with" in str(caught.value)


def test_a_script_that_fails_or_says_too_little_is_no_figure(running, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "SCRIPTS", tmp_path)
    (tmp_path / "fails.py").write_text("raise SystemExit('no such luck')")
    (tmp_path / "short.py").write_text("pass")
    for script, words in (("fails.py", "ended with 1: no such luck"), ("short.py", "noted 0 whole rounds")):
        with pytest.raises(running.PeerFailed, match=words):
            running.run_script(Path(sys.executable), script, {"clients": 2}, env={}, timeout_s=30)


def test_a_script_that_takes_too_long_is_ended_with_all_that_it_started(running, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "SCRIPTS", tmp_path)
    (tmp_path / "slow.py").write_text(
        f"import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True).wait()  # {tmp_path}"
    )
    before = _sleepers()
    with pytest.raises(running.PeerFailed, match="longer than 1 s"):
        running.run_script(Path(sys.executable), "slow.py", {}, env={}, timeout_s=1)
    assert _sleepers() == before


def _sleepers() -> set[str]:
    return {
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if _command(path).startswith(b"sleep\x001000\x00")
    }


def _command(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_result_is_a_document_that_reads_back_and_makes_a_table(bench, running):
    rows = (
        bench.measured("nvflare", bench.Round(4, 1000), "1.0", running.Rounds((9.0, 2.0, 4.0, 3.0), 2**28), ()),
        bench.measured("fedn", bench.Round(4, 1000), "", "it would not", ()),
    )
    result = bench.PeersResult(
        schema=bench.SCHEMA, machine=bench.harness.here(), load=0.0, versions={}, seed=1, measured=rows
    )
    assert documents.decode(documents.encode(result), bench.PeersResult, "peers") == result
    assert bench.table(result).splitlines()[-1].endswith("not run: it would not |  |")


def test_every_peer_has_its_script_or_a_reason(bench):
    for peer in bench.PEERS.values():
        assert bool(peer.script) != bool(peer.why_not)
        assert not peer.script or (ROOT / "benchmarks" / "peers" / peer.script).is_file()


def test_help_has_examples():
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_peers.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "examples:" in shown.stdout
