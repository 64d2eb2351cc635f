"""A transfer: flat vectors as header, chunks, trailer; one frame is one gRPC message.

    header    JSON {descriptor, key, protocol, ticket}; the descriptor is a JSON text in it, covered by the digest;
              above 1 MiB in several frames, each but the last a "+" and 1 MiB of it
    chunks    Arrow record batches, all full but the last of each vector; a chunk is of one vector
    trailer   JSON {digest}

What may come is the receiver's expectation, never the sender's claim: sizes are checked against it before anything
is kept, every chunk against the length it must have. Key and ticket are outside of the digest, so that sealed bytes
can be sent again under another key. Received chunks are views on the frames: nothing is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeAlias, cast

import numpy as np

from hierfl import buffers, documents
from hierfl.errors import DigestMismatch, TransferIncomplete, WireError
from hierfl.types import AttemptKey
from hierfl.wire import arrow, digest
from hierfl.wire.arrow import DtypeName
from hierfl.wire.header import (
    PLAIN,
    PROTOCOL,
    Descriptor,
    Expect,
    Header,
    Kind,
    Trailer,
    VectorSpec,
    check_descriptor,
    check_expected,
    continues,
    header_frames,
    join_header,
    read_descriptor,
    read_header,
    read_trailer,
)

__all__ = [
    "SMALL_UPDATE_BYTES",
    "Descriptor",
    "Expect",
    "Frame",
    "Header",
    "Incoming",
    "Kind",
    "Outgoing",
    "Sink",
    "VectorSpec",
    "is_small",
    "read_header",
]

SMALL_UPDATE_BYTES = 65_536
"""Of values: what is not larger may be handed in with the request for admission, which saves a stream."""
MOST_FRAME_BYTES = 2 * SMALL_UPDATE_BYTES
"""Of a small update's frames: its values, its header and what Arrow adds."""

Frame: TypeAlias = bytes | memoryview
"""One of a transfer's: gRPC sends and brings bytes; those that wait may lie in shared memory."""


