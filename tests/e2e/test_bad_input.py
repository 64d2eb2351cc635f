"""What a person gets wrong, and what a machine refuses: each gives one clear line, the hint where to read
more, the right exit code, no traceback, and leaves nothing half-done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from commands import Ended, hierfl
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from disks import small_disk
from federations import job, noisy_app

from combiners.local import LocalCombiner
from controller.app import ControllerApp
from hierfl import modelfile, operator, provision
from hierfl.certificates import Authority, certificate_pem, issue_leaf
from hierfl.cli.runs import write_history
from hierfl.errors import DiskFull
from hierfl.explain import pages
from hierfl.operator import connect
from hierfl.pki import Kit
from hierfl.wire import hierfl_pb2 as pb

__all__ = ["hierfl", "small_disk"]

NOBODY = "127.0.0.1:1"
"""An address at which no program listens."""


def one_line(ended: Ended, code: str, *words: str) -> None:
    """It ended with one error, of this code, with these words, and its exit code; nothing went to stdout."""
    lines = ended.err.splitlines()
    errors = [line for line in lines if line.startswith("error ")]
    assert lines[-2:] == [*errors, f"more: hierfl explain {code}"], ended.err
    assert errors[0].startswith(f"error {code}: "), ended.err
    assert [word for word in words if word not in errors[0]] == [], errors[0]
    assert "Traceback" not in ended.err
    assert (ended.code, ended.out) == (pages()[code].exit_code, "")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `provision` makes it: two regions, a site, an operator; nobody listens at its addresses."""
    folder = tmp_path_factory.mktemp("made")
    provision.init(folder, "acme", (NOBODY,))
    provision.add_region(folder, "eu", (NOBODY,))
    provision.add_region(folder, "us", (NOBODY,))
    provision.add_site(folder, "eu", "charite")
    provision.add_operator(folder, "ana")
    (folder / "app.py").write_text("def init(config): ...\n\ndef train(task): ...\n")
    return folder


PROGRAMS = {
    "controller": (("controller",), "pki/controller", ("controller", "serve")),
    "combiner": (("regions", "eu", "combiner"), "pki/regions/eu", ("combiner", "serve")),
    "client": (("sites", "eu", "charite", "client-00"), "pki/regions/eu", ("client", "run", "APP")),
    "operator": (("operators", "ana"), "pki/controller", ("status",)),
}
"""By role: its kit, whose authority signed it, the command that uses it."""


