"""int8: whole numbers from -127 to 127, with a step for each block of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hierfl import kernels_encodings
from hierfl.columns import ColumnGroup
from hierfl.encodings.base import (
    EvenSplitter,
    Received,
    Splitter,
    WireVector,
    bad_value,
    fold_whole,
    generator,
    joined,
    placed,
)
from hierfl.errors import ConfigError
from hierfl.types import Float32Array, Int64Array

__all__ = ["Int8"]

LARGEST = np.float32(127)
NEVER = -128
"""The one code that is refused: its value could be above the group's limit."""
PART = 2**18
"""Values encoded at a time: a multiple of every block."""
ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True, kw_only=True)
class Int8:
    """One byte a value and four a block: ``train.scale``, float32, a step for each block; then ``train``, int8.

    Decoded: ``code * step`` in float32, rounded once. The step is the block's largest magnitude over 127. Error, in
    steps: with ``nearest`` at most 1/2, with ``stochastic`` below 1, and ``2**-16`` of one for the roundings of step
    and product; ``2**-119`` at most in a block that is all smaller than that, whose step is sent as 0. Stochastic
    rounding is unbiased: the decoded value's mean over seeds is the value, up to these roundings.

    Source: Alistarh et al. 2017 (QSGD, arXiv:1610.02132), with the largest magnitude for the norm; blocks as in
    Dettmers et al. 2022 (arXiv:2110.02861).
    """

    feedback: ClassVar[bool] = False

    block: int = 256
    """Values that share a step: a power of two."""
    rounding: str = "nearest"
    """``nearest`` (ties to even: the least error) or ``stochastic`` (up or down at random: no bias)."""

    def __post_init__(self) -> None:
        block, rounding = self.block, self.rounding
        is_whole = isinstance(block, int) and not isinstance(block, bool)
        if not is_whole or not 16 <= block <= 65_536 or block & (block - 1):
            raise ConfigError("updates.block", block, "must be a power of two from 16 to 65536")
        if rounding not in ROUNDINGS:
            raise ConfigError("updates.rounding", rounding, f"must be {' or '.join(map(repr, ROUNDINGS))}")

    def wire_vectors(self, group: ColumnGroup) -> tuple[WireVector, ...]:
        num_blocks = -(-group.num_values // self.block)
        return (
            WireVector(_scale(group), "float32", num_blocks),
            WireVector(group.name, "int8", group.num_values),
        )

    def values_in_one_piece(self) -> int:
        return self.block

    def splitter(self, group: ColumnGroup, starts: Sequence[int]) -> Splitter:
        return EvenSplitter({_scale(group): self.block, group.name: 1}, starts)

    def encode(self, group: ColumnGroup, values: Float32Array, seed: int) -> dict[str, np.ndarray]:
        draws = generator(seed, group) if self.rounding == "stochastic" else None
        steps = np.empty(-(-values.size // self.block), np.float32)
        codes = np.empty(values.size, np.int8)
        for start in range(0, values.size, PART):
            part = values[start : start + PART]
            first, count = start // self.block, -(-part.size // self.block)
            rows = np.zeros((count, self.block), np.float32)
            rows.reshape(-1)[: part.size] = part
            steps[first : first + count] = step = _steps(rows, group.limit)
            codes[start : start + part.size] = _codes(rows, step, draws).reshape(-1)[: part.size]
        return {_scale(group): steps, group.name: codes}

    def check(self, group: ColumnGroup, received: Received) -> None:
        steps = joined(received[_scale(group)], "float32")
        bad = np.flatnonzero(~_fit(steps, group))
        if bad.size:
            rule = f"must be finite, not negative, and {group.max_abs:g} / 127 at most"
            raise bad_value(_scale(group), int(bad[0]), steps[bad[0]], rule)
        for offset, codes in placed(received[group.name]):
            bad = np.flatnonzero(codes == NEVER)
            if bad.size:
                raise bad_value(group.name, offset + int(bad[0]), NEVER, "must be from -127 to 127")

    def decode(self, group: ColumnGroup, received: Received) -> Float32Array:
        values = joined(received[group.name], "int8").astype(np.float32)
        values *= np.repeat(joined(received[_scale(group)], "float32"), self.block)[: values.size]
        return values

    def fold(self, sums: Int64Array, group: ColumnGroup, received: Received, multiplier: int) -> bool:
        steps = np.ascontiguousarray(joined(received[_scale(group)], "float32"))
        if not _fit(steps, group).all():
            return False
        form, scale = kernels_encodings.active(), float(2**group.s)

        def fold(offset: int, codes: np.ndarray, by: int) -> int:
            part = sums[offset : offset + codes.size]
            return form.fold_int8(part, codes, steps, offset, self.block, group.limit, scale, by)

        return fold_whole(fold, received[group.name], multiplier)


def _scale(group: ColumnGroup) -> str:
    return f"{group.name}.scale"


def _fit(steps: Float32Array, group: ColumnGroup) -> np.ndarray:
    """Whether the largest code of each block is within the group's limit; no step that is NaN is."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (steps >= 0) & (LARGEST * steps <= group.limit)


def _steps(rows: Float32Array, limit: np.float32) -> Float32Array:
    """Per row its largest magnitude over 127, rounded up: no code is above 127. But down at the group's limit."""
    most = np.abs(rows).max(axis=1).astype(np.float64)
    steps: Float32Array = (most / 127).astype(np.float32)
    short = steps.astype(np.float64) * 127 < most
    steps[short] = np.nextafter(steps[short], np.float32(np.inf))
    over = LARGEST * steps > limit
    steps[over] = np.nextafter(steps[over], np.float32(0))
    steps[most < 2.0**-119] = 0  # so small a step would itself have few bits
    return steps


def _codes(rows: Float32Array, steps: Float32Array, draws: np.random.Generator | None) -> np.ndarray:
    wide = steps.astype(np.float64)[:, None]
    ratios = np.divide(rows, wide, out=np.zeros(rows.shape), where=wide > 0)
    if draws is None:
        np.rint(ratios, out=ratios)
    else:
        ratios += draws.random(ratios.shape)
        np.floor(ratios, out=ratios)
    return np.clip(ratios, -127, 127, out=ratios).astype(np.int8)
