"""bfloat16: the upper half of a float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hierfl import kernels_encodings
from hierfl.columns import ColumnGroup
from hierfl.encodings.base import (
    EvenSplitter,
    Received,
    Splitter,
    WireVector,
    bad_value,
    fold_whole,
    joined,
    placed,
)
from hierfl.types import Float32Array, Int64Array

__all__ = ["BFloat16"]

MAGNITUDE = 0x7FFF


@dataclass(frozen=True, kw_only=True)
class BFloat16:
    """Two bytes a value: ``train``, uint16, the upper 16 bits of the float32, rounded to nearest, ties to even.

    Decoded: the float32 with these upper bits and lower bits of 0, exactly. Error: at most ``2**-8 * |value|``, or
    ``2**-134`` where that is more (8 significant bits, unit roundoff ``2**-8``: Higham 2002, theorem 2.2; Kalamkar
    et al. 2019, arXiv:1905.12322, for the format). A value that would be rounded above the group's limit is cut
    towards 0 instead, within ``2**-7 * |value|``.
    """

    feedback: ClassVar[bool] = False

    def wire_vectors(self, group: ColumnGroup) -> tuple[WireVector, ...]:
        return (WireVector(group.name, "uint16", group.num_values),)

    def values_in_one_piece(self) -> int:
        return 1

    def splitter(self, group: ColumnGroup, starts: Sequence[int]) -> Splitter:
        return EvenSplitter({group.name: 1}, starts)

    def encode(self, group: ColumnGroup, values: Float32Array, seed: int) -> dict[str, np.ndarray]:
        del seed
        bits = np.ascontiguousarray(values).view(np.uint32)
        codes, most = np.empty(bits.size, np.uint16), _limit(group)
        for start in range(0, bits.size, 2**18):
            part = bits[start : start + 2**18]
            even = (part >> np.uint32(16)) & np.uint32(1)
            rounded = ((part + np.uint32(MAGNITUDE) + even) >> np.uint32(16)).astype(np.uint16)
            cut = (part >> np.uint32(16)).astype(np.uint16)
            codes[start : start + 2**18] = np.where((rounded & MAGNITUDE) > most, cut, rounded)
        return {group.name: codes}

    def check(self, group: ColumnGroup, received: Received) -> None:
        for offset, codes in placed(received[group.name]):
            bad = np.flatnonzero((codes & MAGNITUDE) > _limit(group))
            if bad.size:
                value = _widened(codes[bad[:1]])[0]
                rule = f"must be finite and at most {group.max_abs:g} in magnitude"
                raise bad_value(group.name, offset + int(bad[0]), value, rule)

    def decode(self, group: ColumnGroup, received: Received) -> Float32Array:
        return _widened(joined(received[group.name], "uint16"))

    def fold(self, sums: Int64Array, group: ColumnGroup, received: Received, multiplier: int) -> bool:
        form, scale = kernels_encodings.active(), float(2**group.s)

        def fold(offset: int, codes: np.ndarray, by: int) -> int:
            return form.fold_bfloat16(sums[offset : offset + codes.size], codes, group.limit, scale, by)

        return fold_whole(fold, received[group.name], multiplier)


def _limit(group: ColumnGroup) -> np.uint16:
    """Code of the largest bfloat16 within the group: magnitudes compare as their codes do, infinity and NaN above."""
    return np.uint16(group.limit.view(np.uint32) >> np.uint32(16))


def _widened(codes: npt.NDArray[np.uint16]) -> Float32Array:
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
