"""Apps are loaded from files and modules, and what is wrong with one is said in a sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hierfl.client.app import App, find_app, load_app
from hierfl.errors import AppError

GOOD = """
NAME, VERSION = "linear", "2"
def init(config): return {}
def train(task): return None
"""


@pytest.fixture(autouse=True)
def _clean_imports() -> Iterator[None]:
    """Leave ``sys.path`` and ``sys.modules`` as they were."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("hierfl_app_", "neighbour", "installed_")):
            del sys.modules[name]


def write(folder: Path, text: str, name: str = "app.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_an_app_file_is_loaded_with_its_name_and_version(tmp_path: Path) -> None:
    app = load_app(write(tmp_path, GOOD))
    assert (app.name, app.version, app.evaluate, str(app)) == ("linear", "2", None, "linear@2")
    assert app.serves("linear", "")
    assert app.serves("linear", "2")
    assert not app.serves("linear", "3")
    assert not app.serves("other", "2")


def test_an_app_without_a_name_is_called_like_its_file(tmp_path: Path) -> None:
    app = load_app(write(tmp_path, "def init(c): ...\ndef train(t): ...\ndef evaluate(t): ...", "xrays.py"))
    assert (app.name, app.version) == ("xrays", "")
    assert app.evaluate is not None


def test_an_object_called_app_may_hold_the_functions(tmp_path: Path) -> None:
    text = "class A:\n  evaluate = None\n  def init(self, c): ...\n  def train(self, t): ...\napp = A()"
    assert load_app(write(tmp_path, text)).evaluate is None


def test_an_app_may_import_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "X = 3", "neighbour_a.py")
    assert load_app(write(tmp_path, "from neighbour_a import X\n" + GOOD)).name == "linear"


def test_an_installed_module_is_loaded_by_its_dotted_name(tmp_path: Path) -> None:
    write(tmp_path, "def init(c): ...\ndef train(t): ...", "installed_app.py")
    sys.path.insert(0, str(tmp_path))
    assert load_app("installed_app").name == "installed_app"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import nothing_like_this", r"app.py could not be imported: ModuleNotFoundError.*line 1"),
        ("x = 1\ny = 1 / 0", r"could not be imported: ZeroDivisionError.*line 2"),
        ("def train(t): ...", r"has no function init\(config\)"),
        ("def init(c): ...", r"has no function train\(task\)"),
        ("def init(c): ...\ndef train(): ...", r"train must take one argument: train\(task\)"),
        ("def init(c): ...\ndef train(a, b): ...", r"train must take one argument"),
        ("train = 3\ndef init(c): ...", r"has no function train"),
        ("NAME = '../x'\n" + "def init(c): ...\ndef train(t): ...", r"set NAME in the app"),
        ("raise SystemExit(3)", r"could not be imported: SystemExit"),
    ],
)
def test_what_is_wrong_with_an_app_is_said(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(AppError, match=sentence):
        load_app(write(tmp_path, text))


def test_a_missing_file_and_a_missing_module_are_said(tmp_path: Path) -> None:
    with pytest.raises(AppError, match="no app file"):
        load_app(str(tmp_path / "none.py"))
    with pytest.raises(AppError, match="no_such_module could not be imported"):
        load_app("no_such_module")


def test_an_app_is_found_by_its_name_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert find_app("linear", tmp_path).version == "2"
    with pytest.raises(AppError, match=r"there is no app 'digits'.*--app"):
        find_app("digits", tmp_path)


def test_an_app_may_be_made_in_python() -> None:
    assert str(App(name="x", init=dict, train=lambda task: task)) == "x"  # type: ignore[arg-type,return-value]
