"""A disk that can be full."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from federations import require

SIZE = 4 * 2**20


class SmallDisk:
    """A file system of its own at ``path``, of ``SIZE`` bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self) -> None:
        """Take all space that is left."""
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        self._filler.unlink()

    def files(self) -> dict[str, int]:
        """Sizes of what others wrote there, by name."""
        found = {str(path.relative_to(self.path)): path.stat().st_size for path in self.path.rglob("*")}
        return {name: size for name, size in found.items() if (self.path / name).is_file() and name != "filler"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path], SmallDisk]]:
    """``small_disk(path)`` mounts one. For root, as in a container; the tests that need it are left out elsewhere."""
    mounted: list[Path] = []

    def mount(path: Path = tmp_path / "disk") -> SmallDisk:
        path.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path)]
        allowed = os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
        require(allowed, "root, to mount a small disk")
        mounted.append(path)
        return SmallDisk(path)

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
