"""Kernels of the packed form of sums (``hierfl/packing.py``), each beside its NumPy oracle: the same bits in both.

They work on whole blocks of ``BLOCK`` values. A block's values are ``reference + bits``, modulo 2**64, with as many
bits each as the block is wide. It is laid out in ``LANES`` lanes of ``ROWS`` values: value ``i`` is row ``i // LANES``
of lane ``i % LANES``; a lane's rows follow each other bit by bit, from the lowest, through ``width`` words of 64 bits,
and word ``k`` of all lanes stands before word ``k + 1``. Neighbours thus have the same shifts, so that compilers make
vector instructions of the inner loops (measured on 25 million values: 38 ms to pack, 16 ms to unpack and add, where
copying them takes 22 ms).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hierfl.kernels_build import Form, build
from hierfl.types import Int64Array

__all__ = ["BLOCK", "LANES", "MAX_WIDTH", "NUMPY", "ROWS", "PackingKernels", "active", "compiled", "warm_up"]

UInt64Array = npt.NDArray[np.uint64]
UInt8Array = npt.NDArray[np.uint8]

LANES = 16
ROWS = 64
BLOCK = LANES * ROWS
"""Values of a block."""
MAX_WIDTH = 64


class PackingKernels(NamedTuple):
    """One form of all kernels, over ``n`` whole blocks: ``references`` (int64), ``widths`` (uint8, at most
    ``MAX_WIDTH``) of shape ``(n,)``; ``values`` and ``sums`` of shape ``(n * BLOCK,)``; ``words`` (uint64) with
    ``LANES * width`` words a block, one after the other.

    ``measure(values, references, widths)``: write each block's least value and the bits that its spread needs.

    ``pack(values, references, widths, words)``: write the words; returns their number.

    ``add(words, references, widths, sums)``: ``sums += values``, modulo 2**64; returns the words read.

    ``add_low(words, references, widths, high, low)``: the same into the lower halves of 128-bit sums, each carry
    into the upper one.

    ``add`` and ``add_low`` read no word that is not there: where ``words`` is too short, or a width above
    ``MAX_WIDTH``, they stop before that block.
    """

    measure: Callable[[Int64Array, Int64Array, UInt8Array], int]
    pack: Callable[[Int64Array, Int64Array, UInt8Array, UInt64Array], int]
    add: Callable[[UInt64Array, Int64Array, UInt8Array, Int64Array], int]
    add_low: Callable[[UInt64Array, Int64Array, UInt8Array, Int64Array, UInt64Array], int]


# --- NumPy: all blocks of one width at a time, row by row ---------------------------------------------------


def _measure_numpy(values: Int64Array, references: Int64Array, widths: UInt8Array) -> int:
    blocks = values.reshape(-1, BLOCK)
    references[:] = blocks.min(axis=1)
    spread = blocks.max(axis=1).view(np.uint64) - references.view(np.uint64)
    widths[:] = [int(most).bit_length() for most in spread]
    return len(references)


def _by_width(widths: UInt8Array) -> Iterator[tuple[int, Int64Array, Int64Array]]:
    """Each width, the blocks that have it, and the place of each of their words."""
    needed = widths.astype(np.int64) * LANES
    starts = np.cumsum(needed) - needed
    for width in np.unique(widths):
        blocks = np.flatnonzero(widths == width)
        places = starts[blocks][:, None] + np.arange(LANES * int(width))
        yield int(width), blocks, places.reshape(len(blocks), int(width), LANES)


def _pack_numpy(values: Int64Array, references: Int64Array, widths: UInt8Array, words: UInt64Array) -> int:
    source, bases = values.view(np.uint64).reshape(-1, ROWS, LANES), references.view(np.uint64)
    for width, blocks, places in _by_width(widths):
        bits = source[blocks] - bases[blocks][:, None, None]
        packed = np.zeros((len(blocks), width, LANES), np.uint64)
        for row in range(ROWS if width else 0):
            word, shift = divmod(row * width, 64)
            packed[:, word] |= bits[:, row] << np.uint64(shift)
            if shift + width > 64:
                packed[:, word + 1] |= bits[:, row] >> np.uint64(64 - shift)
        words[places] = packed
    return LANES * int(widths.sum(dtype=np.int64))


def _unpack_numpy(words: UInt64Array, references: Int64Array, widths: UInt8Array) -> UInt64Array:
    values, bases = np.empty((len(references), ROWS, LANES), np.uint64), references.view(np.uint64)
    for width, blocks, places in _by_width(widths):
        packed, bits = words[places], np.zeros((len(blocks), ROWS, LANES), np.uint64)
        mask = np.uint64(2**width - 1)
        for row in range(ROWS if width else 0):
            word, shift = divmod(row * width, 64)
            bits[:, row] = packed[:, word] >> np.uint64(shift)
            if shift + width > 64:
                bits[:, row] |= packed[:, word + 1] << np.uint64(64 - shift)
            bits[:, row] &= mask
        values[blocks] = bits + bases[blocks][:, None, None]
    return values.reshape(-1)


def _readable(words: UInt64Array, widths: UInt8Array) -> tuple[int, int]:
    """How many blocks can be read, and how many words these have."""
    ends = np.cumsum(widths.astype(np.int64) * LANES)
    bad = (ends > words.size) | (widths > MAX_WIDTH)
    blocks = int(np.argmax(bad)) if bad.any() else len(widths)
    return blocks, int(ends[blocks - 1]) if blocks else 0


def _add_numpy(words: UInt64Array, references: Int64Array, widths: UInt8Array, sums: Int64Array) -> int:
    blocks, read = _readable(words, widths)
    target = sums.view(np.uint64)[: blocks * BLOCK]
    target += _unpack_numpy(words, references[:blocks], widths[:blocks])
    return read


def _add_low_numpy(
    words: UInt64Array, references: Int64Array, widths: UInt8Array, high: Int64Array, low: UInt64Array
) -> int:
    blocks, read = _readable(words, widths)
    added = _unpack_numpy(words, references[:blocks], widths[:blocks])
    target = low[: blocks * BLOCK]
    target += added
    high[: blocks * BLOCK] += target < added
    return read


# --- Compiled: block by block, row by row ------------------------------------------------------------------


def _measure(values: Int64Array, references: Int64Array, widths: UInt8Array) -> int:
    for block in range(len(references)):
        part = values[block * BLOCK : block * BLOCK + BLOCK]
        least, most = part[0], part[0]
        for i in range(len(part)):
            least, most = min(least, part[i]), max(most, part[i])
        spread, width = np.uint64(most) - np.uint64(least), 0
        while spread:
            spread >>= np.uint64(1)
            width += 1
        references[block], widths[block] = least, width
    return len(references)


def _pack(values: Int64Array, references: Int64Array, widths: UInt8Array, words: UInt64Array) -> int:
    at = 0
    for block in range(len(references)):
        width, base = int(widths[block]), np.uint64(references[block])
        packed = words[at : at + LANES * width]
        at += LANES * width
        for i in range(len(packed)):
            packed[i] = 0
        if width == 0:
            continue
        for row in range(ROWS):
            bit = row * width
            start, shift = (bit >> 6) * LANES, np.uint64(bit & 63)
            source = values[block * BLOCK + row * LANES : block * BLOCK + row * LANES + LANES]
            lower = packed[start : start + LANES]
            for i in range(len(lower)):
                lower[i] |= (np.uint64(source[i]) - base) << shift
            if (bit & 63) + width > 64:
                upper, back = packed[start + LANES : start + 2 * LANES], np.uint64(64) - shift
                for i in range(len(upper)):
                    upper[i] = (np.uint64(source[i]) - base) >> back
    return at


def _add(words: UInt64Array, references: Int64Array, widths: UInt8Array, sums: Int64Array) -> int:
    at = 0
    for block in range(len(references)):
        width, base = int(widths[block]), np.uint64(references[block])
        if width > MAX_WIDTH or at + LANES * width > len(words):
            return at
        packed = words[at : at + LANES * width]
        at += LANES * width
        target = sums[block * BLOCK : block * BLOCK + BLOCK]
        if width == 0:
            for i in range(len(target)):
                target[i] += np.int64(base)
            continue
        mask = ~np.uint64(0) >> np.uint64(64 - width)
        for row in range(ROWS):
            bit = row * width
            start, shift = (bit >> 6) * LANES, np.uint64(bit & 63)
            part, lower = target[row * LANES : row * LANES + LANES], packed[start : start + LANES]
            if (bit & 63) + width > 64:
                upper, back = packed[start + LANES : start + 2 * LANES], np.uint64(64) - shift
                for i in range(len(lower)):
                    part[i] += np.int64((((lower[i] >> shift) | (upper[i] << back)) & mask) + base)
            else:
                for i in range(len(lower)):
                    part[i] += np.int64(((lower[i] >> shift) & mask) + base)
    return at


def _add_low(words: UInt64Array, references: Int64Array, widths: UInt8Array, high: Int64Array, low: UInt64Array) -> int:
    at, values = 0, np.empty(BLOCK, np.int64)
    for block in range(len(references)):
        width, base = int(widths[block]), np.uint64(references[block])
        if width > MAX_WIDTH or at + LANES * width > len(words):
            return at
        packed = words[at : at + LANES * width]
        at += LANES * width
        for i in range(len(values)):
            values[i] = np.int64(base)
        if width > 0:
            mask = ~np.uint64(0) >> np.uint64(64 - width)
            for row in range(ROWS):
                bit = row * width
                start, shift = (bit >> 6) * LANES, np.uint64(bit & 63)
                part, lower = values[row * LANES : row * LANES + LANES], packed[start : start + LANES]
                if (bit & 63) + width > 64:
                    upper, back = packed[start + LANES : start + 2 * LANES], np.uint64(64) - shift
                    for i in range(len(lower)):
                        part[i] += np.int64(((lower[i] >> shift) | (upper[i] << back)) & mask)
                else:
                    for i in range(len(lower)):
                        part[i] += np.int64((lower[i] >> shift) & mask)
        upper_half = high[block * BLOCK : block * BLOCK + BLOCK]
        lower_half = low[block * BLOCK : block * BLOCK + BLOCK]
        for i in range(len(values)):
            added = np.uint64(values[i])
            lower_half[i] += added
            upper_half[i] += np.int64(lower_half[i] < added)
    return at


# --- Which form runs ---------------------------------------------------------------------------------------

NUMPY = PackingKernels(_measure_numpy, _pack_numpy, _add_numpy, _add_low_numpy)


def _compiled(types: Any) -> PackingKernels:
    # Received messages and shared memory are read-only, and their values may stand at any address.
    values = types.Array(types.int64, 1, "C", readonly=True, aligned=False)
    received = types.Array(types.uint64, 1, "C", readonly=True, aligned=False)
    blocks = (types.int64[::1], types.uint8[::1])
    sums, words = types.int64[::1], types.uint64[::1]

    return PackingKernels(
        build(_measure, values, *blocks),
        build(_pack, values, *blocks, words),
        build(_add, received, *blocks, sums),
        build(_add_low, received, *blocks, sums, words),
    )


FORM = Form(NUMPY, _compiled)
active, compiled, warm_up = FORM.active, FORM.compiled, FORM.warm_up
