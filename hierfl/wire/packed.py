"""Partial aggregates on the wire: the encoding ``packed`` of the sums (``hierfl/packing.py``), three vectors.

    widths      uint8    of all blocks
    references  int64    of all blocks
    words       uint64   of all blocks, one after the other

They come in this order, so that the receiver knows after the first two whether it wants the rest, and where in the
words what stands.

What rounding leaves over in a region (``hierfl/feedback.py``) has the same form, as a transfer of another kind that
stays in its store: nothing that expects a partial takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from hierfl import limbs, packing, rounding
from hierfl.aggregation import ColumnGroup, GroupKind
from hierfl.columns import MAX_SUM
from hierfl.errors import LayoutMismatch, ValueOutOfRange
from hierfl.packing import Blocks, Column, PackedSums, WordReader, columns_of
from hierfl.types import Int64Array
from hierfl.wire import arrow
from hierfl.wire.header import Expect, Kind, VectorSpec
from hierfl.wire.transfer import Incoming, Outgoing

__all__ = [
    "NO_WORDS",
    "PACKED",
    "WORDS",
    "BoundsCheck",
    "blocks_of",
    "expect_partial",
    "expect_residual",
    "most_vectors",
    "outgoing_blocks",
    "outgoing_packed",
    "outgoing_partial",
    "outgoing_residual",
    "packed_sums",
]

PACKED = "packed"
"""Name of the encoding, in plans and descriptors."""

WIDTHS, REFERENCES, WORDS = "widths", "references", "words"
NO_WORDS = np.empty(0, np.uint64)


def _vectors(num_blocks: int, num_words: int) -> tuple[VectorSpec, ...]:
    return (
        VectorSpec(name=WIDTHS, dtype="uint8", num_values=num_blocks),
        VectorSpec(name=REFERENCES, dtype="int64", num_values=num_blocks),
        VectorSpec(name=WORDS, dtype="uint64", num_values=num_words),
    )


# ---------------------------------------------------------------- sending


def outgoing_partial(
    layout_hash: str, groups: tuple[ColumnGroup, ...], sums: Mapping[str, Int64Array], meta: bytes
) -> Outgoing:
    """The sums as a transfer, described now, packed chunk by chunk when it is encoded.

    ``sums`` must not change until it is; each of its group's shape, int64. Beside them there is one encoded copy.
    """
    return outgoing_packed("partial", layout_hash, groups, sums, meta)


def outgoing_residual(
    layout_hash: str, groups: tuple[ColumnGroup, ...], left_over: Mapping[str, Int64Array]
) -> Outgoing:
    """What rounding left over in these groups, as ``outgoing_partial``: to be stored."""
    return outgoing_packed("residual", layout_hash, groups, left_over, b"{}")


def outgoing_packed(
    kind: Kind,
    layout_hash: str,
    groups: tuple[ColumnGroup, ...],
    sums: Mapping[str, Int64Array],
    meta: bytes,
    encoding: str = PACKED,
) -> Outgoing:
    """As ``outgoing_partial``, for whatever is packed like sums."""
    blocks = packing.measure(groups, sums)
    full = arrow.values_per_chunk("uint64")
    return _outgoing(kind, layout_hash, blocks, lambda: packing.pack(blocks, sums, full), meta, encoding)


def outgoing_blocks(
    layout_hash: str, blocks: Blocks, words: Callable[[], Iterator[np.ndarray]], meta: bytes
) -> Outgoing:
    """As ``outgoing_partial`` of sums that are packed: ``words`` in full chunks but for the last, asked for once."""
    return _outgoing("partial", layout_hash, blocks, words, meta, PACKED)


def _outgoing(
    kind: Kind,
    layout_hash: str,
    blocks: Blocks,
    words: Callable[[], Iterator[np.ndarray]],
    meta: bytes,
    encoding: str,
) -> Outgoing:
    vectors = _vectors(blocks.widths.size, blocks.num_words)
    return Outgoing.made(kind, layout_hash, vectors, lambda: _chunks(blocks, words()), meta, encoding)


def _chunks(blocks: Blocks, words: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for table in (blocks.widths, blocks.references):
        full = arrow.values_per_chunk(table.dtype.name)
        for start in range(0, table.size, full):
            yield table[start : start + full]
    yield from words


# ---------------------------------------------------------------- receiving


def expect_partial(
    groups: tuple[ColumnGroup, ...] | None, layout_hash: str | None, digest: str | None, max_bytes: int | None = None
) -> Expect:
    """What is taken of a partial over ``groups``; where these are ``None`` of any, up to ``max_bytes``."""
    if groups is None:
        return Expect("partial", layout_hash, None, max_bytes or 0, digest, encoding=PACKED)
    return _expect("partial", groups, layout_hash, digest)


def expect_residual(groups: tuple[ColumnGroup, ...], layout_hash: str, digest: str) -> Expect:
    """What is taken as left over in ``groups``."""
    return _expect("residual", groups, layout_hash, digest)


def _expect(kind: Kind, groups: tuple[ColumnGroup, ...], layout_hash: str | None, digest: str | None) -> Expect:
    vectors = most_vectors(groups)
    most = sum(spec.length_bytes for spec in vectors)
    return Expect(kind, layout_hash, vectors, most, digest, encoding=PACKED, at_most=True)


def most_vectors(groups: tuple[ColumnGroup, ...]) -> tuple[VectorSpec, ...]:
    """The vectors of sums over ``groups``, with as many words as these can have at most."""
    columns = columns_of(groups)
    return _vectors(packing.num_blocks(columns), packing.max_words(columns))


def blocks_of(incoming: Incoming, groups: tuple[ColumnGroup, ...]) -> Blocks | None:
    """Widths and references of a partial that is arriving, as ``expect_partial`` says; ``None`` until they are there.

    Raises:
        LayoutMismatch: As many blocks as ``groups`` do not have, or as many words as they do not need.
        ValueOutOfRange: A block is too wide.
    """
    described = {spec.name: spec for spec in incoming.descriptor.vectors}
    if any(len(incoming.chunks[name]) < described[name].num_chunks for name in (WIDTHS, REFERENCES)):
        return None
    widths, references = (
        np.concatenate([np.empty(0, dtype), *incoming.chunks[name]])
        for name, dtype in ((WIDTHS, np.uint8), (REFERENCES, np.int64))
    )
    blocks = Blocks(columns_of(groups), references, widths)
    if described[WORDS].num_values != blocks.num_words:
        raise LayoutMismatch(
            f"packed sums of these widths have {blocks.num_words} words, not {described[WORDS].num_values}"
        )
    return blocks


def packed_sums(incoming: Incoming, groups: tuple[ColumnGroup, ...]) -> PackedSums:
    """What a partial that is there holds: views on its frames.

    Raises:
        LayoutMismatch, ValueOutOfRange: As ``blocks_of``.
    """
    blocks = blocks_of(incoming, groups)
    assert blocks is not None, "the transfer is complete"
    return PackedSums(blocks, incoming.chunks[WORDS])


class BoundsCheck:
    """Holds the sums of one partial against what its weight and the plan's caps allow, while they arrive.

    References and widths already bound every value of a block; only blocks that could reach beyond are unpacked, so
    that honest partials cost next to nothing.
    """

    def __init__(self, blocks: Blocks, weight: int, num_updates: int, drop_bits: int = 0) -> None:
        """``feed`` begins with ``NO_WORDS``: blocks that need none are bounded too.

        ``drop_bits``: how far the sums are rounded, which what a region carried over may make a step larger.
        """
        self._blocks, self._reader = blocks, WordReader(blocks)
        self._bounds = {
            column.group.name: rounding.largest_sum(column.group, column.group.total(weight, num_updates), drop_bits)
            for column in blocks.columns
        }
        self._in_doubt = np.zeros(blocks.widths.size, np.bool_)
        for column in blocks.columns:
            part = slice(column.first, column.first + column.num_blocks)
            self._in_doubt[part] = blocks.beyond(column, *self._range(column))

    def _range(self, column: Column) -> tuple[int, int]:
        """Between which a column's 64-bit integers are surely good."""
        bound = self._bounds[column.group.name]
        if column.group.kind is not GroupKind.WIDE:
            return -min(bound, MAX_SUM), min(bound, MAX_SUM)
        if column.half:
            return -MAX_SUM - 1, MAX_SUM  # the high half decides
        return -min(bound >> 64, MAX_SUM), min((bound + 1) >> 64, MAX_SUM) - 1

    def feed(self, words: np.ndarray) -> None:
        """Look at the next words.

        Raises:
            ValueOutOfRange: Names the group with a sum that no updates within the caps can have.
        """
        for span in self._reader.feed(words):
            if span.column.group.kind is not GroupKind.WIDE and self._doubts(span.first, span.count):
                bound, values = self._bounds[span.column.group.name], packing.values_of(self._blocks, span)
                if int(values.min()) < -bound or int(values.max()) > bound:
                    raise _above(span.column.group)

    def _doubts(self, first: int, count: int) -> bool:
        return bool(self._in_doubt[first : first + count].any())

    def finish(self, packed: PackedSums) -> None:
        """Look at the groups of 128-bit sums that are in doubt, whose halves are both there now.

        Raises:
            ValueOutOfRange: As ``feed``.
        """
        doubtful = {c.group.name for c in self._blocks.columns if self._doubts(c.first, c.num_blocks)}
        groups = {c.group.name: c.group for c in self._blocks.columns if c.group.kind is GroupKind.WIDE}
        for name in doubtful & set(groups):
            sums = {name: np.zeros(groups[name].shape, np.int64)}
            for span in packed.spans():
                if span.column.group.name == name:
                    packing.add(self._blocks, span, sums)
            if not limbs.within(sums[name], self._bounds[name]):
                raise _above(groups[name])


def _above(group: ColumnGroup) -> ValueOutOfRange:
    return ValueOutOfRange(f"group {group.name!r} has a sum above what its weight can make")
