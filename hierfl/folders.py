"""Private files and folders that appear whole or not at all.

Each is written beside its place under a name with a dot, synced, and renamed into it; what a killed process
leaves behind still has that name. Files are mode 0600, folders 0700. ``whole_file`` is for what is neither private nor
kept through a crash: an export, a ready file.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hierfl.errors import ConfigError

__all__ = ["whole_file", "write_file", "write_folder"]


def write_folder(path: Path, files: Mapping[str, bytes], folders: Sequence[str] = ()) -> None:
    """Make ``path`` with ``files`` (by relative path) and empty ``folders``, all at once.

    Raises:
        ConfigError: Somebody else made it in the meantime.
    """
    with _staged(path) as staged:
        for name in folders:
            _make_private(staged / name)
        for name, data in files.items():
            _write_synced(staged / name, data)


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    _make_private(path.parent)
    staged = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))  # mode 0700
    try:
        yield staged
        _rename_new(staged, path)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _rename_new(staged: Path, path: Path) -> None:
    try:
        staged.rename(path)
    except OSError:
        if path.exists():
            raise ConfigError("folder", str(path), "has been made by another process just now") from None
        raise


def write_file(path: Path, data: bytes) -> None:
    """Replace one file, atomically."""
    staged = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        _write_synced(staged, data)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    _make_private(path.parent)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _make_private(path: Path) -> None:
    """Make a folder and those above it that are missing, mode 0700 each."""
    if not path.exists():
        _make_private(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, which takes its place when the block ends well and is gone when it does not."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
