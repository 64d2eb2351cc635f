"""Models on the wire as a difference to one that the receiver has (``hierfl/delta.py``): encoding ``delta``.

A transfer of kind "model" whose vectors are those of packed sums (``packed.py``), over the rows of the difference. Its
``meta`` is a ``DeltaHead``; the layout is the base's. Nobody vouches for a difference: what it makes of the base must
be the model that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hierfl import buffers, delta, documents
from hierfl.columns import ColumnGroup
from hierfl.errors import DigestMismatch, LayoutMismatch, WireError
from hierfl.layout import Layout, model_hash
from hierfl.types import Float32Array, ModelHash
from hierfl.wire import arrow, digest
from hierfl.wire.header import Descriptor, Expect, continues, join_header, read_descriptor, read_header
from hierfl.wire.packed import most_vectors, outgoing_packed, packed_sums
from hierfl.wire.transfer import Frame, Incoming, Outgoing

__all__ = ["DELTA", "Base", "Bases", "Difference", "outgoing_delta"]

DELTA = "delta"
"""Name of the encoding."""

Chunks = Mapping[str, Sequence[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class DeltaHead:
    """What a difference says of itself."""

    base: ModelHash
    changed: Mapping[str, int]
    """Values that changed, by vector; vectors in which none did are left out."""


@dataclass(frozen=True)
class Base:
    """A model that is here, as chunks of float32 values by vector; checked when it came."""

    layout: Layout
    chunks: Callable[[], Chunks]

    @classmethod
    def of(cls, frames: Sequence[Frame]) -> Base:
        """A model by the frames of its transfer: its chunks are views on these."""
        descriptor = _descriptor_of(frames)
        return cls(Layout.from_bytes(descriptor.meta.encode()), lambda: _chunks_of(descriptor, frames))

    def copy(self) -> dict[str, Float32Array]:
        """Its whole vectors, to be written."""
        return {name: _joined(self.layout.vectors[name], chunks) for name, chunks in self.chunks().items()}


Bases = Mapping[ModelHash, Base]
"""By their hash, the one to ask for first first."""


def _descriptor_of(frames: Iterable[Frame]) -> Descriptor:
    header = b""
    for frame in map(bytes, frames):
        header = join_header(header, frame)
        if not continues(frame):
            break
    return read_descriptor(read_header(header).descriptor)


def _chunks_of(descriptor: Descriptor, frames: Sequence[Frame]) -> Chunks:
    first = len(frames) - 1 - descriptor.num_chunks  # the trailer stands last
    rest = iter(frames[first:])
    return {
        spec.name: [arrow.decode_chunk(next(rest), spec.dtype, length) for length in spec.chunk_lengths()]
        for spec in descriptor.vectors
    }


def _joined(num_values: int, chunks: Sequence[np.ndarray]) -> Float32Array:
    vector: Float32Array = buffers.empty(num_values, np.float32)
    if chunks:
        np.concatenate(chunks, out=vector)
    return vector


# ---------------------------------------------------------------- sending


def outgoing_delta(layout: Layout, base: ModelHash, before: delta.Vectors, after: delta.Vectors) -> Outgoing | None:
    """The model ``after`` as a difference to ``base``, encoded; ``None`` where too much has changed.

    Args:
        layout: Of both.
        before, after: Their vectors, each of shape ``(n,)``, float32.
    """
    rows = delta.changes(before, after, int(layout.num_params * delta.MOST_CHANGED))
    if rows is None:
        return None
    changed = delta.num_changed(rows)
    meta = documents.encode(DeltaHead(base=base, changed=changed))
    outgoing = outgoing_packed("model", layout.hash, delta.groups_of(changed, layout.vectors), rows, meta, DELTA)
    outgoing.encode()
    return outgoing


# ---------------------------------------------------------------- receiving


class Difference:
    """A difference that is arriving, to one of the models that are here. Its header is checked when this is made."""

    def __init__(self, descriptor: Descriptor, bases: Bases) -> None:
        """
        Raises:
            LayoutMismatch: It is to vectors that the base does not have.
            WireError: It is to another model than those, or not what it should be.
        """
        head = documents.decode(descriptor.meta.encode(), DeltaHead, "difference")
        base = bases.get(head.base)
        if base is None:
            raise WireError(f"model: is a difference to {head.base[:12]!r}, which was not offered")
        sizes = base.layout.vectors
        if any(not 0 < count <= sizes.get(name, 0) for name, count in head.changed.items()):
            raise LayoutMismatch("model: is a difference of vectors that its base does not have")
        self.base_hash, self._base = head.base, base
        self._groups: tuple[ColumnGroup, ...] = delta.groups_of(head.changed, sizes)

    def expect(self, whole: Expect) -> Expect:
        """What is taken in the place of the whole model; never more bytes than that has."""
        return replace(whole, vectors=most_vectors(self._groups), encoding=DELTA, at_most=True)

    def model(self, incoming: Incoming, wanted: str, vouched: str) -> tuple[dict[str, Float32Array], Outgoing]:
        """The model that it makes of its base, once it is there: its vectors, and its own transfer.

        The base is copied once; beside base and copy there are the received frames and a few MiB.

        Args:
            wanted: The model's hash.
            vouched: Digest of its whole transfer, where somebody vouches for one; another costs a second pass.
        Raises:
            DigestMismatch: It makes another model.
            LayoutMismatch, ValueOutOfRange: It is none of this base.
        """
        packed = packed_sums(incoming, self._groups)
        layout, vectors = self._base.layout, self._base.copy()
        delta.apply(packed, vectors)
        alg = vouched.partition(":")[0]
        whole = Outgoing(
            "model",
            layout.hash,
            vectors,
            meta=layout.to_bytes(),
            digest_alg=alg if alg in digest.ALGORITHMS else digest.DEFAULT,
            keeps_copy=False,
        )
        if whole.encode() != vouched:
            found = model_hash(layout, vectors)
            if found != wanted:
                raise DigestMismatch(f"model: {wanted[:12]} was asked for, the difference makes {found[:12]}")
        return vectors, whole
