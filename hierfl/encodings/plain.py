"""float32: values as they are. What every vector has that no encoding is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from hierfl import kernels
from hierfl.columns import ColumnGroup, GroupKind, check_values
from hierfl.encodings.base import EvenSplitter, Received, Splitter, WireVector, fold_whole, joined, placed
from hierfl.errors import ValueOutOfRange
from hierfl.types import Float32Array, Int64Array

__all__ = ["PLAIN", "Float32"]


@dataclass(frozen=True, kw_only=True)
class Float32:
    """Four bytes a value, and no error: decoded values are the values."""

    feedback: ClassVar[bool] = False

    def wire_vectors(self, group: ColumnGroup) -> tuple[WireVector, ...]:
        return (WireVector(group.name, "float32", group.num_values),)

    def values_in_one_piece(self) -> int:
        return 1

    def splitter(self, group: ColumnGroup, starts: Sequence[int]) -> Splitter:
        return EvenSplitter({group.name: 1}, starts)

    def encode(self, group: ColumnGroup, values: Float32Array, seed: int) -> dict[str, np.ndarray]:
        del seed
        return {group.name: values}

    def check(self, group: ColumnGroup, received: Received) -> None:
        for offset, chunk in placed(received[group.name]):
            check_values(group, chunk, offset)

    def decode(self, group: ColumnGroup, received: Received) -> Float32Array:
        return joined(received[group.name], "float32")

    def fold(self, sums: Int64Array, group: ColumnGroup, received: Received, multiplier: int) -> bool:
        chunks = received[group.name]
        if group.kind is GroupKind.COUNT and not _are_whole(group, chunks):
            return False  # the kernel does not look for fractions
        fold = _fold_wide if group.kind is GroupKind.WIDE else _fold_fixed
        return fold_whole(partial(fold, sums, group), chunks, multiplier)


PLAIN = Float32()


def _are_whole(group: ColumnGroup, chunks: Sequence[np.ndarray]) -> bool:
    try:
        for chunk in chunks:
            check_values(group, chunk)
    except ValueOutOfRange:
        return False
    return True


def _fold_fixed(sums: Int64Array, group: ColumnGroup, offset: int, chunk: np.ndarray, multiplier: int) -> int:
    part = sums[offset : offset + chunk.size]
    return kernels.active().fold_fixed(part, chunk, group.limit, float(2**group.s), multiplier)


def _fold_wide(sums: Int64Array, group: ColumnGroup, offset: int, chunk: np.ndarray, multiplier: int) -> int:
    stop = offset + chunk.size
    high, low = sums[0, offset:stop], sums[1, offset:stop].view(np.uint64)
    return kernels.active().fold_wide(high, low, chunk, group.limit, float(2**group.s), multiplier)
