"""The last word on each of a client's updates, kept at the site after the update itself is gone.

One line of JSON for each, appended before the update is dropped. It outlasts a crash of the process at once, and one of
the machine after about a second (``sync``): until then, too, the region's own book answers. A run's lines are kept
for 30 days after its newest one, and 10,000 lines in all.

    DIR/receipts.jsonl
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hierfl import documents
from hierfl.client.files import storage_error, write_durably
from hierfl.client.held import Held
from hierfl.errors import WireError
from hierfl.receipts import ReceiptState
from hierfl.types import AttemptKey, RunId

__all__ = [
    "FILE",
    "HELD_TOO_LONG",
    "UNKNOWN_THERE",
    "KeptReceipt",
    "ReceiptLog",
    "read_log",
    "receipt_of",
    "still_kept",
]

FILE = "receipts.jsonl"
KEEP_NS = 30 * 86_400 * 10**9
MOST_LINES = 10_000
PRUNE_EVERY = 1_000

HELD_TOO_LONG = "held_too_long"
"""The site's own word: ``hold_s`` went by without a last word of the region."""
UNKNOWN_THERE = "unknown_there"
"""The site's own word: the run has moved on, and the region has no receipt of the update."""


@dataclass(frozen=True, kw_only=True)
class KeptReceipt:
    """What became of one update. A state that is no last word stands with the reason why none will come."""

    key: AttemptKey
    digest: str
    weight: int
    state: ReceiptState
    version: int = 0
    reason: str = ""
    at_unix_ns: int
    """Wall clock of the site, when it learned this."""


def receipt_of(held: Held, state: ReceiptState, *, version: int = 0, reason: str = "") -> KeptReceipt:
    """The line for an update that is held."""
    return KeptReceipt(
        key=held.key,
        digest=held.digest,
        weight=held.head.weight,
        state=state,
        version=version,
        reason=reason,
        at_unix_ns=time.time_ns(),
    )


class ReceiptLog:
    """The log of one client, which one process at a time has (``folder.py``)."""

    def __init__(self, folder: Path) -> None:
        """Prune what is too old.

        Raises:
            StorageError: It cannot be read or written.
        """
        self._path = folder / FILE
        self._is_torn = self._needs_sync = False
        self._prune()

    def append(self, receipt: KeptReceipt) -> None:
        """Add a line; a second one under the same key replaces the first for whoever reads.

        Raises:
            DiskFull, StorageError: It is not there, or not whole; readers pass over half a line.
        """
        try:
            with self._path.open("ab") as file:
                file.write((b"\n" if self._is_torn else b"") + documents.encode(receipt) + b"\n")
        except OSError as error:
            self._is_torn = True
            raise storage_error(error, self._path) from None
        self._is_torn, self._needs_sync = False, True
        self._num_lines += 1
        if self._num_lines >= MOST_LINES + PRUNE_EVERY:
            self._prune()

    def sync(self) -> None:
        """Make what was appended outlast a crash of the machine. Blocks; may be called from another thread."""
        if not self._needs_sync:
            return
        self._needs_sync = False
        try:
            with self._path.open("rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(error, self._path) from None

    def _prune(self) -> None:
        lines = _lines(self._path)
        found = _whole(lines)
        kept = still_kept(found, time.time_ns())
        self._num_lines, self._is_torn = len(kept), lines[-1] != b""
        if len(kept) < len(found):
            write_durably(self._path, (documents.encode(receipt) + b"\n" for receipt in kept))
            self._is_torn = False


def still_kept(receipts: Iterable[KeptReceipt], now_unix_ns: int) -> list[KeptReceipt]:
    """Those of runs that have a line of the last 30 days, and of them the newest 10,000."""
    receipts = list(receipts)
    newest: dict[RunId, int] = {}
    for receipt in receipts:
        newest[receipt.key.run] = max(receipt.at_unix_ns, newest.get(receipt.key.run, 0))
    return [one for one in receipts if newest[one.key.run] > now_unix_ns - KEEP_NS][-MOST_LINES:]


def read_log(path: Path) -> list[KeptReceipt]:
    """Every whole line, in order; the client may be writing.

    Raises:
        StorageError: The file is there and cannot be read.
    """
    return _whole(_lines(path))


def _lines(path: Path) -> list[bytes]:
    """The last one is empty, or half a line."""
    try:
        return path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [b""]
    except OSError as error:
        raise storage_error(error, path, "read") from None


def _whole(lines: Iterable[bytes]) -> list[KeptReceipt]:
    return [receipt for line in lines if (receipt := _read(line)) is not None]


def _read(line: bytes) -> KeptReceipt | None:
    try:
        return documents.decode(line, KeptReceipt, "receipt") if line else None
    except WireError:
        return None
