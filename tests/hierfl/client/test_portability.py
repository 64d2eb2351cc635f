"""The SDK runs where a site is: without the server's packages, and with nothing that Windows lacks.

No Windows machine runs these tests; what is checked here is that the code asks for nothing that is not there.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STARTS = ("hierfl.client", "hierfl.cli.client", "hierfl.cli.root", "hierfl.cli")
NOT_AT_A_SITE = {"ray", "torch", "redis", "numba", "psutil", "sklearn"}
MAY_IMPORT = {
    "torch": {"hierfl.client.torch"},
    "numba": {"hierfl.kernels_build"},
}
"""Which module may name which of those: on call, never when it is imported (the helper for torch aside)."""

MISSING_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "curses", "readline", "syslog", "crypt"}


def words(text: str) -> list[str]:
    return text.split()


MISSING_IN_OS = words("""
    O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK chown chroot confstr fchmod fchown fdatasync fork forkpty getegid
    geteuid getgid getgroups getloadavg getpgid getpriority getuid killpg lchown mkfifo mknod nice openpty pipe2
    posix_fadvise posix_fallocate posix_spawn pread preadv pwrite register_at_fork sched_getaffinity
    sched_setaffinity sendfile setpgid setpriority setsid setuid statvfs sync sysconf ttyname uname wait3 wait4
""")
MISSING_IN_SIGNAL = words("SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGCHLD SIGQUIT SIGALRM SIGPIPE alarm pause pthread_kill")
MISSING_NAMES = {("os", name) for name in MISSING_IN_OS} | {("signal", name) for name in MISSING_IN_SIGNAL}
MISSING_METHODS = {"add_signal_handler", "remove_signal_handler", "add_reader", "add_writer", "create_unix_server"}
"""Of the event loops of Windows, one or the other of which lacks them."""


def source_of(module: str) -> Path | None:
    found = importlib.util.find_spec(module)
    return Path(found.origin) if found is not None and found.origin is not None else None


def imports_of(tree: ast.AST, module: str) -> Iterator[str]:
    """Every name that is imported, in functions too, ``from x import y`` as ``x.y``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_module(name: str) -> str | None:
    """The module of ours that an imported name is, or is in."""
    while name.startswith("hierfl"):
        if importlib.util.find_spec(name) is not None if name.count(".") == 0 else _exists(name):
            return name
        name = name.rpartition(".")[0]
    return None


def _exists(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def reachable() -> dict[str, ast.Module]:
    """The SDK's modules and all of ours that they import, with their syntax trees."""
    todo = list(STARTS) + [f"hierfl.client.{path.stem}" for path in (ROOT / "hierfl" / "client").glob("[a-z]*.py")]
    found: dict[str, ast.Module] = {}
    while todo:
        module = todo.pop()
        source = source_of(module)
        if module in found or source is None or source.suffix != ".py":
            continue
        found[module] = ast.parse(source.read_text(), str(source))
        todo += [own for name in imports_of(found[module], module) if (own := own_module(name))]
    return found


TREES = reachable()


def guarded(tree: ast.Module) -> set[int]:
    """Lines that Windows does not come to: after ``if sys.platform == "win32": return`` in the same function."""
    lines: set[int] = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in function.body:
                if isinstance(statement, ast.If) and ast.unparse(statement.test) == "sys.platform == 'win32'":
                    lines |= set(range(statement.end_lineno or 0, (function.end_lineno or 0) + 1))
    return lines


def test_the_walk_covers_the_sdk_and_what_it_stands_on() -> None:
    assert {"hierfl.client.session", "hierfl.cli.client", "hierfl.wire.tls", "hierfl.pki", "hierfl.layout"} <= set(
        TREES
    )


@pytest.mark.parametrize("module", sorted(TREES))
def test_no_module_asks_for_what_windows_lacks(module: str) -> None:
    tree, skipped = TREES[module], guarded(TREES[module])
    wrong = [name for name in imports_of(tree, module) if name.split(".")[0] in MISSING_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.lineno not in skipped:
            on = node.value.id if isinstance(node.value, ast.Name) else ""
            if (on, node.attr) in MISSING_NAMES or node.attr in MISSING_METHODS:
                wrong.append(f"{on}.{node.attr} in line {node.lineno}")
    assert wrong == []


@pytest.mark.parametrize("module", sorted(TREES))
def test_no_module_names_what_a_site_need_not_have(module: str) -> None:
    named = {name.split(".")[0] for name in imports_of(TREES[module], module)} & NOT_AT_A_SITE
    assert {package for package in named if module not in MAY_IMPORT.get(package, set())} == set()


def test_it_syncs_folders_behind_a_guard_only() -> None:
    """Windows cannot open a folder: that call is after the guard, and found by this test's own eyes."""
    tree = TREES["hierfl.client.files"]
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) == "os.open"]
    assert calls
    assert all(call.lineno in guarded(tree) for call in calls)


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def test_the_sdk_trains_a_round_without_the_servers_packages(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("".join(f"{n % 3},{n % 5},{n % 2}\n" for n in range(50)))
    (tmp_path / "job.toml").write_text(
        '[job]\nname = "j"\napp = "logistic"\nrounds = 1\n[app]\nnum_features = 2\nlearning_rate = 0.1\n'
    )
    script = BLOCKED.format(names=NOT_AT_A_SITE) + (
        "import hierfl.client, hierfl.client.runner, hierfl.client.link\n"
        "from hierfl.cli import main\n"
        f"main(['client', 'check', {str(ROOT / 'examples/quickstart/numpy_app.py')!r},"
        f" '--config', {str(tmp_path / 'job.toml')!r}, '--set', 'data={tmp_path / 'data.csv'}'])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "round: trained on 40 examples" in ended.stdout
