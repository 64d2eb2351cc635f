"""Sums without loss in fewer bits: blocks of 1,024 values, each with a reference and a common width.

All integers of a partial stand in one row of **blocks**: group after group, a wide group's high halves before its low
ones, each of these columns cut into blocks of its own. A block has a ``width`` (uint8, 0 to 64), a ``reference`` (its
least value, int64) and ``LANES * width`` words of bits, laid out as ``hierfl/kernels_packing.py`` says; a column's last
block may hold fewer values and has the words that these reach. Widths and references come before all words, so that
words can be unpacked as they arrive, and sums be refused before a word of them is there.

Seen on normal sums: 1.0 to 1.4 bits above their entropy, of which 0.07 are widths and references. A block's own least
value as reference takes as many bits as a sign where values scatter around zero, and 0.4 fewer where layers do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hierfl import kernels_packing as kernels
from hierfl import parallel, rounding
from hierfl.columns import MAX_SUM, ColumnGroup, GroupKind
from hierfl.errors import LayoutMismatch, ValueOutOfRange
from hierfl.kernels_packing import BLOCK, LANES, MAX_WIDTH, UInt8Array, UInt64Array
from hierfl.types import Int64Array

__all__ = [
    "Blocks",
    "Column",
    "PackedSums",
    "Span",
    "WordReader",
    "columns_of",
    "max_words",
    "measure",
    "most_bytes",
    "num_blocks",
    "pack",
    "values_of",
]

SPAN_BLOCKS = 256
"""Most blocks of a span: 2 MiB of sums, so that threads can share the work and a check needs little memory."""

_NOTHING = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Column:
    """One row of 64-bit integers: a group's sums, or the high (``half`` 0) or low (1) halves of a wide group's."""

    group: ColumnGroup
    half: int
    first: int
    """Its first block."""

    @property
    def num_blocks(self) -> int:
        return -(-self.group.num_values // BLOCK)

    def values(self, sums: Int64Array) -> Int64Array:
        """The column in the group's sums, shape ``(n,)``: a view."""
        return sums[self.half] if self.group.kind is GroupKind.WIDE else sums


def columns_of(groups: Iterable[ColumnGroup]) -> tuple[Column, ...]:
    """The columns of these groups' sums, in their order."""
    columns: list[Column] = []
    for group in groups:
        for half in range(2 if group.kind is GroupKind.WIDE else 1):
            columns.append(Column(group, half, num_blocks(columns)))
    return tuple(columns)


def num_blocks(columns: Sequence[Column]) -> int:
    """Blocks of all columns."""
    return columns[-1].first + columns[-1].num_blocks if columns else 0


