"""Whole updates: which vectors are encoded, and all of them at once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hierfl.columns import ColumnGroup, GroupKind
from hierfl.encodings.base import Encoding, Received, WireVector
from hierfl.encodings.plain import PLAIN
from hierfl.layout import Role
from hierfl.types import Float32Array

__all__ = ["check_update", "decode_update", "encode_update", "encoding_of", "length_bytes", "wire_vectors"]

Groups = tuple[ColumnGroup, ...]


def encoding_of(encoding: Encoding, group: ColumnGroup) -> Encoding:
    """``encoding`` for the trained values; float32 for all else (``base.py`` says why)."""
    return encoding if group.kind is GroupKind.FIXED and group.name == Role.TRAIN else PLAIN


def wire_vectors(encoding: Encoding, groups: Groups) -> tuple[WireVector, ...]:
    """What an update has on the wire, in order. Raises ``ConfigError`` where a vector is too long for the encoding."""
    return tuple(vector for group in groups for vector in encoding_of(encoding, group).wire_vectors(group))


def length_bytes(encoding: Encoding, groups: Groups) -> int:
    """Bytes of all values of an update."""
    return sum(vector.length_bytes for vector in wire_vectors(encoding, groups))


def encode_update(
    encoding: Encoding, groups: Groups, vectors: Mapping[str, Float32Array], seed: int
) -> dict[str, np.ndarray]:
    """The wire vectors of an update, in order."""
    encoded: dict[str, np.ndarray] = {}
    for group in groups:
        encoded |= encoding_of(encoding, group).encode(group, vectors[group.name], seed)
    return encoded


def decode_update(encoding: Encoding, groups: Groups, received: Received) -> dict[str, Float32Array]:
    """The values that a checked update stands for, by group."""
    return {group.name: encoding_of(encoding, group).decode(group, received) for group in groups}


def check_update(encoding: Encoding, groups: Groups, received: Received) -> None:
    """Raise ``ValueOutOfRange`` for the first value that does not fit; dtypes and lengths are right already."""
    for group in groups:
        encoding_of(encoding, group).check(group, received)