@pytest.fixture(params=list(PROGRAMS))
def program(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> tuple[Path, Authority, list[object]]:
    """A copy of a kit, who issued it, and a command line that uses it, with a folder that is not there yet."""
    parts, issuer, command = PROGRAMS[request.param]
    kit = tmp_path / "kit"
    shutil.copytree(made.joinpath("kits", *parts), kit)
    argv = [made / "app.py" if word == "APP" else word for word in command] + ["--kit", kit]
    if command != ("status",):
        argv += ["--dir", tmp_path / "dir"]
    return kit, authority(made / issuer, "" if issuer.endswith("controller") else "eu"), argv


def authority(folder: Path, region: str) -> Authority:
    certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    return Authority("acme", region, certificate, key)


# --- files that people write


def edited(hierfl: Callable[..., Ended], folder: Path, name: str, *changes: tuple[str, str]) -> Path:
    """A file of `hierfl init`, changed."""
    assert hierfl("init", folder).code == 0
    path = folder / name
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("min_regions = 2", "min_region = 2", ("round.min_region", "did you mean 'min_regions'")),
        ("min_regions = 2", 'min_regions = "two"', ("round.min_regions = 'two'", "whole number")),
        ("rounds = 5", "rounds = true", ("job.rounds = True", "whole number")),
        ("rounds = 5", "rounds = 0", ("job.rounds = 0", "from 1 to")),
        ("rounds = 5", "", ("job.rounds", "missing")),
        ("[round]", "[rounds]", ("rounds", "did you mean 'round'")),
        ('name = "fedavg"', 'name = "fedaveg"', ("fedaveg", "did you mean 'fedavg'")),
        ('name = "fedavg"', 'name = "fedprox"\nmew = 1.0', ("strategy.mew = 1.0", "proximal_mu")),
        ("rounds = 5", "rounds = ", ("line 7", "not TOML")),
    ],
)
def test_a_job_with_a_mistake_names_file_key_and_rule(hierfl, tmp_path, old, new, words):
    path = edited(hierfl, tmp_path, "job.toml", (old, new))
    for command in (("train", path), ("job", "check", path)):
        one_line(hierfl(*command), "HFL-101", "job.toml", *words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[site] ", "[sites] ", ("sites is unknown", "did you mean 'site'")),
        ("sites = 3\n", 'sites = "three"\n', ("regions.us-east.sites = 'three'", "whole number")),
        ("[regions.us-east]", "[regions.eu-west]", ("[regions.eu-west]", "second time")),
        ("[regions.us-east]", "[regions.US_East]", ("US_East", "lower-case")),
        ("# k = 3", "k = 1", ("regions.eu-west.k = 1", "at least 2")),
        ('# [controller]\n# listen = "127.0.0.1:0"', '[controller]\nlisten = "here"', ("'here'", "HOST:PORT")),
    ],
)
def test_a_federation_with_a_mistake_names_file_key_and_rule_before_anything_starts(hierfl, tmp_path, old, new, words):
    path = edited(hierfl, tmp_path, "federation.toml", (old, new))
    one_line(hierfl("up", path), "HFL-101", "federation.toml", *words)
    assert not (tmp_path / ".hierfl").exists()


def test_an_app_file_that_is_not_there_is_named_before_anything_starts(hierfl, tmp_path):
    path = edited(hierfl, tmp_path, "federation.toml", ('app = "app.py"', 'app = "none.py"'))
    one_line(hierfl("up", path), "HFL-120", "none.py")
    assert [path.name for path in (tmp_path / ".hierfl").iterdir()] == ["lock"]


def test_all_mistakes_of_a_file_are_said_at_once(hierfl, tmp_path):
    path = edited(hierfl, tmp_path, "job.toml", ("rounds = 5", "rounds = 0\nround = 1"), ("min_clients", "clients"))
    ended = hierfl("train", path)
    said = [line for line in ended.err.splitlines() if line.startswith("error HFL-101: ")]
    assert (ended.code, len(said)) == (3, 3), ended.err


def test_files_that_are_not_there_are_named(hierfl, tmp_path):
    one_line(hierfl("train", tmp_path / "job.toml"), "HFL-110", "job.toml", "hierfl init")
    one_line(hierfl("up", tmp_path / "federation.toml"), "HFL-110", "federation.toml", "hierfl init")


def test_a_region_or_site_that_exists_is_not_made_again(hierfl, made):
    before = sorted(path for path in made.rglob("*") if path.is_file())
    one_line(hierfl("provision", "region", "eu", "--dir", made), "HFL-101", "'eu' exists already")
    one_line(hierfl("provision", "site", "eu", "charite", "--dir", made), "HFL-101", "'charite' exists already")
    one_line(hierfl("provision", "site", "asia", "x", "--dir", made), "HFL-110", "'asia'", "eu, us")
    assert sorted(path for path in made.rglob("*") if path.is_file()) == before


# --- certificates


def test_a_certificate_that_is_missing_is_named(hierfl, program, tmp_path):
    kit, _, command = program
    (kit / "identity.pem").unlink()
    one_line(hierfl(*command), "HFL-301", "identity.pem", "hierfl provision")
    shutil.rmtree(kit)
    one_line(hierfl(*command), "HFL-301", str(kit), "hierfl provision")
    assert not (tmp_path / "dir").exists()


