"""The root command: light, and every way to end is one line and an exit code."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

from hierfl.cli import root, run
from hierfl.errors import ConfigError, ConfigErrors, Interrupted, RunFailed, Unreachable

HEAVY = ("grpc", "numpy", "pyarrow", "rich", "torch", "ray", "numba", "cryptography", "msgspec", "asyncio")


def python(*code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, check=False, env={**os.environ, **env}, timeout=60
    )


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["explain", "101"], ["combiner", "--help"], ["completion", "bash"]]
)
def test_a_light_command_imports_nothing_heavy(args):
    code = f"""
import json, sys
from hierfl.cli import run
rc = run({args!r})
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)
sys.exit(rc)
"""
    ended = python("-c", code)
    assert (ended.returncode, json.loads(ended.stderr)) == (0, [])


def test_help_lists_every_command_of_the_table(hierfl):
    listed = hierfl("--help").out.split("Commands:")[1]
    assert [line.split()[0] for line in listed.strip().splitlines()] == list(root.COMMANDS)


def all_commands(table: dict[str, root.Lazy], path: str = "") -> list[tuple[str, root.Lazy]]:
    found = []
    for name, lazy in table.items():
        found += all_commands(lazy.members, f"{path}{name} ") if lazy.members else [(path + name, lazy)]
    return found


@pytest.mark.parametrize(("path", "lazy"), all_commands(root.COMMANDS), ids=lambda part: str(part).split("(")[0])
def test_every_command_in_the_table_is_there_and_says_what_it_does(path, lazy, hierfl):
    if lazy.target == root.ENTRY_POINT:
        (found,) = entry_points(group="hierfl.commands", name=path)
        assert importlib.util.find_spec(found.module), path
        return
    module, attribute = lazy.target.split(":")
    assert importlib.util.find_spec(module), path
    command = getattr(importlib.import_module(module), attribute)
    assert isinstance(command, click.Command)
    assert hierfl(*path.split(), "--help").code == 0


def test_a_misspelt_command_names_the_near_one(hierfl):
    ended = hierfl("explian")
    assert (ended.code, ended.out) == (2, "")
    assert "there is no command 'explian'; did you mean 'explain'?" in ended.err


def test_no_command_shows_the_help(hierfl):
    ended = hierfl()
    assert ended.code == 2
    assert "Commands:" in ended.err


def test_wrong_usage_ends_with_2(hierfl):
    assert hierfl("explain", "--nonsense").code == 2
    assert hierfl("explain", "101", "-o", "xml").code == 2


def test_an_option_can_come_from_the_environment(hierfl, monkeypatch):
    monkeypatch.setenv("HIERFL_EXPLAIN_OUTPUT", "json")
    assert hierfl("explain", "101").document["schema"] == "hierfl.error/1"


def failing(error: BaseException) -> click.Command:
    def fail() -> None:
        raise error

    return click.Command("fail", callback=fail)


@pytest.fixture
def fail(monkeypatch, hierfl):
    """End a command with an error."""

    def fail(error: BaseException):
        monkeypatch.setattr(root, "root", failing(error))
        return hierfl()

    return fail


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("a.b", 1, "must be 2", "job.toml"), 3, "error HFL-101: job.toml: a.b = 1 must be 2\n"),
        (Unreachable("nobody at 127.0.0.1:1"), 6, "error HFL-501: nobody at 127.0.0.1:1\n"),
        (RunFailed("no model"), 1, "error HFL-700: no model\nmore: hierfl explain HFL-700\n"),
        (Interrupted("stopped"), 130, "stopped\n"),
        (KeyboardInterrupt(), 130, ""),
        (click.UsageError("wrong"), 2, "Error: wrong"),
        (OSError(errno.ENOSPC, "No space left", "/data/x"), 1, "error HFL-601: no space left on the disk (/data/x)"),
        (OSError(errno.EADDRINUSE, "in use"), 3, "error HFL-610: another program listens"),
        (ModuleNotFoundError("No module named 'ray'", name="ray"), 3, "error HFL-111: package ray is not installed"),
        (ModuleNotFoundError("x", name="torch.nn"), 3, "pip install 'hierfl[torch]'"),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, BaseException) else None,
)
def test_an_error_is_one_line_and_its_exit_code(fail, error, code, text):
    ended = fail(error)
    assert (ended.code, ended.out) == (code, "")
    assert text in ended.err


def test_several_errors_are_one_line_each(fail):
    ended = fail(ConfigErrors((ConfigError("a", None, "is unknown"), ConfigError("b", 1, "must be 2"))))
    assert ended.code == 3
    assert ended.err == ("error HFL-101: a is unknown\nerror HFL-101: b = 1 must be 2\nmore: hierfl explain HFL-101\n")


def test_a_bug_is_one_line_and_its_traceback_a_file(fail):
    ended = fail(KeyError("lost"))
    assert ended.code == 1
    assert ended.err.startswith("error HFL-000: KeyError: 'lost'; this is a bug of hierfl")
    assert len(ended.err.splitlines()) == 1
    saved = Path(os.environ["XDG_STATE_HOME"]) / "hierfl" / "last-error.txt"
    assert str(saved) in ended.err
    assert "Traceback" in saved.read_text()


def test_hierfl_debug_shows_the_traceback_too(fail, monkeypatch):
    monkeypatch.setenv("HIERFL_DEBUG", "1")
    assert "Traceback" in fail(KeyError("lost")).err


def test_a_traceback_that_cannot_be_saved_is_no_second_error(fail, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert "HIERFL_DEBUG=1" in fail(KeyError("lost")).err


def test_a_reader_that_goes_away_ends_it_quietly():
    code = "from hierfl.cli import main; main(['explain', '-o', 'json'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1


def test_no_color_is_kept_and_no_terminal_gets_none():
    assert "\x1b" not in python("-m", "hierfl", "explain", "1", NO_COLOR="1").stderr
    assert "\x1b" not in python("-m", "hierfl", "explain", "1").stderr


def test_a_command_may_return_its_exit_code(monkeypatch):
    monkeypatch.setattr(root, "root", click.Command("seven", callback=lambda: 7))
    assert run([]) == 7


def test_version_is_that_of_the_project(hierfl):
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert hierfl("--version").out == f"hierfl {project['version']}\n"
