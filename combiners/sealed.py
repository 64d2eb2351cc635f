"""Sealed bytes: a release as it is stored and sent. Made from a ``Release``, or read back by digest; nothing else.

The file is the transfer's own frames, each behind its length (8 bytes, little-endian).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hierfl import documents
from hierfl.errors import StoreDamaged, WireError
from hierfl.records import PartialHead
from hierfl.residency import Release
from hierfl.wire.transfer import Expect, Incoming, Outgoing

__all__ = ["Sealed", "read_sealed", "seal", "write_sealed"]


@dataclass(frozen=True)
class Sealed:
    """A sealed partial: fixed bytes under one digest, sent under any attempt's key."""

    head: PartialHead
    outgoing: Outgoing

    @property
    def digest(self) -> str:
        return self.outgoing.digest


def seal(release: Release, layout_hash: str) -> Sealed:
    """Encode a release (100 MB: 0.2 s, off the event loop).

    Wide groups travel as one vector, high halves and then low halves.
    """
    if not isinstance(release, Release):
        raise TypeError("only a Release is sealed")
    vectors = {group.name: release.partial.sums[group.name].reshape(-1) for group in release.partial.groups}
    outgoing = Outgoing("partial", layout_hash, vectors, meta=documents.encode(release.head))
    outgoing.digest  # noqa: B018 - encodes now, here, where that may take its time
    return Sealed(release.head, outgoing)


def write_sealed(path: Path, sealed: Sealed) -> None:
    """Write the file whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            for frame in sealed.outgoing.frames():
                file.write(len(frame).to_bytes(8, "little"))
                file.write(frame)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_sealed(path: Path, digest: str) -> Sealed:
    """Read sealed bytes back.

    Raises:
        StoreDamaged: They do not have ``digest``.
    """
    size = path.stat().st_size
    incoming = Incoming(Expect(kind="partial", layout_hash=None, vectors=None, max_bytes=size, digest=digest))
    try:
        with path.open("rb") as file:
            while length := file.read(8):
                incoming.feed(file.read(int.from_bytes(length, "little")))
        head = documents.decode(incoming.meta, PartialHead, "partial head")
        return Sealed(head, Outgoing.of(incoming))
    except WireError as error:
        raise StoreDamaged(f"{path} is damaged: {error}; restore it from a backup") from None
