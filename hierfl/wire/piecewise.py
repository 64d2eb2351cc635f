"""A partial that is packed piece by piece, in order: its 64-bit sums are never all in one place.

What comes of it is what ``outgoing_partial`` makes of the whole sums, bit for bit, since blocks are packed each for
itself and a piece is of whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from hierfl import packing
from hierfl.aggregation import ColumnGroup, check_counts
from hierfl.columns import GroupKind
from hierfl.errors import LayoutMismatch
from hierfl.kernels_packing import BLOCK
from hierfl.packing import Blocks, PackedSums, columns_of
from hierfl.types import Int64Array
from hierfl.wire import arrow
from hierfl.wire.packed import NO_WORDS, BoundsCheck

__all__ = ["PackedPartial", "Packer", "pieces"]

CHUNK_WORDS = arrow.values_per_chunk("uint64")


@dataclass(frozen=True, eq=False)
class PackedPartial:
    """Exact sums in packed form, and what they are of: a ``PartialAggregate`` whose values are not looked at."""

    groups: tuple[ColumnGroup, ...]
    packed: PackedSums
    weight: int
    num_sites: int
    num_updates: int
    metrics: Mapping[str, int]

    def check_bounds(self, max_weight: int) -> None:
        """As ``PartialAggregate.check_bounds``."""
        check_counts(self.num_sites, self.num_updates, self.weight, max_weight)
        check = BoundsCheck(self.packed.blocks, self.weight, self.num_updates)
        for words in (NO_WORDS, *self.packed.words):
            check.feed(words)
        check.finish(self.packed)

    def take_words(self) -> Iterator[np.ndarray]:
        """The words, once: each chunk is let go when the next is asked for."""
        words = self.packed.words
        assert isinstance(words, list), "as a Packer makes them"
        words.reverse()
        while words:
            yield words.pop()


class Packer:
    """Packs sums that come in the order of their groups, a wide group's at once, others' in pieces of whole blocks."""

    def __init__(self, groups: tuple[ColumnGroup, ...]) -> None:
        self._groups = groups
        self._references: list[Int64Array] = []
        self._widths: list[np.ndarray] = []
        self._words: list[np.ndarray] = []
        """Full chunks, but for the last."""
        self._filled = 0

    def add(self, group: ColumnGroup, sums: Int64Array) -> None:
        """Pack the next values of ``group``: shape ``(n,)``, or ``(2, n)`` of a wide one."""
        part = replace(group, num_values=sums.shape[-1])
        blocks = packing.measure((part,), {part.name: sums})
        self._references.append(blocks.references)
        self._widths.append(blocks.widths)
        for words in packing.pack(blocks, {part.name: sums}, CHUNK_WORDS):
            self._append(words)

    def _append(self, words: np.ndarray) -> None:
        while words.size:
            if not self._words or self._filled == CHUNK_WORDS:
                self._words.append(np.empty(CHUNK_WORDS, np.uint64))
                self._filled = 0
            part = words[: CHUNK_WORDS - self._filled]
            self._words[-1][self._filled : self._filled + part.size] = part
            self._filled += part.size
            words = words[part.size :]

    def finish(self) -> PackedSums:
        """All of them. Raises ``LayoutMismatch`` where values are missing."""
        columns = columns_of(self._groups)
        if self._words:
            self._words[-1] = self._words[-1][: self._filled]
        blocks = Blocks(
            columns,
            np.concatenate([np.empty(0, np.int64), *self._references]),
            np.concatenate([np.empty(0, np.uint8), *self._widths]),
        )
        if sum(words.size for words in self._words) != blocks.num_words:
            raise LayoutMismatch("the pieces of packed sums are not those of their groups")
        return PackedSums(blocks, self._words)


def pieces(groups: tuple[ColumnGroup, ...], num_values: int) -> Iterator[tuple[ColumnGroup, int, int]]:
    """Groups in the pieces that a ``Packer`` takes, in its order: (group, start, stop), of about ``num_values``."""
    step = max(num_values // BLOCK, 1) * BLOCK
    for group in groups:
        size = group.num_values if group.kind is GroupKind.WIDE else step
        for start in range(0, group.num_values, max(size, 1)):
            yield group, start, min(start + size, group.num_values)