def max_words(columns: Iterable[Column]) -> int:
    """Words that the columns have where every block is ``MAX_WIDTH`` wide: at most their values, in whole rows."""
    return sum(-(-column.group.num_values // LANES) * LANES for column in columns)


def most_bytes(groups: Iterable[ColumnGroup], weight: int, drop_bits: int = 0) -> int:
    """The most that sums of updates of so much ``weight`` can take, whatever they are: widths, references, words.

    ``drop_bits``: how far they are rounded (``hierfl/rounding.py``).
    """
    columns, widths = columns_of(groups), []
    for column in columns:
        bound = rounding.largest_sum(column.group, weight, drop_bits)
        if column.group.kind is GroupKind.WIDE:
            bound = bound >> 64 if column.half == 0 else MAX_SUM
        widths.append(np.full(column.num_blocks, min((2 * bound + 1).bit_length(), MAX_WIDTH), np.uint8))
    blocks = Blocks(columns, np.zeros(num_blocks(columns), np.int64), np.concatenate([np.empty(0, np.uint8), *widths]))
    return 8 * blocks.num_words + 9 * blocks.widths.size


@dataclass(frozen=True)
class Blocks:
    """Widths and references of all blocks: what tells where words belong, and between what bounds values are."""

    columns: tuple[Column, ...]
    references: Int64Array
    widths: UInt8Array

    def __post_init__(self) -> None:
        expected = (num_blocks(self.columns),)
        if self.references.shape != expected or self.widths.shape != expected:
            raise LayoutMismatch(f"packed sums have {self.widths.size} blocks, their groups {expected[0]}")
        if self.widths.size and int(self.widths.max()) > MAX_WIDTH:
            raise ValueOutOfRange(f"a block of packed sums is {self.widths.max()} bits wide, more than {MAX_WIDTH}")

    @cached_property
    def ends(self) -> Int64Array:
        """Words up to the end of each block."""
        rows = np.full(self.widths.size, BLOCK // LANES, np.int64)
        for column in self.columns:
            if rest := column.group.num_values % BLOCK:
                rows[column.first + column.num_blocks - 1] = -(-rest // LANES)
        needed: Int64Array = np.cumsum(-(-rows * self.widths // 64) * LANES)
        return needed

    @property
    def num_words(self) -> int:
        return int(self.ends[-1]) if self.ends.size else 0

    def start(self, block: int) -> int:
        """Words before a block."""
        return int(self.ends[block - 1]) if block else 0

    def column_of(self, block: int) -> Column:
        return next(column for column in self.columns if block < column.first + column.num_blocks)

    def beyond(self, column: Column, least: int, most: int) -> np.ndarray:
        """Which of a column's blocks could hold values outside ``least`` to ``most``: told without its words."""
        part = slice(column.first, column.first + column.num_blocks)
        references, widths = self.references[part], self.widths[part]
        if least > most:
            return np.ones(references.size, np.bool_)
        spread = np.where(widths == 0, np.uint64(0), ~np.uint64(0) >> (np.uint64(64) - np.maximum(widths, 1)))
        room = np.uint64(most & (2**64 - 1)) - references.view(np.uint64)  # right where it is used: at most ``most``
        inside: np.ndarray = (references >= least) & (references <= most) & (spread <= room)
        return ~inside


@dataclass(frozen=True)
class Span:
    """Blocks of one column that follow each other, with exactly their words."""

    column: Column
    first: int
    """Among all blocks."""
    count: int
    words: UInt64Array

    @property
    def part(self) -> slice:
        """Its values in the column."""
        start = (self.first - self.column.first) * BLOCK
        return slice(start, min(start + self.count * BLOCK, self.column.group.num_values))


class WordReader:
    """Finds the blocks in words that come in pieces, whose ends may be anywhere: views on the pieces, but for a block
    that lies across two. The first piece may be empty: blocks of width 0 have no words.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks, self._next, self._seen, self._kept = blocks, 0, 0, _NOTHING

    def feed(self, words: UInt64Array) -> list[Span]:
        """The blocks that are whole with these words, in spans of at most ``SPAN_BLOCKS``."""
        spans, ends = [], self._blocks.ends
        self._seen += words.size
        if self._kept.size:
            missing = int(ends[self._next]) - self._blocks.start(self._next) - self._kept.size
            self._kept, words = np.concatenate([self._kept, words[:missing]]), words[missing:]
            if self._seen < int(ends[self._next]):
                return []
            spans = self._cut(self._next + 1, self._kept)
        until = int(np.searchsorted(ends, self._seen, side="right"))
        self._kept = words[self._blocks.start(until) - self._blocks.start(self._next) :]
        return spans + self._cut(until, words)

    def _cut(self, until: int, words: UInt64Array) -> list[Span]:
        """Blocks from the next one ``until``, whose words these begin with."""
        spans, base = [], self._blocks.start(self._next)
        while self._next < until:
            first, column = self._next, self._blocks.column_of(self._next)
            self._next = min(until, first + SPAN_BLOCKS, column.first + column.num_blocks)
            piece = words[self._blocks.start(first) - base : self._blocks.start(self._next) - base]
            spans.append(Span(column, first, self._next - first, piece))
        return spans


@dataclass(frozen=True)
class PackedSums:
    """Blocks and all their words, in pieces of any length."""

    blocks: Blocks
    words: Sequence[UInt64Array]

    def spans(self) -> Iterator[Span]:
        reader = WordReader(self.blocks)
        for piece in (_NOTHING, *self.words):
            yield from reader.feed(piece)

    def add_into(self, sums: Mapping[str, Int64Array]) -> None:
        """``sums += self``, modulo 2**64 or 2**128: each span goes to values of its own, so threads share them."""
        for half in (0, 1):  # those of a wide group meet in the carry: not at once
            spans = [span for span in self.spans() if span.column.half == half]
            parallel.each(lambda span: add(self.blocks, span, sums), spans)


def add(blocks: Blocks, span: Span, sums: Mapping[str, Int64Array]) -> None:
    """Add a span's values to the sums that they belong to, arrays of their groups' shapes."""
    column, target = span.column, sums[span.column.group.name]
    rows = target if column.half else column.values(target)[None]  # the low halves carry into the high ones
    _add_to(blocks, span, rows[:, span.part])


def values_of(blocks: Blocks, span: Span) -> Int64Array:
    """A span's values alone, shape ``(n,)``."""
    part = span.part
    values = np.zeros((1, part.stop - part.start), np.int64)
    _add_to(blocks, span, values)
    only: Int64Array = values[0]
    return only


def _add_to(blocks: Blocks, span: Span, rows: Int64Array) -> None:
    """Add to one row of 64-bit sums, or to two that are halves of 128 bits."""
    whole = rows.shape[1] // BLOCK
    middle = span.first + whole
    end = blocks.start(middle) - blocks.start(span.first)
    _run(blocks, slice(span.first, middle), span.words[:end], rows[:, : whole * BLOCK])
    rest = rows.shape[1] - whole * BLOCK
    if rest:  # the last block of a column, as if it were whole
        padded, words = np.zeros((len(rows), BLOCK), np.int64), np.zeros(LANES * MAX_WIDTH, np.uint64)
        padded[:, :rest] = rows[:, whole * BLOCK :]
        words[: span.words.size - end] = span.words[end:]
        _run(blocks, slice(middle, middle + 1), words, padded)
        rows[:, whole * BLOCK :] = padded[:, :rest]


def _run(blocks: Blocks, part: slice, words: UInt64Array, rows: Int64Array) -> None:
    described = (blocks.references[part], blocks.widths[part])
    if len(rows) == 2:
        kernels.active().add_low(words, *described, rows[0], rows[1].view(np.uint64))
    else:
        kernels.active().add(words, *described, rows[0])


# ---------------------------------------------------------------- packing


def measure(groups: Iterable[ColumnGroup], sums: Mapping[str, Int64Array]) -> Blocks:
    """Widths and references of some groups' sums: one pass over them."""
    columns = columns_of(groups)
    references, widths = np.empty(num_blocks(columns), np.int64), np.empty(num_blocks(columns), np.uint8)
    for column in columns:
        values, first = column.values(sums[column.group.name]), column.first
        whole = values.size // BLOCK
        parts = [(first, whole, values[: whole * BLOCK])]
        if values.size % BLOCK:
            parts.append((first + whole, 1, _padded(values[whole * BLOCK :])))
        for start, count, part in parts:
            kernels.active().measure(part, references[start : start + count], widths[start : start + count])
    return Blocks(columns, references, widths)


def _padded(values: Int64Array) -> Int64Array:
    """A whole block with the least value behind ``values``: bits of 0, that make it no wider."""
    block = np.full(BLOCK, values.min(), np.int64)
    block[: values.size] = values
    return block


def pack(blocks: Blocks, sums: Mapping[str, Int64Array], piece_words: int) -> Iterator[UInt64Array]:
    """The words in pieces of ``piece_words``, the last one shorter; good until the next is asked for.

    Holds no more of them than one piece: the words of a large model are never in memory because of this.
    """
    buffer, filled = np.empty(piece_words + LANES * MAX_WIDTH, np.uint64), 0
    for column in blocks.columns:
        values, block, end = column.values(sums[column.group.name]), column.first, column.first + column.num_blocks
        while block < end:
            room = blocks.start(block) + piece_words - filled
            until = min(int(np.searchsorted(blocks.ends, room)) + 1, end)  # up to the one that fills the piece
            filled += _pack_some(blocks, Span(column, block, until - block, buffer[filled:]), values)
            block = until
            while filled >= piece_words:
                yield buffer[:piece_words]
                filled -= piece_words
                buffer[:filled] = buffer[piece_words : piece_words + filled]
    if filled:
        yield buffer[:filled]


def _pack_some(blocks: Blocks, span: Span, values: Int64Array) -> int:
    """Write a span's words; returns their number."""
    part, kernel = span.part, kernels.active().pack
    whole = (part.stop - part.start) // BLOCK
    middle = span.first + whole
    described = slice(span.first, middle)
    inner = values[part.start : part.start + whole * BLOCK]
    done = kernel(inner, blocks.references[described], blocks.widths[described], span.words)
    if middle < span.first + span.count:
        last, words = slice(middle, middle + 1), np.empty(LANES * MAX_WIDTH, np.uint64)
        kernel(
            _padded(values[part.start + whole * BLOCK : part.stop]), blocks.references[last], blocks.widths[last], words
        )
        size = int(blocks.ends[middle]) - blocks.start(middle)
        span.words[done : done + size] = words[:size]
        done += size
    return done
