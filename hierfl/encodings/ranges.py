"""Updates cut into ranges of values, as they come: for sums that several processes keep, a range of each group each.

A range begins at a multiple of the packed form's blocks (``hierfl/packing.py``) and of what an encoding has in one
piece, so that what a range's owner gets is an update of that range in the same encoding, and its sums pack alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from hierfl.columns import ColumnGroup
from hierfl.encodings.base import Encoding, Splitter
from hierfl.encodings.update import encoding_of
from hierfl.kernels_packing import BLOCK

__all__ = ["Divisible", "Division", "Part", "UpdateSplitter"]


@runtime_checkable
class Divisible(Protocol):
    """What an encoding has besides ``Encoding``'s own if its updates can be cut; built-in ones do."""

    def values_in_one_piece(self) -> int:
        """A range may begin at multiples of this."""
        ...

    def splitter(self, group: ColumnGroup, starts: Sequence[int]) -> Splitter:
        """Cuts one update's wire vectors; ``starts`` of the ranges in the group, and its end."""
        ...


class Part(NamedTuple):
    """What one owner gets of a chunk."""

    owner: int
    vector: str
    offset: int
    """Entries of the vector that this owner got before."""
    values: np.ndarray


class Division:
    """Which owner has which values of each group."""

    def __init__(self, encoding: Encoding, groups: Sequence[ColumnGroup], num_owners: int) -> None:
        """
        Raises:
            TypeError: The encoding cannot be cut; ``can_divide`` says so beforehand.
        """
        self.encoding, self.groups, self.num_owners = encoding, tuple(groups), num_owners
        self.starts = {group.name: _starts(group, self._of(group), num_owners) for group in groups}
        """Per group where each owner's range begins, and the group's end."""

    @staticmethod
    def can_divide(encoding: Encoding) -> bool:
        """Whether updates in this encoding can be cut."""
        return isinstance(encoding, Divisible)

    def _of(self, group: ColumnGroup) -> Divisible:
        encoding = encoding_of(self.encoding, group)
        if not isinstance(encoding, Divisible):
            raise TypeError(f"updates in {type(encoding).__name__} cannot be cut")
        return encoding

    def groups_of(self, owner: int) -> tuple[ColumnGroup, ...]:
        """The groups as one owner has them: only as many values each, maybe none."""
        return tuple(
            replace(group, num_values=starts[owner + 1] - starts[owner])
            for group, starts in zip(self.groups, self.starts.values(), strict=True)
        )

    def pieces(self, group: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Who has a group's values from ``start`` to ``stop``: (owner, first, last + 1 within the owner's range)."""
        starts = self.starts[group]
        for owner in range(self.num_owners):
            first, last = max(start, starts[owner]), min(stop, starts[owner + 1])
            if first < last:
                yield owner, first - starts[owner], last - starts[owner]

    def splitter(self) -> UpdateSplitter:
        """For one update."""
        splitters: dict[str, Splitter] = {}
        for group in self.groups:
            splitter = self._of(group).splitter(group, self.starts[group.name])
            splitters |= {vector.name: splitter for vector in encoding_of(self.encoding, group).wire_vectors(group)}
        return UpdateSplitter(splitters, self.num_owners)


class UpdateSplitter:
    """Cuts the chunks of one update, fed in their order."""

    def __init__(self, splitters: Mapping[str, Splitter], num_owners: int) -> None:
        self._splitters = splitters
        self._fed = dict.fromkeys(splitters, 0)
        self.given: list[dict[str, int]] = [dict.fromkeys(splitters, 0) for _ in range(num_owners)]
        """By owner and vector: entries that it got."""

    def split(self, vector: str, values: np.ndarray) -> list[Part]:
        """What each owner gets of the next chunk of ``vector``: views where that will do.

        Raises:
            ValueOutOfRange: The chunk says of its values that they are out of place.
        """
        parts: list[Part] = []
        for owner, piece in self._splitters[vector].split(vector, self._fed[vector], values):
            parts.append(Part(owner, vector, self.given[owner][vector], piece))
            self.given[owner][vector] += piece.size
        self._fed[vector] += values.size
        return parts


def _starts(group: ColumnGroup, encoding: Divisible, num_owners: int) -> tuple[int, ...]:
    """Ranges of about equal length, in whole multiples."""
    multiple = max(BLOCK, encoding.values_in_one_piece())  # both are powers of two
    whole = -(-group.num_values // multiple)
    return tuple(min(group.num_values, whole * owner // num_owners * multiple) for owner in range(num_owners + 1))
