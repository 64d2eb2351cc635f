"""Chunks: values survive, and whatever else a stranger sends is a WireError, not a crash."""

import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hierfl.errors import WireError
from hierfl.wire import arrow

FULL = {name: arrow.values_per_chunk(name) for name in arrow.DTYPES}


def message(*arrays: pa.Array, **options: object) -> bytes:
    """One batch of these columns, as another writer may make it; the first of a dictionary's is its dictionary."""
    batch = pa.RecordBatch.from_arrays(list(arrays), names=[f"v{index}" for index in range(len(arrays))])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(batch)
    reader = pa.ipc.MessageReader.open_stream(sink.getvalue())
    reader.read_next_message()  # the schema
    return reader.read_next_message().serialize().to_pybytes()


def sample(dtype: str, num_values: int) -> np.ndarray:
    return np.random.default_rng(num_values).integers(-1000, 1000, num_values).astype(arrow.DTYPES[dtype])


def test_a_full_chunk_is_one_mebibyte_of_values():
    assert {dtype: 2**20 // arrow.DTYPES[dtype].itemsize for dtype in arrow.DTYPES} == FULL
    assert FULL["float32"] == 262_144


@pytest.mark.parametrize("dtype", arrow.DTYPES)
@pytest.mark.parametrize("num_values", [1, 2, 3, 7, 8, 9, 1000, "full"])
def test_values_survive_the_wire(dtype, num_values):
    values = sample(dtype, FULL[dtype] if num_values == "full" else num_values)
    decoded = arrow.decode_chunk(arrow.encode_chunk(values), dtype, values.size)
    assert decoded.dtype == values.dtype
    assert decoded.tobytes() == values.tobytes()


def test_every_bit_pattern_of_a_float_survives():
    values = np.array([0x7F800001, 0xFFC00000, 0x80000000, 0x00000001, 0x7F800000], np.uint32).view(np.float32)
    assert arrow.decode_chunk(arrow.encode_chunk(values), "float32", 5).tobytes() == values.tobytes()


def test_decoded_values_are_a_read_only_view_on_the_frame():
    frame = arrow.encode_chunk(sample("float32", 1000))
    values = arrow.decode_chunk(frame, "float32", 1000)
    assert not values.flags.writeable
    assert not values.flags.owndata
    assert np.shares_memory(values, np.frombuffer(frame, np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "int64"])
@pytest.mark.parametrize("num_values", [1, 5, 4096])
def test_our_frames_are_what_arrow_itself_writes(dtype, num_values):
    values = sample(dtype, num_values)
    assert arrow.encode_chunk(values) == message(pa.array(values))


def test_a_writer_that_sets_every_validity_bit_is_taken():
    values = sample("float32", 100)
    bitmap = pa.py_buffer(b"\xff" * 13)
    array = pa.Array.from_buffers(pa.float32(), 100, [bitmap, pa.py_buffer(values)], null_count=0)
    batch = pa.RecordBatch.from_arrays([array], names=["v"])
    frame = batch.serialize().to_pybytes()
    assert arrow.decode_chunk(frame, "float32", 100).tobytes() == values.tobytes()


def test_a_chunk_of_another_length_is_refused():
    frame = arrow.encode_chunk(sample("float32", 100))
    for claimed in (1, 99, 101, 262_144):
        with pytest.raises(WireError, match="must have"):
            arrow.decode_chunk(frame, "float32", claimed)


def test_a_chunk_of_another_width_is_refused():
    with pytest.raises(WireError, match="another length"):
        arrow.decode_chunk(arrow.encode_chunk(sample("int64", 100)), "float32", 100)


FOUR = pa.array(np.zeros(4, np.float32))
ODD_MESSAGES = {
    "compressed": lambda: message(FOUR, compression="zstd"),
    "nulls": lambda: message(pa.array([1.0, None, 3.0, 4.0], pa.float32())),
    "two columns": lambda: message(FOUR, FOUR),
    "no column": message,
    "strings": lambda: message(pa.array(["a", "b", "c", "d"])),
    "views": lambda: message(pa.array(["a" * 40] * 4, pa.string_view())),
    "lists": lambda: message(pa.array([[1.0], [2.0], [3.0], [4.0]])),
    "a dictionary": lambda: message(pa.array(["a", "b", "a", "b"]).dictionary_encode()),
    "a schema": lambda: pa.schema([pa.field("v", pa.float32())]).serialize().to_pybytes(),
    "old metadata": lambda: message(FOUR, metadata_version=pa.ipc.MetadataVersion.V4),
    "no marker": lambda: message(FOUR)[4:],
    "empty": lambda: b"",
    "marker only": lambda: b"\xff" * 4,
    "no metadata": lambda: b"\xff\xff\xff\xff\0\0\0\0",
    "huge metadata": lambda: b"\xff\xff\xff\xff\xf8\xff\xff\xff" + b"\0" * 64,
    "json": lambda: b'{"digest":""}',
}


@pytest.mark.parametrize("name", ODD_MESSAGES)
def test_what_is_no_plain_column_is_refused(name):
    with pytest.raises(WireError):
        arrow.decode_chunk(ODD_MESSAGES[name](), "float32", 4)


def test_bytes_added_to_a_chunk_are_refused():
    frame = arrow.encode_chunk(sample("float32", 4))
    with pytest.raises(WireError):
        arrow.decode_chunk(frame + b"\0" * 8, "float32", 4)


def test_a_chunk_cut_anywhere_is_refused():
    frame = arrow.encode_chunk(sample("float32", 4))
    for end in range(len(frame)):
        with pytest.raises(WireError):
            arrow.decode_chunk(frame[:end], "float32", 4)


def test_every_change_of_one_metadata_byte_gives_the_values_or_a_wire_error():
    values = sample("float32", 6)
    frame = arrow.encode_chunk(values)
    refused = 0
    for at in range(len(frame) - 24):
        for change in (0x01, 0x80, 0xFF, frame[at]):
            changed = bytearray(frame)
            changed[at] ^= change
            try:
                decoded = arrow.decode_chunk(bytes(changed), "float32", 6)
            except WireError:
                refused += 1
            else:
                assert decoded.shape == (6,)
    assert refused > 100


@given(frame=st.binary(max_size=400), num_values=st.integers(1, 64))
def test_any_bytes_give_a_wire_error(frame, num_values):
    with pytest.raises(WireError):
        arrow.decode_chunk(b"\xff\xff\xff\xff" + frame, "float32", num_values)


def mutated(frame: bytes, chance: random.Random) -> bytes:
    """A few of: bytes overwritten, 4-byte words replaced by telling numbers, pieces cut, doubled or added."""
    data = bytearray(frame)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(max(1, min(len(data), 200)))
        match chance.randrange(5):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                number = chance.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 4, len(data), 136])
                data[at & ~3 : (at & ~3) + 4] = number.to_bytes(4, "little")
            case 2:
                del data[at : at + chance.choice([1, 4, 8, 64])]
            case 3:
                data[at:at] = data[at : at + chance.choice([1, 4, 8, 64])]
            case 4:
                data[at:at] = chance.randbytes(chance.choice([1, 4, 8, 64]))
    return bytes(data)


def decode_hostile(seed: int, count: int) -> int:
    """Decode so many mutated chunks; returns how many were refused. Anything but WireError comes through."""
    chance = random.Random(seed)
    frames = [(dtype, n, arrow.encode_chunk(sample(dtype, n))) for dtype in arrow.DTYPES for n in (1, 5, 64)]
    refused = 0
    for _ in range(count):
        dtype, num_values, frame = chance.choice(frames)
        try:
            float(arrow.decode_chunk(mutated(frame, chance), dtype, num_values).sum())
        except WireError:
            refused += 1
    return refused


def test_thousands_of_mutated_chunks_do_not_crash_the_process():
    script = (
        "import importlib.util, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        f"spec = importlib.util.spec_from_file_location('hostile', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.decode_hostile(seed=7, count=6000))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert int(ended.stdout) > 4000
