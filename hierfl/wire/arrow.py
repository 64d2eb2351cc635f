"""Values <-> one Arrow IPC record-batch message: about 1 MiB of one vector, nothing else.

The receiver knows dtype and length before it looks. A message's metadata is a flatbuffer written by a stranger: it
is read here with every position checked, and a message that has anything beyond one plain column of exactly the
expected length is refused, before pyarrow sees it with a schema of our own. The values are then a read-only view
on the message itself.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import numpy as np
import pyarrow as pa

from hierfl.errors import WireError

__all__ = ["CHUNK_BYTES", "DTYPES", "DtypeName", "decode_chunk", "encode_chunk", "values_per_chunk"]

CHUNK_BYTES = 2**20
"""Values of a full chunk: 262,144 of float32, 131,072 of int64. The last chunk of a vector may be shorter."""

DtypeName = Literal["float32", "int64", "int8", "uint8", "uint16", "uint32", "uint64"]
DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "float32": np.dtype("<f4"),
    "int64": np.dtype("<i8"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
    "uint64": np.dtype("<u8"),
}

_SCHEMAS = {
    name: pa.schema([pa.field("v", pa.from_numpy_dtype(dtype), nullable=False)]) for name, dtype in DTYPES.items()
}

CONTINUATION = 0xFFFFFFFF
MAX_METADATA_BYTES = 4096
METADATA_V5 = 4
RECORD_BATCH = 3
"""As in Arrow's Message.fbs: the only kind and version that are taken."""

_PREFIX = struct.Struct("<II")  # continuation marker, metadata length
_U8, _U16, _I16 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<h")
_U32, _I32, _I64 = struct.Struct("<I"), struct.Struct("<i"), struct.Struct("<q")
_PAIR = struct.Struct("<qq")  # FieldNode: length, null count. Buffer: offset, length


def values_per_chunk(dtype: str) -> int:
    """Values of a full chunk."""
    return CHUNK_BYTES // DTYPES[dtype].itemsize


def encode_chunk(values: np.ndarray) -> bytes:
    """One message with ``values``, shape ``(n,)``, n at least 1, of a dtype of ``DTYPES``, contiguous."""
    body = values.data.cast("B")
    return b"".join((_message_head(values.dtype.name, values.size), body, b"\0" * (-len(body) % 8)))


@lru_cache(maxsize=256)
def _message_head(dtype: str, num_values: int) -> bytes:
    """All that stands before the values: the same for all chunks of a length, so that values are copied once."""
    column = pa.array(np.zeros(num_values, DTYPES[dtype]))
    message = pa.RecordBatch.from_arrays([column], schema=_SCHEMAS[dtype]).serialize()
    _, metadata_bytes = _PREFIX.unpack_from(message)
    return bytes(message[: _PREFIX.size + metadata_bytes])


