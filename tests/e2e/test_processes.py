"""Real processes, each region with its own Ray: what is killed costs only itself, and nothing outlives its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from hierfl.cli.runs import follow
from hierfl.client.params import make_layout
from hierfl.config import load_federation
from hierfl.job import Arithmetic, Job, JobHead, RoundRules
from hierfl.local import Federation, serving
from hierfl.operator import Operator, connect
from hierfl.pki import Kit
from hierfl.wire import hierfl_pb2 as pb

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

APP = """
import socket

import numpy as np

from hierfl.client import Task, Update


def init(config):
    return {"w": np.zeros(10, np.float32)}


def train(task: Task) -> Update:
    host, _, port = task.site_config["gate"].rpartition(":")
    with socket.create_connection((host, int(port))) as gate:
        gate.sendall(f"{task.region} {task.round}\\n".encode())
        assert gate.recv(1), "the test is over"
    return Update({"w": task.params["w"] + 1}, num_examples=10)
"""
"""Trains once the gate opens (``Gate``)."""


class Gate:
    """Where apps at work wait: the test sees who is there, and says when they go on."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, int]] = []
        self._open_up_to = 0
        self._news = asyncio.Condition()

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        region, number = (await reader.readline()).decode().split()
        with contextlib.closing(writer):
            async with self._news:
                self.waiting.append((region, int(number)))
                self._news.notify_all()
                await self._news.wait_for(lambda: self._open_up_to >= int(number))
            writer.write(b"!")

    async def arrived(self, number: int, *regions: str) -> None:
        """Wait until a client of each of these regions is at work in this round."""
        async with asyncio.timeout(60), self._news:
            await self._news.wait_for(lambda: {(region, number) for region in regions} <= set(self.waiting))

    async def open(self, up_to: int) -> None:
        """Let everybody go on who is in this round, or in one before it."""
        async with self._news:
            self._open_up_to = up_to
            self._news.notify_all()


@pytest.fixture
async def gate() -> AsyncIterator[tuple[Gate, str]]:
    """A gate, and its address."""
    made = Gate()
    server = await asyncio.start_server(made.meet, "127.0.0.1", 0)
    yield made, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await made.open(10**6)
    server.close()


def write_federation(folder: Path, *regions: str, gate: str = "127.0.0.1:1") -> Path:
    """A federation of regions with two sites each."""
    (folder / "app.py").write_text(APP)
    sites = 'k = 2\nsites = ["{0}-a", "{0}-b"]\n'
    tables = "".join(f"\n[regions.{region}]\n{sites.format(region)}" for region in regions)
    options = f'[site]\napp = "app.py"\noptions = {{ gate = "{gate}" }}\n'
    path = folder / "federation.toml"
    path.write_text(f'[federation]\nname = "test"\n\n{options}{tables}')
    return path


def a_job(rounds: int) -> Job:
    return Job(
        job=JobHead(name="test", app="app", rounds=rounds),
        round=RoundRules(min_regions=2, min_clients=2, report_timeout_s=60, silence_s=2, evaluate_every=0),
        arithmetic=Arithmetic(k=2),
    )


@asynccontextmanager
async def running(path: Path, said: list[str]) -> AsyncIterator[tuple[Federation, Operator]]:
    config = load_federation(path)
    async with (
        serving(config, path.parent / ".hierfl", said.append) as federation,
        connect(Kit.load(federation.operator_kit), federation.controller_address) as admin,
    ):
        yield federation, admin


async def submit(admin: Operator, job: Job) -> str:
    layout, vectors = make_layout({"w": np.zeros(10, np.float32)})
    return await admin.submit(job, await admin.upload_model(layout, vectors))


async def ended(admin: Operator, run: str) -> pb.GetRunResponse:
    async with asyncio.timeout(60):
        async for _ in admin.follow(run):
            pass
    return await admin.run(run)


def regions_of(found: pb.GetRunResponse) -> list[list[str]]:
    return [[share.region for share in item.regions] for item in found.rounds]


# --- what is killed while a round is open


