"""What a transfer says of itself before its values, and what a receiver takes of that.

Every size that a header claims has to agree with the others and with the receiver's expectation, before anything
is kept. The header is JSON; the descriptor is a JSON text inside of it, because the digest covers exactly that text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from hierfl import documents
from hierfl.errors import DigestMismatch, LayoutMismatch, WireError
from hierfl.types import AttemptKey
from hierfl.wire import arrow, digest
from hierfl.wire.arrow import DtypeName
from hierfl.wire.convert import check_key

__all__ = [
    "MAX_HEADER_BYTES",
    "PLAIN",
    "PROTOCOL",
    "Descriptor",
    "Expect",
    "Header",
    "Kind",
    "Trailer",
    "VectorSpec",
    "check_descriptor",
    "check_expected",
    "continues",
    "header_frames",
    "join_header",
    "read_descriptor",
    "read_header",
    "read_trailer",
]

PROTOCOL = "hierfl.transfer/1"
Kind = Literal["model", "update", "partial", "residual"]
PLAIN: Mapping[Kind, DtypeName] = {"model": "float32", "update": "float32", "partial": "int64", "residual": "int64"}
"""The encoding of each kind where nothing else was agreed."""

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
    encoding: str
    """How the vectors stand for values: the dtype of them all where they are plain, or a name that both sides know."""
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
    vouched: str = ""
    """A digest that a signature vouches for: a model with it needs no other check, one with another its hash."""
    encoding: str | None = None
    """``None``: plain values."""
    at_most: bool = False
    """Whether a vector may have fewer values than ``vectors`` says: where their number depends on the values."""

    def fits(self, vectors: tuple[VectorSpec, ...]) -> bool:
        """Whether these are the vectors expected."""
        if self.vectors is None or vectors == self.vectors:
            return True
        return (
            self.at_most
            and [(spec.name, spec.dtype) for spec in vectors] == [(spec.name, spec.dtype) for spec in self.vectors]
            and all(spec.num_values <= most.num_values for spec, most in zip(vectors, self.vectors, strict=True))
        )


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


def header_frames(header: bytes) -> Iterator[bytes]:
    """The frames of an encoded header.

    Raises:
        WireError: It is longer than any receiver takes.
    """
    _require(len(header) <= MAX_HEADER_BYTES, f"its header has more than {MAX_HEADER_BYTES} bytes")
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


def read_descriptor(text: str) -> Descriptor:
    """Read a header's descriptor: what its sender claims, checked for agreement with itself.

    Raises:
        WireError: It is none, or see ``check_descriptor``.
    """
    descriptor = documents.decode(text.encode(), Descriptor, "transfer descriptor")
    check_descriptor(descriptor)
    return descriptor


def read_trailer(frame: bytes) -> Trailer:
    """Read a last frame.

    Raises:
        WireError: It is no trailer.
    """
    _require(len(frame) <= MAX_TRAILER_BYTES, f"its trailer has more than {MAX_TRAILER_BYTES} bytes")
    trailer = documents.decode(frame, Trailer, "transfer trailer")
    digest.check(trailer.digest)
    return trailer


def check_descriptor(descriptor: Descriptor) -> None:
    """What holds for every transfer: the header's claims about sizes agree with each other.

    Raises:
        WireError: They do not, or one is above its cap.
    """
    vectors = descriptor.vectors
    digest.new(descriptor.digest_alg)
    _require(
        1 <= len(descriptor.encoding.encode(errors="replace")) <= MAX_NAME_BYTES, "its encoding has no usable name"
    )
    _require(len(descriptor.layout_hash) == 64 and _is_hex(descriptor.layout_hash), "its layout hash is no SHA-256")
    _require(len(vectors) <= MAX_VECTORS, f"has more than {MAX_VECTORS} vectors")
    _require(len({spec.name for spec in vectors}) == len(vectors), "a vector's name stands twice")
    for spec in vectors:
        _require(1 <= len(spec.name.encode(errors="replace")) <= MAX_NAME_BYTES, "a vector's name is out of range")
        _require(0 <= spec.num_values <= MAX_VALUES, f"vector {spec.name[:80]!r} has a length out of range")
        _require(
            spec.dtype == descriptor.encoding or descriptor.encoding not in PLAIN.values(),
            f"vector {spec.name[:80]!r} has another dtype than the encoding",
        )
    _require(descriptor.length_bytes == sum(spec.length_bytes for spec in vectors), "its length is not its vectors'")
    _require(descriptor.num_chunks == sum(spec.num_chunks for spec in vectors), "its chunks are not its vectors'")


def check_expected(descriptor: Descriptor, expect: Expect) -> None:
    """Whether a transfer is one that the receiver takes.

    Raises:
        LayoutMismatch: Another layout, or other vectors.
        DigestMismatch: Its digest cannot be the one that is expected.
        WireError: Another kind, or too many bytes.
    """
    _require(descriptor.kind == expect.kind, f"is of kind {descriptor.kind!r}, not {expect.kind!r}")
    if expect.layout_hash is not None and descriptor.layout_hash != expect.layout_hash:
        raise LayoutMismatch(f"transfer: has layout {descriptor.layout_hash[:12]}, the run {expect.layout_hash[:12]}")
    encoding = expect.encoding or PLAIN[expect.kind]
    if descriptor.encoding != encoding:
        raise LayoutMismatch(f"transfer: is encoded as {descriptor.encoding[:40]!r}, expected is {encoding!r}")
    if expect.vectors is not None and not expect.fits(descriptor.vectors):
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
