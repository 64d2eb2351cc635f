"""Sparse: some values of a vector, each with its index; the client keeps the others for its next update.

On the wire: ``train.index``, uint32, strictly increasing; then ``train``, float32, as many. Which entries are sent is
all that the two kinds differ in. What is left out is kept at the client and added to its next update (error feedback:
Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847), so no value is scaled up, and each is sent in the end.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from hierfl import kernels_encodings
from hierfl.columns import ColumnGroup, check_values
from hierfl.encodings.base import Pieces, Received, Splitter, WireVector, bad_value, cut, generator, placed
from hierfl.errors import ConfigError, ValueOutOfRange
from hierfl.types import Float32Array, Int64Array

__all__ = ["RandomK", "TopK"]

MAX_VALUES = 2**32
"""Values that an index can tell apart."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class _Sparse(Protocol):
    """What both kinds share: all but the choice."""

    feedback: ClassVar[bool] = True

    fraction: float = 0.01
    """Share of the values that are sent. ``k = ceil(fraction * n)`` in float64, 1 at least."""

    def __post_init__(self) -> None:
        if not isinstance(self.fraction, float) or not 0 < self.fraction <= 0.5:
            rule = "must be above 0, at most 0.5: beyond that float32 takes no more bytes, and leaves nothing out"
            raise ConfigError("updates.fraction", self.fraction, rule)

    def k(self, group: ColumnGroup) -> int:
        """Entries that are sent."""
        return min(group.num_values, max(1, math.ceil(self.fraction * group.num_values)))

    @abstractmethod
    def choose(self, group: ColumnGroup, values: Float32Array, seed: int) -> Indices:
        """Indices of the ``k`` entries to send, increasing."""

    def wire_vectors(self, group: ColumnGroup) -> tuple[WireVector, ...]:
        if group.num_values > MAX_VALUES:
            rule = f"has 32-bit indices: no more than {MAX_VALUES} values, {group.name!r} has {group.num_values}"
            raise ConfigError("updates.encoding", type(self).__name__.lower(), rule)
        return WireVector(_index(group), "uint32", self.k(group)), WireVector(group.name, "float32", self.k(group))

    def encode(self, group: ColumnGroup, values: Float32Array, seed: int) -> dict[str, np.ndarray]:
        chosen = self.choose(group, values, seed)
        sent = np.clip(values[chosen], -group.limit, group.limit)  # what is beyond the limit waits, too
        return {_index(group): chosen.astype(np.uint32), group.name: sent}

    def values_in_one_piece(self) -> int:
        return 1

    def splitter(self, group: ColumnGroup, starts: Sequence[int]) -> Splitter:
        return _SparseSplitter(group, starts)

    def check(self, group: ColumnGroup, received: Received) -> None:
        least = 0
        for offset, indices in placed(received[_index(group)]):
            least = _check_order(group, offset, indices, least)
        for offset, values in placed(received[group.name]):
            check_values(group, values, offset)

    def decode(self, group: ColumnGroup, received: Received) -> Float32Array:
        decoded = np.zeros(group.num_values, np.float32)
        for indices, values in _entries(group, received):
            decoded[indices] = values
        return decoded

    def fold(self, sums: Int64Array, group: ColumnGroup, received: Received, multiplier: int) -> bool:
        try:
            self.check(group, received)  # first of all: an index out of range would be a write out of range
        except ValueOutOfRange:
            return False
        form, scale = kernels_encodings.active(), float(2**group.s)
        for indices, values in _entries(group, received):
            form.fold_sparse(sums, indices, values, scale, multiplier)
        return True


@dataclass(frozen=True, kw_only=True)
class TopK(_Sparse):
    """Eight bytes for each of the ``k`` values of largest magnitude; of equal ones those of lower index.

    Decoded: these values, exactly, and 0 for all others. Error, before feedback: ``|left out|**2 <= (1 - k/n) *
    |values|**2``, since the ``k`` largest squares are at least ``k/n`` of their sum (Stich et al. 2018,
    arXiv:1809.07599, lemma A.1). With feedback, nothing is lost but time.
    """

    def choose(self, group: ColumnGroup, values: Float32Array, seed: int) -> Indices:
        del seed
        magnitudes, k = np.abs(values), self.k(group)
        if not k:
            return np.empty(0, np.int64)
        least = np.partition(magnitudes, values.size - k)[values.size - k]
        above = np.flatnonzero(magnitudes > least)
        equal = np.flatnonzero(magnitudes == least)[: k - above.size]
        return np.sort(np.concatenate([above, equal]))


@dataclass(frozen=True, kw_only=True)
class RandomK(_Sparse):
    """Eight bytes for each of ``k`` values, chosen uniformly without replacement from ``task.seed``.

    Decoded: these values, exactly, and 0 for all others. Error, before feedback: the mean over seeds of
    ``|left out|**2`` is ``(1 - k/n) * |values|**2`` (Stich et al. 2018, arXiv:1809.07599, lemma A.1). The other known
    form scales what is sent by ``n/k`` and keeps nothing: unbiased, but values ``n/k`` times as large would need caps
    to match, and cost the sums their fraction bits.
    """

    def choose(self, group: ColumnGroup, values: Float32Array, seed: int) -> Indices:
        drawn = generator(seed, group).choice(values.size, self.k(group), replace=False, shuffle=False)
        return np.sort(drawn)


class _SparseSplitter:
    """Entries go by their indices, which all come before the values; each range counts its own from its start."""

    def __init__(self, group: ColumnGroup, starts: Sequence[int]) -> None:
        self._group, self._starts = group, starts
        self._least = 0
        self._cuts = [0] * len(starts)
        """Indices below each start, so far."""

    def split(self, vector: str, offset: int, values: np.ndarray) -> Pieces:
        if vector == self._group.name:
            yield from cut(self._cuts, offset, values)
            return
        self._least = _check_order(self._group, offset, values, self._least)
        here = np.searchsorted(values, np.asarray(self._starts, np.int64)).tolist()
        self._cuts = [before + count for before, count in zip(self._cuts, here, strict=True)]
        for number, piece in cut(here, 0, values):
            yield number, piece - np.uint32(self._starts[number])


def _index(group: ColumnGroup) -> str:
    return f"{group.name}.index"


def _entries(group: ColumnGroup, received: Received) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices with their values, where both vectors are cut alike, as on the wire; else joined."""
    indices, values = received[_index(group)], received[group.name]
    if [chunk.size for chunk in indices] == [chunk.size for chunk in values]:
        yield from zip(indices, values, strict=True)
    else:
        yield np.concatenate(indices), np.concatenate(values)


def _check_order(group: ColumnGroup, offset: int, indices: np.ndarray, least: int) -> int:
    """Raise ``ValueOutOfRange`` unless the next indices increase from ``least`` on; what the ones after begin from."""
    bad = _first_out_of_order(indices, least, group.num_values)
    if bad >= 0:
        rule = f"must be above the one before it, and below {group.num_values}"
        raise bad_value(_index(group), offset + bad, indices[bad], rule)
    return int(indices[-1]) + 1 if indices.size else least


def _first_out_of_order(indices: np.ndarray, least: int, num_values: int) -> int:
    """Position of the first index that is below ``least``, not above the one before, or beyond the vector; or -1."""
    if not indices.size:
        return -1
    bad = indices >= num_values if num_values < MAX_VALUES else np.zeros(indices.size, bool)
    bad[0] |= int(indices[0]) < least
    bad[1:] |= indices[1:] <= indices[:-1]
    return int(np.argmax(bad)) if bad.any() else -1
