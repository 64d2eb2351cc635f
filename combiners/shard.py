"""One shard of an intake's sums: a range of values of each group, the pieces of updates for it, and no I/O.

It belongs to one incarnation of one intake, is made with it and ends with it. Pieces wait under their upload's number
until the intake, which has seen the whole update, says ``commit`` or ``drop``; nothing is added before that. Calls may
arrive out of order: a piece says where it belongs, and one that comes after its upload has ended is let go.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from hierfl import buffers
from hierfl.columns import ColumnGroup
from hierfl.encodings import Encoding, Received, encoding_of
from hierfl.errors import InvalidTransition, StorageError, TransferIncomplete, ValueOutOfRange
from hierfl.types import AttemptKey, Int64Array

__all__ = ["Shard", "ShardPort", "Share"]


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a shard has of one attempt's groups."""

    groups: tuple[ColumnGroup, ...]
    """As long as its range of each; maybe without a value."""
    starts: Mapping[str, int]
    """Where the range begins in the whole group, for its errors."""
    encoding: Encoding


@dataclass
class _Attempt:
    share: Share
    sums: dict[str, Int64Array] = field(default_factory=dict)
    """By group; made by the first commit."""
    pieces: dict[int, dict[str, dict[int, np.ndarray]]] = field(default_factory=dict)
    """By upload, vector and offset, of uploads that are open."""
    ended: set[int] = field(default_factory=set)
    """Uploads that were committed or dropped."""
    weight: int = 0
    num_updates: int = 0
    seal_id: str = ""
    """What the sums may be read for; a commit ends it."""


class ShardPort(Protocol):
    """A shard, as its intake and the Region call it: calls go out at once, and what they answer is waited for.

    Each future raises ``Unreachable`` where the shard is gone, and else what ``Shard`` does.
    """

    def open(self, key: AttemptKey, share: Share) -> Future[None]: ...
    def put(self, key: AttemptKey, upload: int, vector: str, offset: int, values: np.ndarray) -> Future[None]: ...
    def check(self, key: AttemptKey, upload: int, sizes: Mapping[str, int]) -> Future[None]: ...
    def commit(self, key: AttemptKey, upload: int, weight: int) -> Future[None]: ...
    def drop(self, key: AttemptKey, upload: int) -> Future[None]: ...
    def freeze(self, key: AttemptKey, seal_id: str) -> Future[tuple[int, int]]: ...
    def block(self, key: AttemptKey, seal_id: str, group: str, start: int, stop: int) -> Future[Int64Array]: ...
    def close(self, key: AttemptKey) -> Future[None]: ...

    def ended(self) -> Future[None]:
        """Never answers; raises once the shard is gone."""
        ...

    def end(self) -> None:
        """Let it end, with all that it holds."""
        ...