def test_a_certificate_that_has_expired_says_when_and_who_renews_it(hierfl, program, tmp_path):
    kit, issuer, command = program
    loaded = Kit.load(kit)
    issued = datetime.now(UTC) - timedelta(days=40)
    leaf = issue_leaf(issuer, loaded.identity, loaded.key.public_key(), issued, timedelta(days=30))
    (kit / "identity.pem").write_bytes(certificate_pem(leaf))
    until = f"{leaf.not_valid_after_utc:%Y-%m-%d}"
    one_line(hierfl(*command), "HFL-302", "identity.pem", until, "hierfl provision renew")
    assert not (tmp_path / "dir").exists()


def test_a_certificate_that_is_somebody_elses_is_refused(hierfl, program, made, tmp_path):
    kit, _, command = program
    role = Kit.load(kit).identity.role
    other = "regions/us/combiner" if role != "operator" else "sites/eu/charite/client-00"
    if role in ("operator", "combiner"):
        shutil.copy(made / "kits" / "controller" / "identity.pem", kit)
        one_line(hierfl(*command), "HFL-303", "identity.pem")
        return
    shutil.rmtree(kit)
    shutil.copytree(made / "kits" / other, kit)
    one_line(hierfl(*command), "HFL-101", str(kit), "combiner of us")
    assert not (tmp_path / "dir").exists()


# --- ports and addresses