def decode_chunk(frame: bytes | memoryview, dtype: str, num_values: int) -> np.ndarray:
    """The values of a message that must hold exactly ``num_values`` of ``dtype``.

    Returns:
        Shape ``(num_values,)``, a read-only view on ``frame``.
    Raises:
        WireError: The message is anything else.
    """
    _inspect(frame, num_values, DTYPES[dtype].itemsize)
    try:
        batch = pa.ipc.read_record_batch(pa.py_buffer(frame), _SCHEMAS[dtype])
        batch.validate(full=True)
        values: np.ndarray = batch.column(0).to_numpy(zero_copy_only=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise WireError(f"chunk: Arrow refuses it: {str(error)[:200]}") from None
    if values.dtype != DTYPES[dtype] or values.shape != (num_values,):
        raise WireError(f"chunk: has {values.shape} values of {values.dtype}, not {num_values} of {dtype}")
    return values


def _inspect(frame: bytes | memoryview, num_values: int, itemsize: int) -> None:
    """Refuse all but one plain column: no compression, nulls, dictionaries, custom metadata, or spare bytes."""
    metadata, body_bytes = _split(frame)
    message = _Table.root(metadata)
    _require(message.number(0, _I16, 0) == METADATA_V5, "metadata version must be 5")
    _require(message.number(1, _U8, 0) == RECORD_BATCH, "must be a record batch")
    _require(message.number(3, _I64, 0) == body_bytes, "body length differs from the bytes sent")
    _require(message.position(4) is None, "custom metadata is not taken")
    batch = message.table(2)
    _require(batch.number(0, _I64, 0) == num_values, f"must have {num_values} values")
    _require(batch.position(3) is None, "compressed buffers are not taken")
    _require(not batch.length(4), "variadic buffers are not taken")
    _require(batch.pairs(1, at_most=1) == [(num_values, 0)], "must have one column without nulls")
    _check_buffers(batch.pairs(2, at_most=2), body_bytes, num_values, itemsize)


def _split(frame: bytes | memoryview) -> tuple[memoryview, int]:
    """The metadata of a message, and how many bytes follow it."""
    _require(len(frame) >= _PREFIX.size, "is shorter than a message's prefix")
    marker, size = _PREFIX.unpack_from(frame)
    _require(marker == CONTINUATION, "does not begin as an Arrow message")
    _require(0 < size <= MAX_METADATA_BYTES and size % 8 == 0, "metadata length is out of range")
    _require(_PREFIX.size + size <= len(frame), "ends within its metadata")
    return memoryview(frame)[_PREFIX.size : _PREFIX.size + size], len(frame) - _PREFIX.size - size


def _check_buffers(buffers: list[tuple[int, int]], body_bytes: int, num_values: int, itemsize: int) -> None:
    """Two buffers in the body: validity (writers may leave it out, or set every bit) and the values."""
    _require(len(buffers) == 2, "must have two buffers")
    limits = ((0, _padded(-(-num_values // 8))), (num_values * itemsize, _padded(num_values * itemsize)))
    for (offset, length), (least, most) in zip(buffers, limits, strict=True):
        _require(least <= length <= most, "has a buffer of another length")
        _require(0 <= offset <= body_bytes - length and offset % 8 == 0, "has a buffer outside of its body")
    _require(body_bytes <= sum(most for _, most in limits), "has more bytes than its values need")


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64


def _require(ok: bool, rule: str) -> None:
    if not ok:
        raise WireError(f"chunk: {rule}")


class _Table:
    """A flatbuffer table in untrusted bytes: every read is checked against their end."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self._at = data, at
        self._vtable = at - self._read(_I32, at)
        self._vtable_bytes = self._read(_U16, self._vtable)
        self._table_bytes = self._read(_U16, self._vtable + 2)
        _require(self._vtable_bytes >= 4 and self._table_bytes >= 4, "metadata is damaged")

    @classmethod
    def root(cls, data: memoryview) -> _Table:
        return cls(data, _U32.unpack_from(data)[0])

    def _read(self, kind: struct.Struct, at: int) -> int:
        _require(0 <= at <= len(self._data) - kind.size, "metadata points outside of itself")
        return int(kind.unpack_from(self._data, at)[0])

    def position(self, field: int) -> int | None:
        """Where the table's ``field`` stands; ``None`` where it is left out."""
        slot = 4 + 2 * field
        if slot + 2 > self._vtable_bytes:
            return None
        offset = self._read(_U16, self._vtable + slot)
        _require(offset < self._table_bytes, "metadata is damaged")
        return self._at + offset if offset else None

    def number(self, field: int, kind: struct.Struct, default: int) -> int:
        at = self.position(field)
        return default if at is None else self._read(kind, at)

    def _target(self, field: int) -> int:
        at = self.position(field)
        if at is None:
            raise WireError("chunk: metadata lacks what a record batch needs")
        return at + self._read(_U32, at)

    def table(self, field: int) -> _Table:
        return _Table(self._data, self._target(field))

    def length(self, field: int) -> int:
        """Elements of a vector; 0 where it is left out."""
        return 0 if self.position(field) is None else self._read(_U32, self._target(field))

    def pairs(self, field: int, at_most: int) -> list[tuple[int, int]]:
        """A vector of structs of two 64-bit integers."""
        count, start = self.length(field), self._target(field) + 4
        _require(count <= at_most, "must have one plain column")
        _require(start + count * _PAIR.size <= len(self._data), "metadata points outside of itself")
        return [_PAIR.unpack_from(self._data, start + index * _PAIR.size) for index in range(count)]
