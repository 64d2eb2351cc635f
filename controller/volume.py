"""Two controllers on one store also share one folder of blobs and commit records, or they do not start.

A file in the folder names the store and the volume, and the store names the volume: they are one pair for good. So a
controller with a folder of its own is refused, and so is one whose store was wiped and is another one now.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from controller.blobs import durable_directory, storage_errors, sync_directory
from hierfl import documents
from hierfl.errors import ConfigError, StoreDamaged, WireError
from hierfl.failpoints import reach
from hierfl.folders import write_file

__all__ = ["MARKER", "adopt", "require_shared"]

MARKER = "store.json"


class SharedStore(Protocol):
    """What this needs of a store."""

    store_id: str

    def shared(self, volume: str) -> str:
        """Name of the volume that belongs to this store: ``volume``, unless one was named before."""


@dataclass(frozen=True, kw_only=True)
class Marker:
    """Contents of the file."""

    store_id: str
    volume: str


def require_shared(directory: Path, store: SharedStore) -> None:
    """Let ``directory`` be the one of ``store``, or refuse it.

    Raises:
        ConfigError: The store's folder is another one, or this folder has a store of its own.
        StoreDamaged: The folder belongs to a store with another identity.
        StorageError: The file cannot be read or written.
    """
    if (directory / "controller.sqlite").exists():
        rule = "has a store of its own, controller.sqlite: start without --store, or use another folder"
        raise ConfigError("--dir", str(directory), rule)
    marker = _read(directory) or _write(directory, Marker(store_id=store.store_id, volume=uuid.uuid4().hex))
    if marker.store_id != store.store_id:
        raise StoreDamaged(
            f"{directory} belongs to store {marker.store_id}, and --store is {store.store_id}: is it another Redis, or "
            "was it wiped? Bring back its append-only file, or rebuild it from this folder with --recover"
        )
    _pair(directory, marker, store)


def adopt(directory: Path, store: SharedStore, refill: Callable[[], None]) -> None:
    """Give ``directory``, whose store is lost, to this one, once ``refill`` has written into it what it needs.

    Cut off anywhere, it can be done again; until it is done every controller refuses the pair.

    Raises:
        ConfigError: Nothing is lost here, or this store has a folder already.
        StorageError: As ``require_shared``, and what ``refill`` raises.
    """
    marker = _read(directory)
    if marker is None or marker.store_id == store.store_id:
        raise ConfigError("--recover", str(directory), "must be a folder whose store is lost: start without --recover")
    _pair(directory, marker, store)
    refill()
    with storage_errors(directory):
        write_file(directory / MARKER, documents.encode(Marker(store_id=store.store_id, volume=marker.volume)))
        sync_directory(directory)


def _pair(directory: Path, marker: Marker, store: SharedStore) -> None:
    if store.shared(marker.volume) != marker.volume:
        rule = "is not the folder that this store's controllers share: mount that one, and name it here"
        raise ConfigError("--dir", str(directory), rule)


def _read(directory: Path) -> Marker | None:
    path = directory / MARKER
    with storage_errors(path):
        if not path.is_file():
            return None
        try:
            return documents.decode(path.read_bytes(), Marker, MARKER)
        except WireError as error:
            raise StoreDamaged(f"{path} is damaged: {error}") from None


def _write(directory: Path, marker: Marker) -> Marker:
    """Write durably, unless another controller was faster; returns the one that is there."""
    durable_directory(directory)
    temporary = directory / f".{MARKER}-{uuid.uuid4().hex}"
    with storage_errors(directory):
        try:
            with temporary.open("xb") as file:
                file.write(documents.encode(marker))
                file.flush()
                os.fsync(file.fileno())
            reach("store.volume")
            with suppress(FileExistsError):
                (directory / MARKER).hardlink_to(temporary)
            sync_directory(directory)
        finally:
            temporary.unlink(missing_ok=True)
    found = _read(directory)
    assert found is not None, "it was just made"
    return found