class Outgoing:
    """A transfer to send, any number of times. Safe to share between threads.

    What goes to many is sent from one encoded copy, made at the first ``digest`` or ``frames`` (100 MB: 0.1 s), outside
    of an event loop where that matters; the vectors are let go then. What goes to one receiver needs no copy: its
    frames are made one by one as they are sent (``keeps_copy=False``).
    """

    def __init__(
        self,
        kind: Kind,
        layout_hash: str,
        vectors: Mapping[str, np.ndarray],
        meta: bytes = b"",
        encoding: str | None = None,
        digest_alg: str = digest.DEFAULT,
        keeps_copy: bool = True,
    ) -> None:
        """Describe a transfer; nothing is encoded yet, and ``vectors`` must not change until it is.

        Args:
            kind: What the vectors are.
            layout_hash: Of the run's layout, 64 hex digits.
            vectors: By name, in order, each of shape ``(n,)``, of a dtype of ``arrow.DTYPES``.
            meta: Document that goes along, UTF-8 (see ``Descriptor``).
            encoding: What the vectors are; where not given plain values: int64 of a partial, float32 of all else.
            digest_alg: One of ``digest.ALGORITHMS``.
            keeps_copy: Whether to encode once, for many receivers; else ``vectors`` must never change.
        Raises:
            WireError: A vector has another dtype or shape, or ``meta`` is no UTF-8.
        """
        encoding = encoding or PLAIN[kind]
        only = encoding if encoding in PLAIN.values() else None
        plain = {name: _plain(name, vector, only) for name, vector in vectors.items()}
        specs = tuple(VectorSpec(name=n, dtype=_dtype_name(v), num_values=v.size) for n, v in plain.items())
        self._make_chunks: Callable[[], Iterator[np.ndarray]] = partial(_cut, plain, specs)
        self._describe(kind, layout_hash, specs, meta, encoding, digest_alg, keeps_copy)

    @classmethod
    def made(
        cls,
        kind: Kind,
        layout_hash: str,
        vectors: tuple[VectorSpec, ...],
        chunks: Callable[[], Iterator[np.ndarray]],
        meta: bytes,
        encoding: str,
    ) -> Outgoing:
        """A transfer whose values are made chunk by chunk as it is encoded, and never all in memory but as frames.

        Args:
            kind: As above; so are ``layout_hash``, ``meta`` and ``encoding``.
            vectors: What ``chunks`` makes.
            chunks: Makes exactly those, full but for the last of each vector; each is good until the next is asked for.
        """
        outgoing = cls.__new__(cls)
        outgoing._make_chunks = chunks
        outgoing._describe(kind, layout_hash, vectors, meta, encoding, digest.DEFAULT, keeps_copy=True)
        return outgoing

    def _describe(
        self,
        kind: Kind,
        layout_hash: str,
        specs: tuple[VectorSpec, ...],
        meta: bytes,
        encoding: str,
        digest_alg: str,
        keeps_copy: bool,
    ) -> None:
        self.descriptor = Descriptor(
            kind=kind,
            encoding=encoding,
            digest_alg=digest_alg,
            layout_hash=layout_hash,
            vectors=specs,
            length_bytes=sum(spec.length_bytes for spec in specs),
            num_chunks=sum(spec.num_chunks for spec in specs),
            meta=_text(meta),
        )
        check_descriptor(self.descriptor)
        self._text = documents.encode(self.descriptor).decode()
        self._keeps_copy = keeps_copy
        self._copy: tuple[bytes, ...] | None = None
        self._digest = ""
        self._lock = threading.Lock()

    @classmethod
    def of(cls, incoming: Incoming) -> Outgoing:
        """Pass on what was received whole: the same frames under the same digest, no copy."""
        incoming.close()
        outgoing = cls.__new__(cls)
        outgoing._make_chunks, outgoing._keeps_copy = _no_chunks, True
        outgoing.descriptor = incoming.descriptor
        outgoing._text = incoming.header.descriptor
        outgoing._copy, outgoing._digest = tuple(incoming.frames), incoming.digest
        outgoing._lock = threading.Lock()
        return outgoing

    def over(self, vectors: Mapping[str, np.ndarray]) -> Outgoing:
        """The same transfer from equal vectors that lie elsewhere, such as in a file; no copy is kept of these."""
        described = self.descriptor
        outgoing = Outgoing(
            described.kind,
            described.layout_hash,
            vectors,
            described.meta.encode(),
            described.encoding,
            described.digest_alg,
            keeps_copy=False,
        )
        outgoing._text, outgoing._digest = self._text, self.digest
        return outgoing

    @property
    def digest(self) -> str:
        """Root over descriptor and chunks, ``alg:hex``."""
        return self.encode()

    def encode(self) -> str:
        """Do now what takes its time, the copy and the digest, for a thread that has it; returns the digest."""
        with self._lock:
            if not self._digest:
                self._make()
            return self._digest

    @property
    def length_bytes(self) -> int:
        return self.descriptor.length_bytes

    def frames(self, key: AttemptKey | None = None, ticket: bytes = b"") -> Iterator[bytes]:
        """Header, chunks, trailer: addressed to ``key``, let in by ``ticket``."""
        root = self.digest
        header = Header(protocol=PROTOCOL, key=key, ticket=ticket.hex(), descriptor=self._text)
        yield from header_frames(documents.encode(header))
        yield from self._copy if self._copy is not None else map(arrow.encode_chunk, self._make_chunks())
        yield documents.encode(Trailer(digest=root))

    def small_frames(self, key: AttemptKey) -> list[bytes]:
        """All frames where they may come with a request, else none."""
        frames = list(self.frames(key)) if self.length_bytes <= SMALL_UPDATE_BYTES else []
        return frames if is_small(frames, self.length_bytes) else []

    def _make(self) -> None:
        frames, digests = [], []
        for values in self._make_chunks():
            digests.append(_digest_of(self.descriptor.digest_alg, values))
            if self._keeps_copy:
                frames.append(arrow.encode_chunk(values))
        self._digest = digest.root(self.descriptor.digest_alg, self._text.encode(), digests)
        if self._keeps_copy:
            self._copy, self._make_chunks = tuple(frames), _no_chunks


class Sink(Protocol):
    """Takes a transfer's chunks in the place of its ``Incoming``, which then keeps their digests only."""

    def take(self, vector: str, values: np.ndarray) -> None:
        """The next chunk, checked: a view on its frame. Raises ``WireError`` for values that do not fit."""
        ...

    def go_on_from(self, earlier: Sink) -> bool:
        """Take over what ``earlier`` took of the same transfer; whether that could be had. It takes nothing after."""
        ...


