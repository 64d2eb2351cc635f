"""A transfer as a file: its frames in order, each behind its length (8 bytes, little-endian).

What was sent or received is stored as it is, under its own digest, and can be sent again as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from hierfl.errors import TransferIncomplete
from hierfl.wire.transfer import Expect, Incoming

__all__ = ["read_frames", "write_frames"]


class Writable(Protocol):
    """An open file, as far as it is used."""

    def write(self, data: bytes, /) -> object: ...


def write_frames(file: Writable, frames: Iterable[bytes]) -> None:
    """Append frames to an open file."""
    for frame in frames:
        file.write(len(frame).to_bytes(8, "little"))
        file.write(frame)


def read_frames(path: Path, expect: Expect) -> Incoming:
    """The transfer in a file, whole and checked.

    Raises:
        OSError: The file cannot be read.
        WireError: It holds no such transfer.
    """
    incoming = Incoming(expect)
    with path.open("rb") as file:
        left = path.stat().st_size
        while head := file.read(8):
            left -= len(head)
            length = int.from_bytes(head, "little")
            if length > left:
                raise TransferIncomplete(f"transfer: {path} ends within a frame")
            left -= length
            incoming.feed(file.read(length))
    incoming.close()
    return incoming