class Shard:
    """See the module. One call at a time: a lock sees to that."""

    def __init__(self) -> None:
        self._attempts: dict[AttemptKey, _Attempt] = {}
        self._lock = threading.Lock()

    @property
    def num_staged(self) -> int:
        """Uploads of which there are pieces."""
        with self._lock:
            return sum(len(attempt.pieces) for attempt in self._attempts.values())

    def open(self, key: AttemptKey, share: Share) -> None:
        """Take part in an attempt. Said again, nothing changes."""
        with self._lock:
            self._attempts.setdefault(key, _Attempt(share))

    def put(self, key: AttemptKey, upload: int, vector: str, offset: int, values: np.ndarray) -> None:
        """Keep a copy of a piece: ``offset`` entries of the vector came before it, to this shard."""
        with self._lock:
            attempt = self._attempts.get(key)
            if attempt is not None and upload not in attempt.ended:
                attempt.pieces.setdefault(upload, {}).setdefault(vector, {})[offset] = np.array(values)

    def check(self, key: AttemptKey, upload: int, sizes: Mapping[str, int]) -> None:
        """Check this range of an update, all of which has come.

        Args:
            sizes: By vector, the entries that were sent here.
        Raises:
            ValueOutOfRange: A value does not fit.
            TransferIncomplete: A piece is missing.
        """
        with self._lock:
            attempt = self._of(key, "check")
            received = _received(attempt, upload, sizes)
            for group in filter(_has_values, attempt.share.groups):
                try:
                    encoding_of(attempt.share.encoding, group).check(group, received)
                except ValueOutOfRange as error:
                    start = attempt.share.starts[group.name]
                    raise ValueOutOfRange(f"{error} (counted from value {start} of {group.name!r})") from None
            attempt.pieces[upload] = {name: dict(enumerate(chunks)) for name, chunks in received.items()}

    def commit(self, key: AttemptKey, upload: int, weight: int) -> None:
        """Add a checked update, whose sums the intake has found room for. Said again, nothing is added."""
        with self._lock:
            attempt = self._of(key, "commit")
            if upload in attempt.ended:
                return
            groups = attempt.share.groups
            if not attempt.sums:
                attempt.sums = {group.name: buffers.zeros(group.shape, np.int64) for group in groups}
            received = {name: list(chunks.values()) for name, chunks in attempt.pieces.pop(upload).items()}
            attempt.ended.add(upload)
            attempt.seal_id = ""
            for group in filter(_has_values, groups):
                encoding, sums = encoding_of(attempt.share.encoding, group), attempt.sums[group.name]
                if not encoding.fold(sums, group, received, group.multiplier(weight)):
                    raise InvalidTransition("shard", "checked", "commit")  # checked values fold
            attempt.weight += weight
            attempt.num_updates += 1

    def drop(self, key: AttemptKey, upload: int) -> None:
        """Let go of an update that is not added."""
        with self._lock:
            attempt = self._attempts.get(key)
            if attempt is not None:
                attempt.pieces.pop(upload, None)
                attempt.ended.add(upload)

    def freeze(self, key: AttemptKey, seal_id: str) -> tuple[int, int]:
        """Let the sums be read for a seal; weight and number of the updates in them."""
        with self._lock:
            attempt = self._of(key, "freeze")
            attempt.seal_id = seal_id
            return attempt.weight, attempt.num_updates

    def block(self, key: AttemptKey, seal_id: str, group: str, start: int, stop: int) -> Int64Array:
        """Sums of some values of its range of a group: shape ``(n,)``, or ``(2, n)`` of a wide one.

        Raises:
            StorageError: They are not those of this seal.
        """
        with self._lock:
            attempt = self._attempts.get(key)
            if attempt is None or attempt.seal_id != seal_id or not attempt.sums:
                raise StorageError(f"the sums of {key} for seal {seal_id} are not here any more")
            return attempt.sums[group][..., start:stop]

    def close(self, key: AttemptKey) -> None:
        """The attempt is over: nothing of it is kept."""
        with self._lock:
            self._attempts.pop(key, None)

    def _of(self, key: AttemptKey, event: str) -> _Attempt:
        attempt = self._attempts.get(key)
        if attempt is None:
            raise InvalidTransition("shard", "no such attempt", event)
        return attempt


def _has_values(group: ColumnGroup) -> bool:
    return group.num_values > 0


def _received(attempt: _Attempt, upload: int, sizes: Mapping[str, int]) -> Received:
    """The pieces of an upload in their order, without a gap; none for a vector of which this shard got nothing."""
    pieces = attempt.pieces.get(upload, {})
    received: dict[str, Sequence[np.ndarray]] = {}
    for vector, size in sizes.items():
        chunks, end = [], 0
        for offset, values in sorted(pieces.get(vector, {}).items()):
            if offset != end:
                break
            chunks.append(values)
            end += values.size
        if end != size:
            raise TransferIncomplete(f"an update's {vector!r} has {end} of {size} entries at one shard")
        received[vector] = chunks
    return received
