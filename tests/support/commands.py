"""Run a command in this process, as ``main`` would, and keep what it wrote."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from hierfl.cli import run


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.out)
        return document


@pytest.fixture
def hierfl(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Ended]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.delenv("HIERFL_DEBUG", raising=False)
    monkeypatch.setattr(sys, "path", sys.path.copy())  # an app's folder is put on it

    def call(*args: object) -> Ended:
        code = run([str(arg) for arg in args])
        written = capsys.readouterr()
        return Ended(code, written.out, written.err)

    return call
