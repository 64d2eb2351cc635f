"""Documents: what is signed, hashed or stored, as JSON with sorted keys and no white space.

A document is a frozen dataclass. It is signed and verified over the exact bytes sent, so a reader
never re-encodes what it checks; an unknown field is ignored and never weakens a rule, because a
document that needs one understood says so in ``requires``.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import msgspec

from hierfl.errors import WireError

__all__ = ["decode", "digest", "encode"]

T = TypeVar("T")

MAX_DOCUMENT_BYTES = 16 * 2**20
"""Larger ones are refused before they are parsed."""


def encode(document: Any) -> bytes:
    """Canonical bytes of a document: UTF-8 JSON, keys sorted, no white space."""
    return msgspec.json.encode(document, order="sorted")


def decode(data: bytes, kind: type[T], what: str) -> T:
    """Read a document of ``kind``; ``what`` names it in the error.

    Raises:
        WireError: The bytes are too many, are no JSON, or do not fit ``kind``.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise WireError(f"{what} has {len(data)} bytes, more than {MAX_DOCUMENT_BYTES}")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError, OverflowError) as error:
        raise WireError(f"{what} does not fit its schema: {error}") from None


def digest(data: bytes) -> str:
    """SHA-256 of a document's exact bytes, as ``sha256:hex``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
