"""Failpoints: all are reached somewhere, no step that writes or sends is without one, and they do what they say."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hierfl.failpoints import ACTIONS, POINTS, VARIABLE

ROOT = Path(__file__).parents[2]
SERVERS = ("combiners", "controller")
STEPS = {"fsync", "hardlink_to", "upload_frames"}
"""Calls that make something durable or send it, whoever has them."""
STEPS_OF = {
    ("file", "sync"),
    ("_file", "sync"),
    ("temporary", "replace"),
    ("_temporary", "replace"),
    ("store", "write"),
    ("commits", "create"),
}
"""Further ones, by receiver and name: lists and strings have such methods, too."""

ELSEWHERE = {
    "combiners/uplink.py:send": "region.uplink",
    "controller/blobs.py:sync_directory": "controller.blob",
    "controller/commits.py:_write": "controller.link",
}
"""What has a point right before it or around it, with no state of its own between."""


def functions(package: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in sorted((ROOT / package).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{package}/{path.name}:{node.name}", node


def calls(function: ast.AST) -> Iterator[tuple[str, str, ast.Call]]:
    """Name and receiver of every call in a function, its inner functions left out."""
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Call):
            target = node.func
            name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
            owner = target.value if isinstance(target, ast.Attribute) else None
            yield name, getattr(owner, "attr", getattr(owner, "id", "")), node
        yield from calls(node)


def is_step(name: str, receiver: str, call: ast.Call) -> bool:
    first = call.args[0] if call.args else None
    committed = name == "execute" and isinstance(first, ast.Constant) and first.value in ("commit", "COMMIT")
    return committed or name in STEPS or (receiver, name) in STEPS_OF


def points_of(function: ast.AST) -> set[str]:
    return {ast.literal_eval(call.args[0]) for name, _, call in calls(function) if name == "reach"}


def without_a_point(package: str) -> set[str]:
    """Functions with a step and without a point."""
    return {
        where
        for where, function in functions(package)
        if any(is_step(*call) for call in calls(function)) and not points_of(function)
    }


def test_every_point_is_reached_and_every_one_that_is_reached_is_listed():
    packages = (*SERVERS, "hierfl/client")
    reached = {point for package in packages for _, function in functions(package) for point in points_of(function)}
    assert reached == set(POINTS)


@pytest.mark.parametrize("package", SERVERS)
def test_no_step_that_writes_or_sends_is_without_a_point(package):
    lacking = without_a_point(package) - set(ELSEWHERE)
    assert not lacking, "give each a failpoint, or say in ELSEWHERE which one covers it"


def test_what_is_said_to_be_covered_elsewhere_has_to_be():
    assert set(ELSEWHERE) <= {where for package in SERVERS for where in without_a_point(package)}
    assert set(ELSEWHERE.values()) <= set(POINTS)


def reaching(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    script = f"from hierfl.failpoints import reach\n{code}"
    environment = {**os.environ, VARIABLE: str(folder)}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_one_file_kills_the_first_that_comes_and_nobody_after(tmp_path):
    (tmp_path / "region.seal").write_text("kill\n")
    died = reaching(tmp_path, "reach('region.seal.file'); reach('region.seal'); print('alive')")
    assert (died.returncode, died.stdout) == (-signal.SIGKILL, "")
    assert [path.name.rpartition(".")[0] for path in tmp_path.iterdir()] == ["region.seal"]
    assert reaching(tmp_path, "reach('region.seal'); print('alive')").stdout == "alive\n"


@pytest.mark.parametrize("action", [action for action in ACTIONS if action.startswith("E")])
def test_a_file_with_a_number_of_errno_raises_it(tmp_path, action):
    (tmp_path / "controller.blob").write_text(action)
    failed = reaching(tmp_path, "import errno\ntry: reach('controller.blob')\nexcept OSError as e: print(e.errno)")
    assert int(failed.stdout) == getattr(__import__("errno"), action)


def test_a_frozen_process_goes_on_when_it_is_told_to(tmp_path):
    (tmp_path / "controller.write").write_text("freeze")
    code = "from hierfl.failpoints import reach\nreach('controller.write'); print('alive')"
    environment = {**os.environ, VARIABLE: str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        os.kill(process.pid, signal.SIGCONT)
        assert process.communicate(timeout=30)[0] == b"alive\n"


def test_without_the_variable_nothing_happens(tmp_path):
    (tmp_path / "region.seal").write_text("kill")
    script = "from hierfl.failpoints import reach; reach('region.seal'); print('alive')"
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "alive\n"
