"""A client's folder: held updates, local tensors, the newest leader's epoch, and what went wrong here.

DIR/<region>.<site>.<client>/
    lock.sqlite      one process at a time
    updates/ local/  hierfl/client/held.py
    residuals/       hierfl/client/residuals.py
    receipts.jsonl   hierfl/client/receiptlog.py
    leader_epoch     the highest that this client has obeyed
    endpoints        the newest list of the region's intakes
    failures/        tracebacks of user code; they never leave the site
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from hierfl.client.files import FolderLock, make_folder, write_durably
from hierfl.client.held import HeldUpdates, LocalTensors
from hierfl.client.receiptlog import ReceiptLog
from hierfl.client.residuals import Residuals
from hierfl.errors import StorageError, StoreDamaged
from hierfl.types import AttemptKey, ClientRef

__all__ = ["ClientFolder"]

KEEP_FAILURES = 20
"""Files with tracebacks that a client keeps."""


class ClientFolder:
    """One client's folder, locked until closed."""

    def __init__(self, directory: Path, client: ClientRef) -> None:
        """
        Raises:
            StoreLocked: Another process runs this client from there.
            StorageError: The folder cannot be made, read or believed.
        """
        self.path = make_folder(directory / f"{client.region}.{client.site}.{client.client}")
        self._epoch_file = self.path / "leader_epoch"
        self._lock = FolderLock(self.path, f"client {client}")
        try:
            self.updates = HeldUpdates(self.path)
            self.local = LocalTensors(self.path)
            self.residuals = Residuals(self.path)
            self.receipts = ReceiptLog(self.path)
            self.leader_epoch = self._read_epoch()
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        with contextlib.suppress(StorageError):  # the region's book answers for what the disk does not take
            self.receipts.sync()
        self._lock.close()

    def raise_epoch(self, epoch: int) -> None:
        """Remember a newer leader: from now on an older one's offers are left unanswered."""
        if epoch > self.leader_epoch:
            write_durably(self._epoch_file, (str(epoch).encode(),))
            self.leader_epoch = epoch

    def write_failure(self, key: AttemptKey, details: str) -> Path:
        """Keep a traceback, and only the newest of them; returns where it is."""
        folder = make_folder(self.path / "failures")
        path = folder / f"{key.run}-{key.task}-{key.round}.{key.attempt}.txt"
        write_durably(path, (details.encode(),))
        by_age = sorted(folder.glob("*.txt"), key=lambda file: file.stat().st_mtime_ns)
        for old in by_age[:-KEEP_FAILURES]:
            old.unlink(missing_ok=True)
        return path

    def _read_epoch(self) -> int:
        try:
            return int(self._epoch_file.read_text()) if self._epoch_file.exists() else 0
        except OSError as error:
            raise StorageError(f"{self._epoch_file} cannot be read: {error.strerror}") from None
        except ValueError:
            raise StoreDamaged(f"{self._epoch_file} does not hold a number; remove it") from None
