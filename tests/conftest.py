"""For all tests: nothing that one leaves behind in this process is seen by the next."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _import_path() -> Iterator[None]:
    """An app's folder is put on ``sys.path`` when it is loaded; another test's app must not be found there."""
    before = list(sys.path)
    yield
    sys.path[:] = before
