"""Sealed bytes: a release as it is stored and sent. Made from a ``Release``, or read back by digest; nothing else.

The file is the transfer's own frames (``hierfl/wire/framefile.py``), the sums packed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hierfl import documents
from hierfl.aggregation import PartialAggregate
from hierfl.errors import StoreDamaged, WireError
from hierfl.failpoints import reach
from hierfl.records import PartialHead
from hierfl.residency import Release
from hierfl.steadyfile import SteadyFile
from hierfl.wire.framefile import read_frames, write_frames
from hierfl.wire.packed import expect_partial, outgoing_blocks, outgoing_partial
from hierfl.wire.piecewise import PackedPartial
from hierfl.wire.transfer import Outgoing

__all__ = ["Sealed", "read_sealed", "seal", "write_sealed", "write_transfer"]


@dataclass(frozen=True)
class Sealed:
    """A sealed partial: fixed bytes under one digest, sent under any attempt's key."""

    head: PartialHead
    outgoing: Outgoing

    @property
    def digest(self) -> str:
        return self.outgoing.digest


def seal(release: Release, layout_hash: str) -> Sealed:
    """Pack and encode a release (25 million values: 0.2 s, off the event loop), chunk by chunk from its sums."""
    if not isinstance(release, Release):
        raise TypeError("only a Release is sealed")
    meta = documents.encode(release.head)
    partial = release.partial
    if isinstance(partial, PackedPartial):
        outgoing = outgoing_blocks(layout_hash, partial.packed.blocks, partial.take_words, meta)
    else:
        assert isinstance(partial, PartialAggregate), "the other form of a sum"
        outgoing = outgoing_partial(layout_hash, partial.groups, partial.sums, meta)
    outgoing.encode()
    return Sealed(release.head, outgoing)


def write_sealed(path: Path, sealed: Sealed) -> None:
    """Write the file, whole or not at all."""
    write_transfer(path, sealed.outgoing)


def write_transfer(path: Path, outgoing: Outgoing) -> None:
    """Write a file of frames whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with SteadyFile(temporary) as file:
            write_frames(file, outgoing.frames())
            file.sync()
        reach("region.seal.write")
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
    try:
        incoming = read_frames(path, expect_partial(None, None, digest, max_bytes=path.stat().st_size))
        head = documents.decode(incoming.meta, PartialHead, "partial head")
        return Sealed(head, Outgoing.of(incoming))
    except WireError as error:
        raise StoreDamaged(f"{path} is damaged: {error}; restore it from a backup") from None