async def test_a_region_killed_in_mid_round_costs_the_others_nothing_and_takes_part_again(tmp_path, gate):
    watch, address = gate
    path = write_federation(tmp_path, "ap", "eu", "us", gate=address)
    async with running(path, []) as (federation, admin):
        run = await submit(admin, a_job(rounds=2))
        await watch.arrived(1, "ap", "eu", "us")
        note = json.loads((federation.state / "regions" / "ap" / "ray.json").read_text())
        tree = descendants(federation.children["combiner-ap"].pid, federation.children["clients-ap-0"].pid)
        await asyncio.gather(federation.kill("combiner-ap"), federation.kill("clients-ap-0"))
        assert [process for process in tree if is_alive(process)] == []

        await watch.open(up_to=1)
        await watch.arrived(2, "eu", "us")  # round 1 was committed without it
        await federation.start_region("ap")
        await watch.arrived(2, "ap")
        await watch.open(up_to=2)
        found = await ended(admin, run)
    assert found.summary.state == "finished"
    assert regions_of(found) == [["eu", "us"], ["ap", "eu", "us"]]
    assert [item.attempts for item in found.rounds] == [1, 1]
    assert not Path(note["folder"]).exists()


async def test_a_controller_killed_in_mid_round_is_started_again_and_the_run_goes_on(tmp_path, gate):
    watch, address = gate
    path, said = write_federation(tmp_path, "eu", "us", gate=address), []
    async with running(path, said) as (federation, admin):
        run = await submit(admin, a_job(rounds=2))
        following = asyncio.create_task(follow(admin, run))  # as `hierfl train` does
        await watch.arrived(1, "eu", "us")
        was_at, killed = federation.controller_address, federation.children["controller"]
        os.kill(killed.pid, signal.SIGKILL)
        await killed.exited()
        await watch.open(up_to=2)
        async with asyncio.timeout(60):
            assert (await following).state == "finished"
        found = await admin.run(run)
        assert federation.controller_address == was_at
        assert federation.children["controller"].pid != killed.pid
    assert found.summary.state == "finished"
    assert regions_of(found) == [["eu", "us"], ["eu", "us"]]
    assert [(item.num_updates, item.attempts) for item in found.rounds] == [(4, 1), (4, 1)]
    assert any("controller ended (exit -9)" in line for line in said), said
    assert "controller serves again" in said


# --- nothing is left


