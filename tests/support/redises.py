"""A Redis of a test's own: the real server, on a unix socket, ended by its process id."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from federations import require

SETTINGS = ("--port 0", "--appendonly yes", "--appendfsync always", "--save ''", "--maxmemory-policy noeviction")


class RedisServer:
    """A server that can be killed, frozen and started again on its files. ``url`` stays the same."""

    def __init__(self, folder: Path, *settings: str, data: Path | None = None) -> None:
        """``data``: folder of its append-only file, where it is another."""
        self.folder, self.data = folder, data or folder
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._settings = [part for line in (*SETTINGS, *settings) for part in line.split()]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = ["redis-server", "--unixsocket", str(self.socket), "--dir", str(self.data)]
        log = ["--logfile", str(self.folder / "redis.log")]
        self.process = subprocess.Popen([*command, *log, *(part.strip("'") for part in self._settings)])
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 20
        while not self.answers():
            assert time.monotonic() < deadline, (self.folder / "redis.log").read_text()
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "redis.log").read_text()
            time.sleep(0.01)  # until a server of somebody else's opens its socket: it says so nowhere

    def answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as line:
                line.settimeout(1.0)
                line.connect(str(self.socket))
                line.sendall(b"PING\r\n")
                answer = line.recv(64)
                return answer.startswith(b"+PONG") or b"NOAUTH" in answer
        except OSError:
            return False

    def command(self, *words: str) -> str:
        """What ``redis-cli`` says to a command."""
        asked = ["redis-cli", "-s", str(self.socket), *words]
        return (
            subprocess.run(asked, capture_output=True, check=True, timeout=10).stdout.decode(errors="replace").strip()
        )

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL; its files stay."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait()


@pytest.fixture
def make_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """``make_redis(*settings)`` starts one. Its folder has a short name: a socket's path ends at 107 bytes."""
    require(shutil.which("redis-server") is not None, "redis-server (apt install redis-server)")
    made: list[RedisServer] = []

    def make(*settings: str, data: Path | None = None) -> RedisServer:
        server = RedisServer(Path(tempfile.mkdtemp(prefix="hierfl-redis-")), *settings, data=data)
        made.append(server)
        server.start()
        return server

    yield make
    for server in made:
        server.kill()
        shutil.rmtree(server.folder, ignore_errors=True)
