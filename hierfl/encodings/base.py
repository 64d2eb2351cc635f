"""What an encoding of updates is: vectors that stand for others, in fewer bytes.

An encoding takes float32 values to *wire vectors* and those back to float32 values, the decoded ones, which are
defined bit for bit: from there on the rule of ``hierfl/aggregation.py`` holds (``q = rint(value * 2**s)``, integer
sums), so the sums over encoded updates are exact, and depend on neither order nor grouping. What an encoding loses
it loses at the client, before anything is summed.

Only the ``train`` vector is encoded, where its group is ``fixed``. All else travels as float32 (``plain.py``):
``mean`` vectors (BatchNorm's statistics) have a range that a shared step would destroy, counts are whole numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from hierfl.columns import ColumnGroup
from hierfl.errors import ValueOutOfRange
from hierfl.types import Float32Array, Int64Array

__all__ = [
    "Encoding",
    "EvenSplitter",
    "Pieces",
    "Received",
    "Splitter",
    "WireDtype",
    "WireVector",
    "bad_value",
    "cut",
    "fold_whole",
    "generator",
    "joined",
    "placed",
]

WireDtype = Literal["float32", "int8", "uint8", "uint16", "uint32", "uint64"]
Received = Mapping[str, Sequence[np.ndarray]]
"""Per wire vector its chunks in order, each of shape ``(n,)``: read-only views on messages will do."""


class WireVector(NamedTuple):
    """One vector as it travels. The plan fixes all three, so that sizes are known before a byte comes."""

    name: str
    dtype: WireDtype
    num_values: int

    @property
    def length_bytes(self) -> int:
        return self.num_values * np.dtype(self.dtype).itemsize


class Encoding(Protocol):
    """A frozen, keyword-only dataclass of its options, which checks them in ``__post_init__``. With the two methods of
    ``ranges.Divisible`` its updates can be shared among shards, too.

    ``check`` is asked about a stranger's bytes of the right lengths and dtypes, ``decode`` only about what
    has passed it.
    """

    feedback: ClassVar[bool]
    """Whether the client keeps what an update leaves out and adds it to the next one (``client/residuals.py``)."""

    def wire_vectors(self, group: ColumnGroup) -> tuple[WireVector, ...]:
        """What stands for the group's vector, in order: its own name, or that and a dot and more.

        Raises:
            ConfigError: The vector is too long for this encoding.
        """
        ...

    def encode(self, group: ColumnGroup, values: Float32Array, seed: int) -> dict[str, np.ndarray]:
        """The wire vectors of ``values``, shape ``(n,)``, finite and within the group's limit, but with ``feedback``,
        where the encoding has to bring them there. Every draw comes from ``seed``. NumPy only: it runs at sites.
        """
        ...

    def check(self, group: ColumnGroup, received: Received) -> None:
        """Raise ``ValueOutOfRange``, naming vector and index, unless every decoded value fits the group."""
        ...

    def decode(self, group: ColumnGroup, received: Received) -> Float32Array:
        """The values that the wire vectors stand for, shape ``(n,)``."""
        ...

    def fold(self, sums: Int64Array, group: ColumnGroup, received: Received, multiplier: int) -> bool:
        """``sums += multiplier * rint(decoded * 2**s)``; ``False``, and nothing is added, where ``check`` would raise.

        Args:
            sums: Of the group's ``shape``; the caller has made sure that no sum can overflow.
            multiplier: May be negative: to take away what was added.
        """
        ...


Pieces = Iterator[tuple[int, np.ndarray]]
"""(number of a range, what it gets of a chunk)."""


class Splitter(Protocol):
    """Cuts the wire vectors of one group of one update into those of ranges of its values, chunk by chunk."""

    def split(self, vector: str, offset: int, values: np.ndarray) -> Pieces:
        """What each range gets of a chunk whose first entry is ``offset``: never nothing. Vectors come in their order.

        Raises:
            ValueOutOfRange: The chunk names values that are out of place.
        """
        ...


class EvenSplitter:
    """For wire vectors whose entries stand for the same number of values each, one after the other."""

    def __init__(self, values_per_entry: Mapping[str, int], starts: Sequence[int]) -> None:
        """``starts`` of the ranges, and the end of the last: all but that multiples of ``values_per_entry``."""
        self._cuts = {name: [-(-start // per) for start in starts] for name, per in values_per_entry.items()}

    def split(self, vector: str, offset: int, values: np.ndarray) -> Pieces:
        return cut(self._cuts[vector], offset, values)


def cut(cuts: Sequence[int], offset: int, values: np.ndarray) -> Pieces:
    """The pieces of a chunk at ``offset``, where range ``n`` gets the entries ``cuts[n]`` to ``cuts[n + 1]``."""
    for number, (start, stop) in enumerate(pairwise(cuts)):
        piece = values[max(start - offset, 0) : max(stop - offset, 0)]
        if piece.size:
            yield number, piece


def generator(seed: int, group: ColumnGroup) -> np.random.Generator:
    """Draws for one vector of one update: a stream of its own, apart from what training draws from ``task.seed``."""
    text = f"hierfl.encoding/1\0{seed}\0{group.name}"
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))


def joined(chunks: Sequence[np.ndarray], dtype: WireDtype) -> np.ndarray[Any, np.dtype[Any]]:
    """Chunks of one vector as one array: itself where it is one already."""
    return chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, dtype), *chunks])


def placed(chunks: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Every chunk with the index of its first value."""
    offset = 0
    for chunk in chunks:
        yield offset, chunk
        offset += chunk.size


def fold_whole(fold: Callable[[int, np.ndarray, int], int], chunks: Sequence[np.ndarray], multiplier: int) -> bool:
    """Fold chunks in order, all or none.

    Args:
        fold: Of (index of the chunk's first value, chunk, multiplier); returns how many values it folded, fewer
            than there are where it met one out of range.
    """
    done: list[tuple[int, np.ndarray]] = []
    for offset, chunk in placed(chunks):
        count = fold(offset, chunk, multiplier)
        done.append((offset, chunk[:count]))
        if count < chunk.size:
            for start, values in done:  # integers: taking them away again is exact
                fold(start, values, -multiplier)
            return False
    return True


def bad_value(vector: str, index: int, value: object, rule: str) -> ValueOutOfRange:
    """The error about one value of a wire vector."""
    return ValueOutOfRange(f"vector {vector!r}, value {index} is {value}: {rule}")
