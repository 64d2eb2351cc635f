"""Rounds of flwr's FedAvg, a SuperLink and a SuperNode a client as processes, no TLS. Runs in flwr's environment."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "rounds"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "rounds.app:server"
clientapp = "rounds.app:client"
[tool.flwr.app.config]
"""
APP = """\
from pathlib import Path
from rounds.flwr_round import client_app, server_app

server = server_app({clients}, {params}, {rounds}, {seed}, Path({log!r}))
client = client_app({params}, {seed})
"""
CONNECTION = '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
START_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int) -> None:
    """Until somebody listens there."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.1)
    raise SystemExit(f"nobody listens at port {port} after {START_S:g} s")


def write_app(folder: Path, asked: argparse.Namespace) -> None:
    package = folder / "rounds"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("flwr_round.py"), package)
    (package / "app.py").write_text(APP.format(**{**vars(asked), "log": str(asked.log)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("clients", "params", "rounds", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    asked = parser.parse_args()
    binaries = Path(sys.executable).parent
    started: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory(prefix="flwr-deployed-") as name:
        folder = Path(name)
        write_app(folder / "app", asked)
        env = {**os.environ, "FLWR_HOME": str(folder / "home"), "PATH": f"{binaries}:{os.environ['PATH']}"}
        port = free_port()
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(CONNECTION.format(port=port))

        def start(program: str, *options: object) -> subprocess.Popen:
            started.append(subprocess.Popen([str(binaries / program), "--insecure", *map(str, options)], env=env))
            return started[-1]

        try:
            link = start("flower-superlink", "--port", port, "--disable-runtime-dependency-installation")
            asked.log.write_text(json.dumps({"pid": link.pid}) + "\n", encoding="utf-8")
            wait_for(port)
            for site in range(asked.clients):
                where = ("--superlink", f"127.0.0.1:{port}", "--port", free_port())
                start("flower-supernode", *where, "--node-config", f"partition-id={site}")
            run = [str(binaries / "flwr"), "run", str(folder / "app"), "here", "--stream"]
            return subprocess.run(run, env=env, check=False).returncode
        finally:
            for process in reversed(started):
                process.terminate()
            for process in reversed(started):
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()


if __name__ == "__main__":
    sys.exit(main())
