"""The repository keeps its own rules: packages, import directions, generated code, stubs, files a wheel needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hierfl

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("hierfl", "combiners", "controller")


def tool(name: str) -> str:
    """Path of a tool beside this Python; without it the test is skipped, or fails where CI requires all."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        require(f"{name} is not installed")
    assert found is not None
    return found


def require(missing: str) -> None:
    if os.environ.get("HIERFL_REQUIRE_ALL"):
        pytest.fail(missing)
    pytest.skip(missing)


def run(*command: str) -> None:
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_packages_of_pyproject_are_those_of_the_tree():
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for package in PACKAGES
        for init in (ROOT / package).rglob("__init__.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_package_says_that_it_is_typed():
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)


def test_every_data_file_of_a_package_is_declared():
    """Whatever lies beside the code and is not Python is in the wheel, or it is a tool of this repository."""
    tools = {"hierfl/wire/buf.yaml", "hierfl/wire/generate.sh"}
    declared = PROJECT["tool"]["setuptools"]["package-data"]
    inside = {path for package, globs in declared.items() for glob in globs for path in (ROOT / package).glob(glob)}
    present = {
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not _is_module(path)
    }
    assert {str(path.relative_to(ROOT)) for path in present - inside} == tools


def _is_module(path: Path) -> bool:
    return path.suffix == ".py" and (path.parent / "__init__.py").exists()


def test_imports_go_the_way_that_the_contracts_say():
    run(tool("lint-imports"), "--no-cache")


def test_the_schema_is_clean_and_breaks_no_earlier_one():
    buf = tool("buf")
    run(buf, "lint", "hierfl/wire")
    run(buf, "breaking", "hierfl/wire", "--against", ".ci/wire-baseline")


def test_the_generated_stubs_are_those_of_the_schema(tmp_path):
    environment = Path(os.environ.get("HIERFL_PROTO_ENV", ROOT / ".venv-proto"))
    if not (environment / "bin" / "python").exists() and not os.environ.get("HIERFL_REQUIRE_ALL"):
        pytest.skip("no environment with grpcio-tools: hierfl/wire/generate.sh makes one")
    run("bash", "hierfl/wire/generate.sh", str(tmp_path))
    for name in ("hierfl_pb2.py", "hierfl_pb2.pyi"):
        assert (tmp_path / "hierfl" / "wire" / name).read_text() == (ROOT / "hierfl" / "wire" / name).read_text()


def test_constraints_pin_what_the_extras_ask_for_and_name_no_place():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line) for line in lines)
    pinned = {normal(line.partition("==")[0]) for line in lines}
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    asked = {normal(re.split(r"[\[<>=]", name)[0]) for group in groups for name in group}
    assert asked - {"hierfl"} <= pinned
    assert "torch==2.13.0" in lines


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_of_a_package_decodes_foreign_bytes_unsafely(package):
    """No pickle, cloudpickle, ``eval``, ``torch.load`` or YAML in what we ship (``DESIGN.md``, hostile input)."""
    modules = r"^\s*(import|from) (pickle|cloudpickle|marshal|shelve|yaml|dill)\b"
    calls = r"\btorch\.load\(|(?<![\w.])eval\("
    forbidden = re.compile(f"{modules}|{calls}", re.MULTILINE)
    for path in (ROOT / package).rglob("*.py"):
        assert not forbidden.search(path.read_text()), path


def test_make_knows_its_targets():
    for target in ("setup", "demo", "test", "test-slow", "lint", "bench", "ci"):
        run(tool("make"), "--dry-run", "--always-make", target)


def test_every_public_name_of_hierfl_can_be_had_and_no_other():
    assert all(getattr(hierfl, name) is not None for name in hierfl.__all__)
    assert set(hierfl.__all__) == {"__version__", *hierfl._HOME_OF}
    with pytest.raises(AttributeError, match="nothing_like_this"):
        hierfl.nothing_like_this  # noqa: B018  the look-up is what is tried
