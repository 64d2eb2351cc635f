"""Encodings of updates: fewer bytes from the clients, the same exact sums.

``get(name, options)`` makes one, ``names()`` lists them, ``Encoding`` is what to write for a new one. The error of
each stands in its class: float32, bfloat16, int8 (``blocks.py``), topk and randomk (``sparse.py``).
"""

from hierfl.encodings.base import Encoding, Received, WireVector, fold_whole, generator
from hierfl.encodings.plain import PLAIN
from hierfl.encodings.registry import EncodingSpec, get, names, spec
from hierfl.encodings.update import (
    check_update,
    decode_update,
    encode_update,
    encoding_of,
    length_bytes,
    wire_vectors,
)

__all__ = [
    "PLAIN",
    "Encoding",
    "EncodingSpec",
    "Received",
    "WireVector",
    "check_update",
    "decode_update",
    "encode_update",
    "encoding_of",
    "fold_whole",
    "generator",
    "get",
    "length_bytes",
    "names",
    "spec",
    "wire_vectors",
]