class Incoming:
    """A transfer being received. One frame at a time, from one thread at a time; an error ends it."""

    def __init__(self, expect: Expect, *, keeps_frames: bool = True, sink: Sink | None = None) -> None:
        """
        Args:
            expect: What is taken.
            keeps_frames: Whether chunks are views on the frames, which stay. Else they are copied to their place in
                the whole vectors as they come, and each frame is let go.
            sink: Takes the chunks, none of which is kept here then.
        """
        self._expect = expect
        self.sink = sink
        self._keeps_frames = keeps_frames
        self._whole: dict[str, np.ndarray] = {}
        self._head = b""
        self._header: Header | None = None
        self._descriptor: Descriptor | None = None
        self._trailer: Trailer | None = None
        self._lengths: Iterator[tuple[VectorSpec, int]] = iter(())
        self._next: tuple[VectorSpec, int] | None = None
        self._digests: list[bytes] = []
        self.num_taken = 0
        """Chunks that are here, each checked."""
        self.num_bytes = 0
        """Of their values."""
        self.frames: list[bytes] = []
        """The chunk frames as they came, where they are kept."""
        self.chunks: dict[str, list[np.ndarray]] = {}
        """By vector, in order: views on the frames, or on the whole vectors, each of shape ``(n,)``."""

    def feed(self, frame: bytes) -> None:
        """Take the next frame.

        Raises:
            LayoutMismatch: Another layout, or other vectors, than expected.
            TransferIncomplete: The trailer came before the last chunk.
            WireError: Anything else that does not fit.
        """
        if self._header is None:
            self._head = join_header(self._head, frame)
            if not continues(frame):
                self._take_header(self._head)
        elif self._next is not None:
            self._take_chunk(frame, *self._next)
        elif self._trailer is None:
            self._trailer = read_trailer(frame)
        else:
            raise WireError("transfer: a frame came after the trailer")

    def go_on_from(self, earlier: Incoming) -> int:
        """Take the chunks of a cut transfer as this one's own, if it is the same one; this has its header only, yet.

        The same: its descriptor's text and what was expected of it. ``earlier`` is not fed any more, and not changed.
        Returns the number of chunks that are here: those need not come again.
        """
        if earlier._header is None or earlier.header.descriptor != self.header.descriptor:
            return 0
        if (earlier._expect, earlier._keeps_frames) != (self._expect, self._keeps_frames) or self.num_taken:
            return 0
        if self.sink is not None and (earlier.sink is None or not self.sink.go_on_from(earlier.sink)):
            return 0
        values = {name: iter(chunks) for name, chunks in earlier.chunks.items()}
        for chunk_digest in earlier._digests[: earlier.num_taken]:
            assert self._next is not None, "as many chunks as the descriptor says, at most"
            name = self._next[0].name
            self._digests.append(chunk_digest)
            if self.sink is None:
                self.chunks[name].append(next(values[name]))
            self._count_chunk(*self._next)
        self.frames, self._whole = earlier.frames[: self.num_taken], earlier._whole
        return self.num_taken

    @property
    def complete(self) -> bool:
        """Whether header, all chunks and trailer are there; ``close`` says whether they are right."""
        return self._trailer is not None

    def close(self) -> None:
        """Check the transfer as a whole.

        Raises:
            TransferIncomplete: It ended before its trailer.
            DigestMismatch: Its values do not have the digest that the trailer names, or that was expected.
        """
        if self._trailer is None:
            raise TransferIncomplete(f"transfer: ended after {self.num_taken} of {self._num_chunks} chunks")
        for wanted, who in ((self._trailer.digest, "its trailer names"), (self._expect.digest, "was expected")):
            if wanted is not None and wanted != self.digest:
                raise DigestMismatch(f"transfer: has digest {self.digest}, {who} {wanted}; send it again")

    @property
    def header(self) -> Header:
        if self._header is None:
            raise TransferIncomplete("transfer: no header yet")
        return self._header

    @property
    def descriptor(self) -> Descriptor:
        if self._descriptor is None:
            raise TransferIncomplete("transfer: no header yet")
        return self._descriptor

    @property
    def meta(self) -> bytes:
        """The document that came along, exactly as sent."""
        return self.descriptor.meta.encode()

    @property
    def digest(self) -> str:
        """Root over descriptor and the chunks so far, ``alg:hex``; the transfer's own once it is complete."""
        return digest.root(self.descriptor.digest_alg, self.header.descriptor.encode(), self._digests)

    def vectors(self) -> dict[str, np.ndarray]:
        """The whole vectors, each of shape ``(num_values,)``; copies where frames are kept."""
        if not self._keeps_frames:
            return self._whole
        return {
            spec.name: np.concatenate([np.empty(0, arrow.DTYPES[spec.dtype]), *self.chunks[spec.name]])
            for spec in self.descriptor.vectors
        }

    @property
    def _num_chunks(self) -> str:
        return "unknown" if self._descriptor is None else str(self._descriptor.num_chunks)

    def _take_header(self, head: bytes) -> None:
        header, self._head = read_header(head), b""
        descriptor = read_descriptor(header.descriptor)
        check_expected(descriptor, self._expect)
        self._header, self._descriptor = header, descriptor
        self.chunks = {spec.name: [] for spec in descriptor.vectors}
        if not self._keeps_frames and self.sink is None:
            self._whole = {
                spec.name: buffers.empty(spec.num_values, arrow.DTYPES[spec.dtype]) for spec in descriptor.vectors
            }
        self._lengths = ((spec, length) for spec in descriptor.vectors for length in spec.chunk_lengths())
        self._next = next(self._lengths, None)

    def _take_chunk(self, frame: bytes, spec: VectorSpec, length: int) -> None:
        if frame.startswith(b"{"):
            raise TransferIncomplete(f"transfer: ended after {self.num_taken} of {self._num_chunks} chunks")
        values = arrow.decode_chunk(frame, spec.dtype, length)
        self._digests.append(_digest_of(self.descriptor.digest_alg, values))
        if self.sink is not None:
            self.sink.take(spec.name, values)
        else:
            if self._keeps_frames:
                self.frames.append(frame)
            else:
                values = self._placed(spec, values)
            self.chunks[spec.name].append(values)
        self._count_chunk(spec, length)

    def _count_chunk(self, spec: VectorSpec, length: int) -> None:
        self.num_taken += 1
        self.num_bytes += length * arrow.DTYPES[spec.dtype].itemsize
        self._next = next(self._lengths, None)

    def _placed(self, spec: VectorSpec, values: np.ndarray) -> np.ndarray:
        """A chunk, copied to its place: every one before it is full."""
        start = len(self.chunks[spec.name]) * arrow.values_per_chunk(spec.dtype)
        place = self._whole[spec.name][start : start + values.size]
        place[:] = values
        return place


