"""Packing kernels: compiled and NumPy forms against Python's integers, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hierfl import kernels_packing
from hierfl.kernels_packing import BLOCK, LANES, MAX_WIDTH, NUMPY, ROWS

COMPILED = kernels_packing.compiled()
FORMS = [pytest.param(NUMPY, id="numpy")] + ([pytest.param(COMPILED, id="numba")] if COMPILED else [])

int64s = st.integers(-(2**63), 2**63 - 1)


@st.composite
def some_blocks(draw: st.DrawFn) -> np.ndarray:
    """One to three blocks of values that scatter by up to a given number of bits around a given one."""
    blocks = []
    for _ in range(draw(st.integers(1, 3))):
        random = np.random.default_rng(draw(st.integers(0, 2**32)))
        bits, around = draw(st.integers(0, 64)), draw(int64s)
        wide = random.integers(0, 2**64 - 1, BLOCK, np.uint64, endpoint=True)
        scattered = (wide >> np.uint64(64 - bits) if bits else wide & np.uint64(0)) + np.array(around).view(np.uint64)
        blocks.append(scattered.view(np.int64))
    return np.concatenate(blocks)


def measured(form, values):
    references, widths = np.empty(values.size // BLOCK, np.int64), np.empty(values.size // BLOCK, np.uint8)
    form.measure(values, references, widths)
    return references, widths


def packed(form, values):
    references, widths = measured(form, values)
    words = np.full(LANES * int(widths.sum(dtype=np.int64)), 2**64 - 1, np.uint64)  # whatever was there before
    assert form.pack(values, references, widths, words) == words.size
    return words, references, widths


def slow_words(block: list[int], reference: int, width: int) -> list[int]:
    """The words of one block, from the description: one Python integer of bits for each lane."""
    lanes = [0] * LANES
    for index, value in enumerate(block):
        row, lane = divmod(index, LANES)
        lanes[lane] |= (value - reference) << (row * width)
    return [lanes[lane] >> (64 * word) & (2**64 - 1) for word in range(width) for lane in range(LANES)]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(values=some_blocks())
def test_a_block_is_its_least_value_and_as_many_bits_as_its_spread_needs_as_described(form, values):
    words, references, widths = packed(form, values)
    expected = []
    for number, block in enumerate(values.reshape(-1, BLOCK).tolist()):
        assert references[number] == min(block)
        assert widths[number] == (max(block) - min(block)).bit_length()
        expected += slow_words(block, min(block), int(widths[number]))
    assert words.tolist() == expected


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(values=some_blocks(), start=int64s)
def test_adding_what_was_packed_is_adding_the_values(form, values, start):
    words, references, widths = packed(form, values)
    sums = np.full(values.size, start, np.int64)
    assert form.add(words, references, widths, sums) == words.size
    wrapped = [(start + value + 2**63) % 2**64 - 2**63 for value in values.tolist()]
    assert sums.tolist() == wrapped


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(values=some_blocks(), start=st.integers(-(2**126), 2**126))
def test_low_halves_carry_into_high_ones(form, values, start):
    words, references, widths = packed(form, values)
    high, low = np.full(values.size, start >> 64, np.int64), np.full(values.size, start & (2**64 - 1), np.uint64)
    assert form.add_low(words, references, widths, high, low) == words.size
    sums = [(int(upper) << 64) + int(lower) for upper, lower in zip(high, low, strict=True)]
    assert sums == [start + value % 2**64 for value in values.tolist()]


@settings(max_examples=25)
@given(values=some_blocks())
def test_both_forms_give_the_same_bits(values):
    if COMPILED is None:
        pytest.skip("numba is not installed")
    for one, other in zip(packed(NUMPY, values), packed(COMPILED, values), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [0, 1, 7, 8, 31, 32, 33, 63, MAX_WIDTH])
def test_values_at_both_ends_of_a_width_come_back(form, width):
    values = np.zeros(BLOCK, np.int64)
    values[::3] = np.array(2**width - 1, np.uint64).view(np.int64) if width < MAX_WIDTH else -(2**63)
    values[1::3] = 2**63 - 1 if width == MAX_WIDTH else 0
    words, references, widths = packed(form, values)
    assert widths.tolist() == [width]
    sums = np.zeros(BLOCK, np.int64)
    form.add(words, references, widths, sums)
    assert sums.tolist() == values.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_adding_stops_before_a_block_without_its_words_or_too_wide(form):
    words, references = np.zeros(3 * LANES, np.uint64), np.array([1, 2, 3])
    for bad in (MAX_WIDTH + 1, 255, 3):
        widths = np.array([2, bad, 0], np.uint8)
        sums, low = np.zeros(3 * BLOCK, np.int64), np.zeros(3 * BLOCK, np.uint64)
        assert form.add(words, references, widths, sums) == 2 * LANES
        assert form.add_low(words, references, widths, np.zeros_like(sums), low) == 2 * LANES
        assert sums.tolist() == low.tolist() == [1] * BLOCK + [0] * 2 * BLOCK


@pytest.mark.parametrize("form", FORMS)
def test_read_only_unaligned_words_from_a_message_are_taken(form):
    values = np.arange(BLOCK) - 7
    words, references, widths = packed(form, values)
    message = np.frombuffer(b"\1" + words.tobytes(), np.uint64, offset=1)
    assert not message.flags.writeable
    assert not message.flags.aligned
    sums = np.zeros(BLOCK, np.int64)
    form.add(message, references, widths, sums)
    assert sums.tolist() == values.tolist()


def test_a_block_is_lanes_times_rows():
    assert BLOCK == LANES * ROWS == 1024