@pytest.fixture
def taken() -> Iterator[str]:
    """An address on which another program listens, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("role", ["controller", "combiner"])
def test_a_port_that_is_taken_is_named_before_anything_is_started(hierfl, made, tmp_path, taken, role):
    parts, _, command = PROGRAMS[role]
    serve = (*command, "--kit", made.joinpath("kits", *parts), "--dir", tmp_path / "dir")
    one_line(hierfl(*serve, "--listen", taken), "HFL-610", taken, "another program")
    one_line(hierfl(*serve, "--listen", "192.0.2.1:4433"), "HFL-101", "192.0.2.1:4433")
    one_line(hierfl(*serve, "--listen", "4433"), "HFL-101", "'4433'", "HOST:PORT")
    assert not (tmp_path / "dir" / "ray.json").exists()


def test_a_controller_that_refuses_gives_an_operator_its_address_and_what_to_check(hierfl, made):
    kit = made / "kits" / "operators" / "ana"
    for command in (("status",), ("runs", "list"), ("models", "list"), ("runs", "show", "7f3a")):
        one_line(hierfl(*command, "--kit", kit), "HFL-501", NOBODY, "refuses the connection", "check the address")


def test_a_controller_that_is_silent_or_has_no_address_is_given_up_soon(hierfl, made, taken, monkeypatch):
    monkeypatch.setattr(operator, "CONNECT_S", 0.3)
    kit = made / "kits" / "operators" / "ana"
    one_line(hierfl("status", "--kit", kit, "--controller", taken), "HFL-501", taken, "no answer in 0.3 s")
    monkeypatch.undo()
    assert operator.CONNECT_S <= 5
    one_line(hierfl("status", "--kit", kit, "--controller", "hub.invalid:1"), "HFL-501", "hub.invalid:1")


def test_where_there_is_no_federation_it_says_how_to_start_one(hierfl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line(hierfl("status"), "HFL-110", str(tmp_path), "hierfl up", "--kit")
    one_line(hierfl("down"), "HFL-110", str(tmp_path), "nothing to stop")
    assert list(tmp_path.iterdir()) == []


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


class Heard(logging.Handler):
    """``await heard.words("refuses")``: waits until that has been logged; its line."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []
        self._news = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())
        self._news.set()

    @contextlib.contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Listen to the logger of this name, from INFO on."""
        logger = logging.getLogger(name)
        level = logger.level
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)

    async def words(self, words: str) -> str:
        async with asyncio.timeout(20):
            while not (found := [line for line in self._lines if words in line]):
                self._news.clear()
                await self._news.wait()
        return found[0]


async def test_a_combiner_whose_controller_is_away_says_what_it_tries_and_goes_on_trying(made, tmp_path):
    address, heard = free_address(), Heard()
    eu, ana = made / "kits" / "regions" / "eu" / "combiner", made / "kits" / "operators" / "ana"
    with heard.at("combiners"):
        async with LocalCombiner(Kit.load(eu), tmp_path / "eu", address):
            line = await heard.words("trying again")
            assert address in line
            assert "refuses the connection" in line
            controller = ControllerApp(Kit.load(made / "kits" / "controller"), tmp_path / "controller", address)
            async with controller, connect(Kit.load(ana), address) as admin:
                await heard.words("attached to the controller")
                states = {region.region: region.state for region in (await admin.status()).regions}
                assert states["eu"] == "attached"


def test_a_client_whose_combiner_is_away_says_what_it_tries_until_it_is_stopped(made, tmp_path):
    kit = made / "kits" / "sites" / "eu" / "charite" / "client-00"
    command = ["client", "run", str(made / "app.py"), "--kit", str(kit), "--dir", str(tmp_path / "dir")]
    client = subprocess.Popen([sys.executable, "-m", "hierfl", *command], stderr=subprocess.PIPE, text=True)
    assert client.stderr is not None
    with client, contextlib.ExitStack() as stack:
        stack.callback(client.kill)
        line = next(line for line in client.stderr if "trying again" in line)
        assert NOBODY in line
        assert "refuses the connection" in line
        client.send_signal(signal.SIGINT)
        rest = client.stderr.read()
        assert (client.wait(timeout=20), "Traceback" in rest, "error" in rest) == (130, False, False), rest


# --- apps


APPS = {
    "import numpyy\n": ("numpyy", "line 1"),
    "def init(config:\n": ("SyntaxError", "line 1"),
    "raise SystemExit(3)\n": ("SystemExit", "line 1"),
    "def init(config): ...\n": ("has no function train(task)",),
    "def init(config): ...\ndef train(task, more): ...\n": ("must take one argument: train(task)",),
}


@pytest.mark.parametrize("text", list(APPS))
def test_an_app_that_cannot_be_imported_says_where_and_why(hierfl, made, tmp_path, text):
    edited(hierfl, tmp_path / "new", "app.py")
    app = tmp_path / "new" / "app.py"
    app.write_text(text)
    kit = made / "kits" / "sites" / "eu" / "charite" / "client-00"
    words = ("app.py", *APPS[text])
    one_line(hierfl("client", "run", app, "--kit", kit, "--dir", tmp_path / "dir"), "HFL-120", *words)
    one_line(hierfl("train", tmp_path / "new" / "job.toml"), "HFL-120", *words)
    one_line(hierfl("job", "check", tmp_path / "new" / "job.toml"), "HFL-120", *words)
    assert not (tmp_path / "dir").exists()


def test_an_app_that_is_not_there_says_where_it_was_looked_for(hierfl, made, tmp_path):
    kit = made / "kits" / "sites" / "eu" / "charite" / "client-00"
    for app in ("none.py", "no.such.module"):
        one_line(hierfl("client", "run", app, "--kit", kit, "--dir", tmp_path / "dir"), "HFL-120", app)
    job_file = edited(hierfl, tmp_path / "new", "job.toml", ('app = "app"', 'app = "mri"'))
    one_line(hierfl("train", job_file), "HFL-120", "'mri'", "mri.py", "--app")


# --- full disks


@pytest.mark.parametrize("role", ["controller", "combiner", "client"])
def test_a_program_on_a_full_disk_says_so_and_starts_once_there_is_room(hierfl, made, small_disk, role):
    disk = small_disk()
    parts, _, command = PROGRAMS[role]
    kit, directory = made.joinpath("kits", *parts), disk.path / "dir"
    argv = [made / "app.py" if word == "APP" else word for word in command]
    disk.fill()
    one_line(hierfl(*argv, "--kit", kit, "--dir", directory), "HFL-601", "no space left", "make room")
    disk.free()
    if role == "controller":
        asyncio.run(starts(ControllerApp(Kit.load(kit), directory)))
    if role == "combiner":
        asyncio.run(starts(LocalCombiner(Kit.load(kit), directory, NOBODY)))


async def starts(app: ControllerApp | LocalCombiner) -> None:
    async with app:
        pass


def test_what_people_ask_to_be_written_is_written_whole_or_not_at_all(hierfl, small_disk):
    disk = small_disk()
    disk.fill()
    one_line(hierfl("init", disk.path / "new"), "HFL-601", str(disk.path))
    one_line(hierfl("provision", "init", "acme", "--dir", disk.path / "acme"), "HFL-601")
    for suffix in modelfile.FORMATS:
        with pytest.raises(DiskFull, match="make room"):
            modelfile.write(disk.path / f"model{suffix}", {"w": np.zeros(100_000, np.float32)}, {})
    for suffix in (".csv", ".parquet"):
        with pytest.raises(OSError, match="No space left"):
            write_history(disk.path / f"history{suffix}", [{"round": n, "hash": f"{n:064x}"} for n in range(2000)])
    assert disk.files() == {}
    disk.free()
    assert hierfl("provision", "init", "acme", "--dir", disk.path / "acme").code == 0
    assert hierfl("init", disk.path / "new").code == 0


SITES = {"eu": ["site-00", "site-01", "site-02"], "us": ["site-10", "site-11", "site-12"]}


async def test_a_controller_whose_disk_fills_up_takes_nothing_until_there_is_room(federate, small_disk, tmp_path):
    disk, heard = small_disk(tmp_path / "federation-0" / "controller"), Heard()
    wanted = job(rounds=2, min_regions=2, min_clients=3, evaluate_every=0)
    offered, filled = threading.Event(), threading.Event()

    def wait_for_the_full_disk(seed: int) -> None:
        del seed
        offered.set()
        filled.wait(30)

    app = noisy_app(num_values=50_000, on_train=wait_for_the_full_disk)
    async with federate(SITES, app=app) as federation:
        await federation.hear("waiting for a round", times=6)
        disk.fill()
        with pytest.raises(DiskFull, match="the server's disk is full"):
            await federation.submit(wanted)
        disk.free()
        run = await federation.submit(wanted)
        assert await asyncio.to_thread(offered.wait, 30), "the round is open, its offers are out"
        disk.fill()
        filled.set()
        with heard.at("hierfl.wire.access"):
            assert "no space left" in await heard.words("Uplink failed")
        disk.free()
        found = await federation.outcome(run)
        assert found.summary.state == "finished", found.summary.reason
        assert [(item.num_updates, item.attempts) for item in found.rounds] == [(6, 1), (6, 1)]


LENIENT = job(rounds=1, min_regions=1, min_clients=3, evaluate_every=0)
AGAIN = replace(LENIENT, app={"again": True})


def regions_of(found: pb.GetRunResponse) -> list[str]:
    (only,) = found.rounds
    return [share.region for share in only.regions]


async def test_a_region_whose_disk_fills_up_ends_alone_and_takes_part_once_restarted(federate, small_disk, tmp_path):
    disk = small_disk(tmp_path / "federation-0" / "regions" / "eu")
    async with federate(SITES) as federation:
        await federation.hear("waiting for a round", times=6)
        disk.fill()
        assert regions_of(await federation.train(LENIENT)) == ["us"]
        with pytest.raises(DiskFull, match="no space left"):
            await federation.combiners["eu"].region.failed
        disk.free()
        await federation.restart_combiner("eu")
        await federation.hear("waiting for a round", times=9)
        assert regions_of(await federation.train(AGAIN)) == ["eu", "us"]


async def test_sites_whose_disk_is_full_decline_and_take_part_once_there_is_room(federate, small_disk, tmp_path):
    disk = small_disk(tmp_path / "federation-0" / "clients" / "eu")
    async with federate(SITES) as federation:
        await federation.hear("waiting for a round", times=6)
        disk.fill()
        async with asyncio.timeout(20):  # nobody waits for the report timeout
            assert regions_of(await federation.train(LENIENT)) == ["us"]
        assert sum("(storage): no space left" in line for line in federation.said) == 3
        disk.free()
        assert regions_of(await federation.train(AGAIN)) == ["eu", "us"]
