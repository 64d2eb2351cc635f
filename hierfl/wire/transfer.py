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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hierfl import documents
from hierfl.errors import DigestMismatch, LayoutMismatch, TransferIncomplete, WireError
from hierfl.types import AttemptKey
from hierfl.wire import arrow, digest
from hierfl.wire.arrow import DtypeName
from hierfl.wire.convert import check_key

__all__ = [
    "MAX_HEADER_BYTES",
    "PROTOCOL",
    "Descriptor",
    "Expect",
    "Header",
    "Incoming",
    "Kind",
    "Outgoing",
    "VectorSpec",
    "continues",
    "join_header",
    "read_header",
]

PROTOCOL = "hierfl.transfer/1"
Kind = Literal["model", "update", "partial"]

HEADER_PART_BYTES = 2**20
MAX_HEADER_BYTES = documents.MAX_DOCUMENT_BYTES
_CONTINUES = b"+"
MAX_TRAILER_BYTES = 1024
MAX_TICKET_BYTES = 256
MAX_VECTORS = 1024
MAX_NAME_BYTES = 1024
MAX_VALUES = 2**40
"""Caps on what a header may claim, whatever the receiver expects."""


@dataclass(frozen=True, kw_only=True)
class VectorSpec:
    """One flat vector of a transfer."""

    name: str
    dtype: DtypeName
    num_values: int

    @property
    def length_bytes(self) -> int:
        return self.num_values * arrow.DTYPES[self.dtype].itemsize

    def chunk_lengths(self) -> Iterator[int]:
        """Values of each chunk in turn; none for a vector without values."""
        full = arrow.values_per_chunk(self.dtype)
        for start in range(0, self.num_values, full):
            yield min(full, self.num_values - start)

    @property
    def num_chunks(self) -> int:
        return -(-self.num_values // arrow.values_per_chunk(self.dtype))


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """What a transfer holds. Travels as the exact JSON text that its digest covers."""

    kind: Kind
    encoding: DtypeName
    """How values travel; in protocol version 1 the dtype of every vector."""
    digest_alg: str
    layout_hash: str
    vectors: tuple[VectorSpec, ...]
    length_bytes: int
    """Of all values, without framing."""
    num_chunks: int
    meta: str
    """A document of its own: a model's layout, the head of an update or a partial."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """First frame. ``key`` and ``ticket`` address the transfer; a model has neither."""

    protocol: str
    key: AttemptKey | None
    ticket: str
    """As hex."""
    descriptor: str

    @property
    def ticket_bytes(self) -> bytes:
        return bytes.fromhex(self.ticket)


@dataclass(frozen=True, kw_only=True)
class Trailer:
    """Last frame."""

    digest: str


@dataclass(frozen=True)
class Expect:
    """What a receiver takes. ``None``: any that the other rules allow."""

    kind: Kind
    layout_hash: str | None
    vectors: tuple[VectorSpec, ...] | None
    max_bytes: int
    """Cap on the bytes of all values."""
    digest: str | None = None


class Outgoing:
    """A transfer to send, any number of times, from one encoded copy. Safe to share between threads.

    The copy is made at the first ``digest`` or ``frames`` (100 MB: 0.1 s), outside of an event loop where that
    matters; the vectors are let go then.
    """

    def __init__(
        self,
        kind: Kind,
        layout_hash: str,
        vectors: Mapping[str, np.ndarray],
        meta: bytes = b"",
        encoding: DtypeName | None = None,
        digest_alg: str = digest.DEFAULT,
    ) -> None:
        """Describe a transfer; nothing is encoded yet, and ``vectors`` must not change until it is.

        Args:
            kind: What the vectors are.
            layout_hash: Of the run's layout, 64 hex digits.
            vectors: By name, in order, each of shape ``(n,)``, of the dtype that ``encoding`` names.
            meta: Document that goes along, UTF-8 (see ``Descriptor``).
            encoding: int64 for a partial, float32 for all else where not given.
            digest_alg: One of ``digest.ALGORITHMS``.
        Raises:
            WireError: A vector has another dtype or shape, or ``meta`` is no UTF-8.
        """
        encoding = encoding or ("int64" if kind == "partial" else "float32")
        self._vectors = {name: _plain(name, vector, encoding) for name, vector in vectors.items()}
        specs = tuple(VectorSpec(name=n, dtype=encoding, num_values=v.size) for n, v in self._vectors.items())
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
        _check_descriptor(self.descriptor)
        self._text = documents.encode(self.descriptor).decode()
        self._encoded: tuple[tuple[bytes, ...], str] | None = None
        self._lock = threading.Lock()

    @classmethod
    def of(cls, incoming: Incoming) -> Outgoing:
        """Pass on what was received whole: the same frames under the same digest, no copy."""
        incoming.close()
        outgoing = cls.__new__(cls)
        outgoing._vectors = {}
        outgoing.descriptor = incoming.descriptor
        outgoing._text = incoming.header.descriptor
        outgoing._encoded = (tuple(incoming.frames), incoming.digest)
        outgoing._lock = threading.Lock()
        return outgoing

    @property
    def digest(self) -> str:
        """Root over descriptor and chunks, ``alg:hex``."""
        return self._encode()[1]

    @property
    def length_bytes(self) -> int:
        return self.descriptor.length_bytes

    def frames(self, key: AttemptKey | None = None, ticket: bytes = b"") -> Iterator[bytes]:
        """Header, chunks, trailer: addressed to ``key``, let in by ``ticket``."""
        chunks, root = self._encode()
        header = documents.encode(Header(protocol=PROTOCOL, key=key, ticket=ticket.hex(), descriptor=self._text))
        _require(len(header) <= MAX_HEADER_BYTES, f"its header would have more than {MAX_HEADER_BYTES} bytes")
        yield from _header_frames(header)
        yield from chunks
        yield documents.encode(Trailer(digest=root))

    def _encode(self) -> tuple[tuple[bytes, ...], str]:
        with self._lock:
            if self._encoded is None:
                self._encoded = self._make_frames()
                self._vectors = {}
            return self._encoded

    def _make_frames(self) -> tuple[tuple[bytes, ...], str]:
        alg, frames, digests = self.descriptor.digest_alg, [], []
        for spec in self.descriptor.vectors:
            start = 0
            for length in spec.chunk_lengths():
                values = self._vectors[spec.name][start : start + length]
                frames.append(arrow.encode_chunk(values))
                digests.append(_digest_of(alg, values))
                start += length
        return tuple(frames), digest.root(alg, self._text.encode(), digests)


class Incoming:
    """A transfer being received. One frame at a time, from one thread at a time; an error ends it."""

    def __init__(self, expect: Expect) -> None:
        self._expect = expect
        self._head = b""
        self._header: Header | None = None
        self._descriptor: Descriptor | None = None
        self._trailer: Trailer | None = None
        self._lengths: Iterator[tuple[VectorSpec, int]] = iter(())
        self._next: tuple[VectorSpec, int] | None = None
        self._digests: list[bytes] = []
        self.frames: list[bytes] = []
        """The chunk frames as they came."""
        self.chunks: dict[str, list[np.ndarray]] = {}
        """By vector, in order: read-only views on the frames, each of shape ``(n,)``."""

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
            self._take_trailer(frame)
        else:
            raise WireError("transfer: a frame came after the trailer")

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
            raise TransferIncomplete(f"transfer: ended after {len(self.frames)} of {self._num_chunks} chunks")
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
        """Copies of the whole vectors, each of shape ``(num_values,)``."""
        return {
            spec.name: np.concatenate([np.empty(0, arrow.DTYPES[spec.dtype]), *self.chunks[spec.name]])
            for spec in self.descriptor.vectors
        }

    @property
    def _num_chunks(self) -> str:
        return "unknown" if self._descriptor is None else str(self._descriptor.num_chunks)

    def _take_header(self, head: bytes) -> None:
        header, self._head = read_header(head), b""
        descriptor = documents.decode(header.descriptor.encode(), Descriptor, "transfer descriptor")
        _check_descriptor(descriptor)
        _check_expected(descriptor, self._expect)
        self._header, self._descriptor = header, descriptor
        self.chunks = {spec.name: [] for spec in descriptor.vectors}
        self._lengths = ((spec, length) for spec in descriptor.vectors for length in spec.chunk_lengths())
        self._next = next(self._lengths, None)

    def _take_chunk(self, frame: bytes, spec: VectorSpec, length: int) -> None:
        if frame.startswith(b"{"):
            raise TransferIncomplete(f"transfer: ended after {len(self.frames)} of {self._num_chunks} chunks")
        values = arrow.decode_chunk(frame, spec.dtype, length)
        self._digests.append(_digest_of(self.descriptor.digest_alg, values))
        self.chunks[spec.name].append(values)
        self.frames.append(frame)
        self._next = next(self._lengths, None)

    def _take_trailer(self, frame: bytes) -> None:
        _require(len(frame) <= MAX_TRAILER_BYTES, f"its trailer has more than {MAX_TRAILER_BYTES} bytes")
        trailer = documents.decode(frame, Trailer, "transfer trailer")
        digest.check(trailer.digest)
        self._trailer = trailer


def continues(frame: bytes) -> bool:
    """Whether a frame of a header is not its last."""
    return frame.startswith(_CONTINUES)


def join_header(so_far: bytes, frame: bytes, max_bytes: int = MAX_HEADER_BYTES) -> bytes:
    """The header with one more frame of it; parts are full, so that there are few of them.

    Raises:
        WireError: More than ``max_bytes``, or a part that continues and is not full.
    """
    if continues(frame):
        _require(len(frame) == len(_CONTINUES) + HEADER_PART_BYTES, "a part of its header is not full")
        frame = frame[len(_CONTINUES) :]
    _require(len(so_far) + len(frame) <= max_bytes, f"its header has more than {max_bytes} bytes")
    return so_far + frame


def _header_frames(header: bytes) -> Iterator[bytes]:
    start = 0
    while len(header) - start > HEADER_PART_BYTES:
        yield _CONTINUES + header[start : start + HEADER_PART_BYTES]
        start += HEADER_PART_BYTES
    yield header[start:]


def read_header(header: bytes) -> Header:
    """Read a whole header: whom it is addressed to decides what to expect of the rest.

    Raises:
        WireError: It is no header of this protocol.
    """
    _require(len(header) <= MAX_HEADER_BYTES, f"its header has more than {MAX_HEADER_BYTES} bytes")
    read = documents.decode(header, Header, "transfer header")
    _require(read.protocol == PROTOCOL, f"its protocol is {read.protocol[:40]!r}, not {PROTOCOL!r}")
    _require(_is_hex(read.ticket) and len(read.ticket) <= 2 * MAX_TICKET_BYTES, "its ticket is no hex")
    if read.key is not None:
        check_key(read.key)
    return read


def _check_descriptor(descriptor: Descriptor) -> None:
    """What holds for every transfer. The header's claims about sizes must agree with each other."""
    vectors = descriptor.vectors
    digest.new(descriptor.digest_alg)
    _require(len(descriptor.layout_hash) == 64 and _is_hex(descriptor.layout_hash), "its layout hash is no SHA-256")
    _require(len(vectors) <= MAX_VECTORS, f"has more than {MAX_VECTORS} vectors")
    _require(len({spec.name for spec in vectors}) == len(vectors), "a vector's name stands twice")
    for spec in vectors:
        _require(1 <= len(spec.name.encode(errors="replace")) <= MAX_NAME_BYTES, "a vector's name is out of range")
        _require(0 <= spec.num_values <= MAX_VALUES, f"vector {spec.name[:80]!r} has a length out of range")
        _require(spec.dtype == descriptor.encoding, f"vector {spec.name[:80]!r} has another dtype than the encoding")
    _require(descriptor.length_bytes == sum(spec.length_bytes for spec in vectors), "its length is not its vectors'")
    _require(descriptor.num_chunks == sum(spec.num_chunks for spec in vectors), "its chunks are not its vectors'")


def _check_expected(descriptor: Descriptor, expect: Expect) -> None:
    _require(descriptor.kind == expect.kind, f"is of kind {descriptor.kind!r}, not {expect.kind!r}")
    if expect.layout_hash is not None and descriptor.layout_hash != expect.layout_hash:
        raise LayoutMismatch(f"transfer: has layout {descriptor.layout_hash[:12]}, the run {expect.layout_hash[:12]}")
    if expect.vectors is not None and descriptor.vectors != expect.vectors:
        raise LayoutMismatch(f"transfer: has {_listed(descriptor.vectors)}, not {_listed(expect.vectors)}")
    _require(
        descriptor.length_bytes <= expect.max_bytes,
        f"has {descriptor.length_bytes} bytes, more than {expect.max_bytes}",
    )
    if expect.digest is not None and not expect.digest.startswith(f"{descriptor.digest_alg}:"):
        raise DigestMismatch(f"transfer: its digest is {descriptor.digest_alg}, expected is {expect.digest}")


def _listed(vectors: tuple[VectorSpec, ...]) -> str:
    return ", ".join(f"{spec.name[:40]!r} {spec.dtype} ({spec.num_values},)" for spec in vectors[:8]) or "no vector"


def _require(ok: bool, rule: str) -> None:
    if not ok:
        raise WireError(f"transfer: {rule}")


def _is_hex(text: str) -> bool:
    return len(text) % 2 == 0 and set(text) <= set("0123456789abcdef")


def _plain(name: str, vector: np.ndarray, encoding: str) -> np.ndarray:
    dtype = arrow.DTYPES[encoding]
    if vector.ndim != 1 or vector.dtype != dtype:
        raise WireError(f"vector {name!r} is {vector.dtype} {vector.shape}, not {encoding} of one dimension")
    return np.ascontiguousarray(vector, dtype)


def _text(meta: bytes) -> str:
    try:
        return meta.decode()
    except UnicodeDecodeError:
        raise WireError("transfer: its meta is no UTF-8") from None


def _digest_of(alg: str, values: np.ndarray) -> bytes:
    state = digest.new(alg)
    state.update(values.data.cast("B"))
    return state.digest()