def descendants(*pids: int) -> list[psutil.Process]:
    """These processes and all that they have started, in whatever session or group it is."""
    roots = [psutil.Process(pid) for pid in pids]
    return roots + [child for root in roots for child in root.children(recursive=True)]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Up:
    """``hierfl up`` as a person runs it, and everything that belongs to it while it runs."""

    def __init__(self, path: Path) -> None:
        self.state = path.parent / ".hierfl"
        self._path = path
        self.process = hierfl_process("up", path.name, cwd=path.parent)
        self.talk: list[str] = []

    def wait_until_up(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.talk.append(line)
            if "Ctrl-C stops everything" in line:
                break
        else:
            pytest.fail("".join(self.talk))
        self.tree = descendants(self.process.pid)
        self.sessions = {os.getsid(process.pid) for process in self.tree[1:]}
        self.ports = {
            connection.laddr.port
            for process in self.tree
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        notes = self.state.glob("regions/*/ray.json")
        self.folders = [Path(json.loads(note.read_text())["folder"]) for note in notes]
        assert len(self.tree) > 10
        assert self.ports
        assert all(folder.is_dir() and folder.stat().st_mode & 0o077 == 0 for folder in self.folders)

    def remains(self) -> list[str]:
        """What is still there of it."""
        alive = [process for process in psutil.process_iter() if is_alive(process)]
        mine = [process for process in alive if process in self.tree or session_of(process) in self.sessions]
        listening = {c.laddr.port for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        left = [f"process {process}" for process in mine]
        left += [f"port {port}" for port in self.ports & listening]
        left += [f"folder {folder}" for folder in self.folders if folder.exists()]
        return left

    def remains_after(self, seconds: float) -> list[str]:
        """The same, once nothing is left or that time is over."""
        deadline = time.monotonic() + seconds
        while (left := self.remains()) and time.monotonic() < deadline:
            psutil.wait_procs([process for process in self.tree if is_alive(process)], timeout=0.5)
        return left

    def __enter__(self) -> Up:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=90)


def session_of(process: psutil.Process) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(process.pid)
    return 0


def hierfl_process(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hierfl", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def hierfl(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    process = hierfl_process(*arguments, cwd=cwd)
    out, talk = process.communicate(timeout=100)
    return process.returncode, out, talk


def test_ctrl_c_in_mid_round_ends_everything_with_130(tmp_path):
    with in_mid_round(tmp_path) as (up, train):
        up.process.send_signal(signal.SIGINT)
        _, talk = up.process.communicate(timeout=90)
        assert up.process.returncode == 130, talk
        assert "stopping clients, combiners and controller" in talk
        assert "Traceback" not in talk
        assert up.remains() == []
        assert [path.name for path in up.state.glob("up.json")] == []

        train.send_signal(signal.SIGINT)
        _, talk = train.communicate(timeout=30)
        assert train.returncode == 130
        assert "the run goes on when it is back" in talk
        assert "detached; the run goes on" in talk
        assert "Traceback" not in talk


@contextlib.contextmanager
def in_mid_round(folder: Path) -> Iterator[tuple[Up, subprocess.Popen[str]]]:
    """`hierfl up` and `hierfl train`, while a client trains: it waits at a socket that says nothing."""
    job = '[job]\nname = "test"\napp = "app"\nrounds = 1\n\n[round]\nmin_clients = 2\n'
    (folder / "job.toml").write_text(job)
    with socket.create_server(("127.0.0.1", 0)) as gate:
        path = write_federation(folder, "eu", gate=f"127.0.0.1:{gate.getsockname()[1]}")
        with Up(path) as up:
            up.wait_until_up()
            train = hierfl_process("train", "job.toml", cwd=folder)
            try:
                with gate.accept()[0]:
                    yield up, train
            finally:
                train.kill()
                train.communicate()


def test_kill_minus_9_of_up_in_mid_round_leaves_nothing_either(tmp_path):
    with in_mid_round(tmp_path) as (up, _):
        up.process.kill()
        up.process.wait()
        assert up.remains_after(60) == []
    code, _, talk = hierfl("down", cwd=tmp_path)
    assert (code, "nothing to stop" in talk) == (4, True), talk


def test_a_killed_combiner_whose_up_is_stopped_at_once_leaves_nothing(tmp_path):
    with Up(write_federation(tmp_path, "eu")) as up:
        up.wait_until_up()
        (combiner,) = [child for child in up.tree if "combiner" in child.cmdline() and "serve" in child.cmdline()]
        os.killpg(combiner.pid, signal.SIGKILL)
        up.process.terminate()
        up.process.communicate(timeout=90)
        assert up.process.returncode == 130
        assert up.remains() == []


def test_two_ups_in_one_folder_and_down_from_another_terminal(tmp_path):
    with Up(write_federation(tmp_path, "eu")) as up:
        up.wait_until_up()
        code, _, talk = hierfl("up", cwd=tmp_path)
        assert (code, "Traceback" in talk) == (1, False)
        assert "error HFL-602: " in talk
        assert "is running already; stop it with `hierfl down`" in talk
        code, out, _ = hierfl("status", "-o", "json", cwd=tmp_path)
        assert (code, [region["state"] for region in json.loads(out)["regions"]]) == (0, ["attached"])
        assert [process for process in up.tree if not is_alive(process)] == []

        code, _, talk = hierfl("down", cwd=tmp_path)
        assert (code, "stopped; nothing is left running" in talk) == (0, True), talk
        assert up.process.wait(timeout=5) == 130
        assert up.remains() == []
    code, _, talk = hierfl("down", cwd=tmp_path)
    assert (code, "nothing to stop" in talk) == (4, True), talk


def test_up_whose_port_is_taken_ends_with_that_programs_own_error_and_starts_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path = write_federation(tmp_path, "eu")
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        path.write_text(path.read_text() + f'\n[controller]\nlisten = "{address}"\n')
        code, _, talk = hierfl("up", cwd=tmp_path)
    assert code == 3, talk
    (error,) = [line for line in talk.splitlines() if line.startswith("error ")]
    assert error.startswith("error HFL-610: controller ended (exit 3): ")
    assert address in error
    assert talk.splitlines()[-1] == "more: hierfl explain HFL-610"


def test_up_with_an_app_that_cannot_be_imported_ends_with_why(tmp_path):
    path = write_federation(tmp_path, "eu")
    (tmp_path / "app.py").write_text("import numpyy\n")
    code, _, talk = hierfl("up", path.name, cwd=tmp_path)
    assert code == 3, talk
    (error,) = [line for line in talk.splitlines() if line.startswith("error ")]
    assert error.startswith("error HFL-120: clients-eu-0 ended (exit 3): ")
    assert "numpyy" in error
