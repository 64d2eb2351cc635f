"""Commit records as files: who creates ``commits/RUN/VERSION`` decides what that version is.

A record is signed, created exclusively and never changed. Whoever finds one verifies and adopts it, whoever
wrote it: so a crash between the record and the store's transaction loses nothing and counts nothing twice.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from controller.blobs import durable_directory, storage_errors, sync_directory
from hierfl import documents
from hierfl.errors import IdentityError, StoreDamaged, WireError
from hierfl.failpoints import reach
from hierfl.records import CommitRecord
from hierfl.types import RunId

__all__ = ["Commits", "SignedRecord"]


@dataclass(frozen=True, kw_only=True)
class SignedRecord:
    """A commit record as it was signed, with its signature and signer."""

    record: bytes
    """``documents.encode(CommitRecord)``."""
    signature: bytes
    certificate: bytes
    """Leaf of the controller that signed, DER."""

    def read(self) -> CommitRecord:
        """The record itself; its signature is checked by whoever finds it."""
        return documents.decode(self.record, CommitRecord, "commit record")


class Commits:
    """The records under one directory. ``check`` raises unless a record was signed by this federation's controller."""

    def __init__(self, directory: Path, check: Callable[[SignedRecord], None]) -> None:
        self._directory, self._check = directory, check
        self._runs = directory.with_name("runs")
        """What each run was submitted as, by its id."""
        durable_directory(directory)

    def describe(self, run: RunId, document: bytes) -> None:
        """Keep what a run was submitted as, durably: with its records that outlives the store."""
        durable_directory(self._runs)
        temporary = self._runs / f".part-{uuid.uuid4().hex}"
        with storage_errors(self._runs):
            try:
                _write(temporary, document)
                reach("store.run")
                temporary.replace(self._runs / run)
                sync_directory(self._runs)
            finally:
                temporary.unlink(missing_ok=True)

    def described(self) -> Iterator[tuple[RunId, bytes | None]]:
        """Every run that was submitted or has records, with what it was submitted as: None where that was not kept."""
        with storage_errors(self._directory):
            with_records = {path.name for path in self._directory.iterdir() if path.is_dir()}
            kept = {path.name: path for path in self._runs.glob("[!.]*")}
            for run in sorted(with_records | kept.keys()):
                yield RunId(run), kept[run].read_bytes() if run in kept else None

    def create(self, run: RunId, version: int, record: SignedRecord) -> SignedRecord:
        """Create the record of a version, durably; returns the one that is there, ours or an earlier one.

        Raises:
            StoreDamaged: The record found there is not a signed record of this run and version.
        """
        folder = self._directory / run
        durable_directory(folder)
        temporary = folder / f".part-{uuid.uuid4().hex}"
        with storage_errors(folder):
            try:
                _write(temporary, documents.encode(record))
                reach("controller.link")
                with suppress(FileExistsError):  # an earlier record stands; a rename would have replaced it
                    (folder / str(version)).hardlink_to(temporary)
                sync_directory(folder)
            finally:
                temporary.unlink(missing_ok=True)
        found = self.find(run, version)
        assert found is not None
        return found

    def find(self, run: RunId, version: int) -> SignedRecord | None:
        """The verified record of a version, or None.

        Raises:
            StoreDamaged: What is there is not a signed record of this run and version.
        """
        path = self._directory / run / str(version)
        with storage_errors(path):
            if not path.is_file():
                return None
            data = path.read_bytes()
        try:
            signed = documents.decode(data, SignedRecord, "signed record")
            self._check(signed)
            record = signed.read()
        except (WireError, IdentityError) as error:
            raise StoreDamaged(f"{path} is no record of this federation: {error}") from None
        if (record.run, record.version) != (run, version):
            raise StoreDamaged(f"{path} is the record of version {record.version} of run {record.run}")
        return signed

    def highest_epoch(self) -> int:
        """Highest leader epoch in any record: the last record of each run has its run's highest."""
        last = (self._last(folder) for folder in self._directory.iterdir() if folder.is_dir())
        return max((record.read().leader_epoch for record in last if record is not None), default=0)

    def _last(self, folder: Path) -> SignedRecord | None:
        versions = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        return self.find(RunId(folder.name), max(versions)) if versions else None


def _write(path: Path, data: bytes) -> None:
    """Write a new file, durably but for its name."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