def is_small(frames: Sequence[bytes], length_bytes: int) -> bool:
    """Whether an update may come with its request: who waits in line holds no more than that."""
    return length_bytes <= SMALL_UPDATE_BYTES and sum(map(len, frames)) <= MOST_FRAME_BYTES


def _plain(name: str, vector: np.ndarray, only: str | None) -> np.ndarray:
    """``vector`` as it travels; plain values have one dtype, an encoding's vectors each one that travels."""
    dtype = arrow.DTYPES.get(only or vector.dtype.name)
    if vector.ndim != 1 or vector.dtype != dtype:
        raise WireError(f"vector {name!r} is {vector.dtype} {vector.shape}, not {only or 'numbers'} of one dimension")
    return np.ascontiguousarray(vector)


def _cut(vectors: Mapping[str, np.ndarray], specs: tuple[VectorSpec, ...]) -> Iterator[np.ndarray]:
    """The chunks of whole vectors: views."""
    for spec in specs:
        start = 0
        for length in spec.chunk_lengths():
            yield vectors[spec.name][start : start + length]
            start += length


def _no_chunks() -> Iterator[np.ndarray]:
    """They have been encoded, and let go."""
    return iter(())


def _dtype_name(vector: np.ndarray) -> DtypeName:
    return cast("DtypeName", vector.dtype.name)


def _text(meta: bytes) -> str:
    try:
        return meta.decode()
    except UnicodeDecodeError:
        raise WireError("transfer: its meta is no UTF-8") from None


def _digest_of(alg: str, values: np.ndarray) -> bytes:
    state = digest.new(alg)
    state.update(values.data.cast("B"))
    return state.digest()
