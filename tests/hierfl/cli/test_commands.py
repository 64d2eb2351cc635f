"""``explain``, ``init``, ``job check``, ``doctor``, ``completion``: what they write, and how they end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from hierfl.cli import doctor
from hierfl.cli.init import FILES
from hierfl.cli.output import table
from hierfl.client.app import load_app
from hierfl.client.task import Task
from hierfl.config import load_federation, load_job
from hierfl.explain import pages
from hierfl.layout import Layout
from hierfl.types import ClientId, RegionId, RunId, SiteId

# --- explain


def test_explain_prints_meaning_move_and_next_step(hierfl):
    ended = hierfl("explain", "302")
    assert ended.code == 0
    assert ended.out.startswith("HFL-302 CertificateExpired: ")
    assert [line.split(":")[0] for line in ended.out.splitlines() if line[:1].isupper()][1:] == [
        "Means",
        "Whose move",
        "Next",
    ]


def test_explain_without_a_code_lists_all_of_them(hierfl):
    assert [line.split()[0] for line in hierfl("explain").out.splitlines()[1:]] == list(pages())
    assert [page["code"] for page in hierfl("explain", "-o", "json").document["errors"]] == list(pages())


def test_explain_of_no_code_is_not_found(hierfl):
    ended = hierfl("explain", "HFL-102")
    assert (ended.code, ended.out) == (4, "")
    assert "did you mean 'HFL-101'?" in ended.err


# --- init


def test_init_writes_files_that_are_valid_as_they_are(hierfl, tmp_path):
    ended = hierfl("init", tmp_path / "new")
    assert ended.code == 0
    assert [Path(line).name for line in ended.out.splitlines()] == list(FILES)
    config = load_federation(tmp_path / "new" / "federation.toml")
    job = load_job(tmp_path / "new" / "job.toml")
    assert job.round.min_regions <= len(config.regions)
    assert job.round.min_clients <= min(sum(site.clients for site in region.sites) for region in config.regions)
    assert Path(config.regions[0].sites[0].app).is_file()


def test_the_defaults_that_init_shows_in_comments_are_the_defaults(hierfl, tmp_path):
    hierfl("init", tmp_path)
    for name, load in (("federation.toml", load_federation), ("job.toml", load_job)):
        path = tmp_path / name
        before = load(path)
        text = path.read_text().partition("# Sites with names")[0]
        lines = [
            line.removeprefix("# ") if " = " in line or line.startswith("# [") else line for line in text.splitlines()
        ]
        path.write_text("\n".join(lines))
        assert load(path) == before, name


def test_init_overwrites_nothing(hierfl, tmp_path):
    (tmp_path / "app.py").write_text("mine")
    ended = hierfl("init", tmp_path)
    assert ended.code == 3
    assert "already has app.py; nothing was written" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["app.py"]
    assert (tmp_path / "app.py").read_text() == "mine"


def test_init_where_a_folder_cannot_be_made_says_why(hierfl, tmp_path):
    (tmp_path / "file").write_text("")
    ended = hierfl("init", tmp_path / "file" / "new")
    assert ended.code == 1
    assert "error HFL-600: " in ended.err


def test_the_app_that_init_writes_learns_and_is_the_same_each_time(hierfl, tmp_path):
    hierfl("init", tmp_path)
    config = load_job(tmp_path / "job.toml").app
    app = load_app(str(tmp_path / "app.py"))
    assert app.evaluate is not None
    params = app.init({"seed": 1, **config})
    layout = Layout.of(params)

    def task(site: str, params: dict[str, np.ndarray], round_number: int) -> Task:
        return Task(
            params={name: array.copy() for name, array in params.items()},
            config=config,
            site_config={},
            strategy={},
            local={},
            layout=layout,
            seed=round_number,
            round=round_number,
            run=RunId("r"),
            region=RegionId("eu-west"),
            site=SiteId(site),
            client=ClientId("client-00"),
        )

    sites = [f"site-{number:02d}" for number in range(6)]
    before = np.mean([app.evaluate(task(site, params, 1)).loss for site in sites])
    for round_number in range(1, 6):
        updates = [app.train(task(site, params, round_number)) for site in sites]
        params = {name: np.mean([update.params[name] for update in updates], axis=0) for name in params}
        again = app.train(task(sites[-1], params, 9)), app.train(task(sites[-1], params, 9))
        assert all(np.array_equal(again[0].params[name], again[1].params[name]) for name in params)
    measured = [app.evaluate(task(site, params, 6)) for site in sites]
    assert np.mean([metrics.loss for metrics in measured]) < before / 1.5
    assert min(metrics.accuracy or 0 for metrics in measured) > 0.75


# --- job check


def test_job_check_tells_parameters_and_bytes(hierfl, tmp_path):
    hierfl("init", tmp_path)
    ended = hierfl("job", "check", tmp_path / "job.toml", "-o", "json")
    assert ended.code == 0
    assert ended.document["model"] == {
        "tensors": 2,
        "parameters": 9,
        "exact_in_two_tiers": True,
        "bytes_to_a_client": 36,
        "bytes_from_a_client": 36,
        "bytes_over_a_border": 72,
    }


def test_job_check_tells_the_bytes_of_encoded_updates(hierfl, tmp_path):
    hierfl("init", tmp_path)
    chosen = ["--set", "updates.encoding=int8", "--set", "updates.block=16"]
    ended = hierfl("job", "check", tmp_path / "job.toml", "-o", "json", *chosen)
    assert ended.document["updates"] == "int8"
    assert ended.document["model"]["bytes_from_a_client"] == 9 + 4
    ended = hierfl("job", "check", tmp_path / "job.toml", "--set", "updates.encoding=int", "--set", "updates.blok=3")
    assert (ended.code, "updates.encoding = 'int' is no encoding; did you mean 'int8'?" in ended.err) == (3, True)


def test_job_check_says_that_rounded_sums_are_approximate_and_by_how_much(hierfl, tmp_path):
    hierfl("init", tmp_path)
    ended = hierfl("job", "check", tmp_path / "job.toml", "-o", "json", "--set", "partials.drop_bits=20")
    assert (ended.code, ended.document["partials"]) == (0, "rounded-20")
    assert ended.document["model"]["exact_in_two_tiers"] is False
    assert ended.document["model"]["error_of_a_regions_sum"] == 2.0 ** (20 - 1 - 32)
    assert ended.document["model"]["bytes_over_a_border"] == -(-9 * 44 // 8)
    ended = hierfl("job", "check", tmp_path / "job.toml", "--set", "partials.drop_bits=20")
    assert "approximate across regions" in ended.err
    assert "0.000122" in ended.out
    ended = hierfl("job", "check", tmp_path / "job.toml", "--set", "partials.drop_bits=33")
    assert (ended.code, "partials.drop_bits = 33 must be 0 to 32" in ended.err) == (3, True)
    caps = ("--set", "arithmetic.max_abs=15.999999999", "--set", "partials.drop_bits=32")
    ended = hierfl("job", "check", tmp_path / "job.toml", *caps)
    assert (ended.code, "partials.drop_bits = 32 leaves no room in 64 bits" in ended.err) == (3, True)


def test_job_check_without_the_app_checks_the_rest(hierfl, tmp_path):
    hierfl("init", tmp_path)
    (tmp_path / "app.py").unlink()
    ended = hierfl("job", "check", tmp_path / "job.toml", "-o", "json", "--set", "job.app=no_such_module")
    assert (ended.code, ended.document["model"]) == (0, None)
    assert "the model was not checked" in ended.err


def test_job_check_finds_all_mistakes_at_once(hierfl, tmp_path):
    hierfl("init", tmp_path)
    ended = hierfl("job", "check", tmp_path / "job.toml", "--set", "job.rounds=0", "--set", "round.silense_s=1")
    assert ended.code == 3
    assert sorted(ended.err.splitlines()[:2]) == [
        "error HFL-101: --set: job.rounds = 0 must be from 1 to 1,000,000",
        "error HFL-101: --set: round.silense_s is unknown; did you mean 'silence_s'?",
    ]


def test_job_check_of_caps_that_leave_no_precision_names_them(hierfl, tmp_path):
    hierfl("init", tmp_path)
    ended = hierfl("job", "check", tmp_path / "job.toml", "--set", "arithmetic.max_abs=1048576")
    assert ended.code == 3
    assert "arithmetic" in ended.err


@pytest.mark.parametrize("app", ["def init(config): return 1", "import nothing_like_this", "x = ("])
def test_job_check_of_a_broken_app_says_so_in_one_line(hierfl, tmp_path, app):
    hierfl("init", tmp_path)
    (tmp_path / "app.py").write_text(app)
    ended = hierfl("job", "check", tmp_path / "job.toml", "--app", tmp_path / "app.py")
    assert ended.code == 3
    assert ended.err.startswith("error HFL-120: ")
    assert len(ended.err.splitlines()) == 2


# --- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(hierfl, shell):
    ended = hierfl("completion", shell)
    assert (ended.code, ended.err) == (0, "")
    assert "_HIERFL_COMPLETE" in ended.out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=ended.out, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "expected"), [("ex", ["explain"]), ("combiner se", ["serve"]), ("doctor --ki", ["--kit"])]
)
def test_completion_completes_commands_and_options(words, expected):
    *before, last = words.split(" ")
    env = {
        "_HIERFL_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["hierfl", *before, last]),
        "COMP_CWORD": str(len(before) + 1),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "hierfl"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert [line.split(",")[1] for line in ended.stdout.splitlines()] == expected


# --- doctor


def test_doctor_looks_at_the_machine(hierfl, tmp_path):
    ended = hierfl("doctor", "--dir", tmp_path, "-o", "json")
    assert ended.code == 0
    found = {finding["check"]: finding["state"] for finding in ended.document["findings"]}
    assert found["python"] == found["packages of a site's client"] == "ok"
    assert "disk" in found


def test_doctor_says_that_a_port_is_taken(hierfl):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = hierfl("doctor", "--listen", address)
    assert ended.code == 1
    assert f"listen on {address}" in ended.out
    assert "choose another address" in ended.err
    assert hierfl("doctor", "--listen", "127.0.0.1:0").code == 0
    assert hierfl("doctor", "--listen", "here").code == 3


def test_doctor_knows_an_old_python_and_a_missing_package():
    assert doctor.check_python((3, 10, 2), 2**63).state is doctor.State.WRONG
    assert doctor.check_python((3, 11, 0), 2**31).state is doctor.State.WRONG
    assert doctor.check_packages("a site's client", ["json", "nothing_like_this"]).state is doctor.State.WRONG
    assert doctor.check_packages("the demo", ["nothing_like_this"]).state is doctor.State.ABSENT


def test_doctor_tells_a_package_that_does_not_load_from_one_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "broken_for_doctor.py").write_text("raise OSError('no such library')")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.check_packages("the demo", ["broken_for_doctor"])
    assert (found.state, "no such library" in found.found) == (doctor.State.WRONG, True)


def test_doctor_warns_before_a_certificate_ends():
    begins = datetime(2030, 1, 1, tzinfo=UTC)
    ends = begins + timedelta(days=100)
    assert doctor.check_life(begins, ends, begins + timedelta(days=80)).state is doctor.State.OK
    assert doctor.check_life(begins, ends, begins + timedelta(days=95)).state is doctor.State.WARNING


@pytest.mark.skipif(os.name != "posix", reason="file modes are of POSIX")
def test_doctor_warns_of_a_key_that_others_can_read(tmp_path):
    key = tmp_path / "key.pem"
    key.touch(mode=0o644)
    assert doctor.check_mode(key).state is doctor.State.WARNING
    key.chmod(0o600)
    assert doctor.check_mode(key).state is doctor.State.OK


def test_doctor_names_what_a_kit_lacks(hierfl, tmp_path):
    ended = hierfl("doctor", "--kit", tmp_path / "none")
    assert ended.code == 1
    assert "hierfl explain HFL-301" in ended.err


# --- tables


def test_a_table_puts_numbers_to_the_right_and_says_when_it_is_empty(capsys):
    table(("name", "bytes"), [("a", 1_000), ("long", 5)])
    assert capsys.readouterr().out == "name  bytes\na     1,000\nlong      5\n"
    table(("name",), [], empty="nothing yet")
    assert capsys.readouterr() == ("", "nothing yet\n")
