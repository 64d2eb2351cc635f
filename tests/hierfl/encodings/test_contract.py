"""What every encoding keeps: sizes fixed by the plan, exact sums over decoded values, refusals that change nothing."""

from __future__ import annotations

import pickle
from fractions import Fraction
from importlib.metadata import entry_points

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import CHOICES, chosen, from_bytes, group, values

from hierfl import documents, encodings
from hierfl.aggregation import Accumulator, PartialAggregate
from hierfl.columns import GroupKind
from hierfl.errors import ConfigError, LayoutMismatch, ValueOutOfRange

every_encoding = pytest.mark.parametrize("choice", CHOICES)
sizes = st.integers(1, 300)
seeds = st.integers(0, 2**63 - 1)


def encoded(choice: str, num_values: int, seed: int) -> dict[str, list[np.ndarray]]:
    wire = chosen(choice).encode(group(num_values), values(num_values, seed), seed)
    return {name: [vector] for name, vector in wire.items()}


@every_encoding
@settings(deadline=None)
@given(size=sizes, seed=seeds)
def test_what_is_encoded_has_the_vectors_that_the_plan_says_and_passes_the_check(choice, size, seed):
    encoding, wire = chosen(choice), encoded(choice, size, seed)
    said = encoding.wire_vectors(group(size))
    assert [(name, vector.dtype.name, vector.size) for name, (vector,) in wire.items()] == list(said)
    assert sum(vector.nbytes for (vector,) in wire.values()) == encodings.length_bytes(encoding, (group(size),))
    encoding.check(group(size), wire)
    decoded = encoding.decode(group(size), wire)
    assert (decoded.dtype, decoded.shape) == (np.float32, (size,))


@every_encoding
@settings(deadline=None)
@given(size=sizes, seed=seeds)
def test_the_same_seed_gives_the_same_bytes(choice, size, seed):
    once, again = encoded(choice, size, seed), encoded(choice, size, seed)
    assert [vector.tobytes() for (vector,) in once.values()] == [vector.tobytes() for (vector,) in again.values()]


@every_encoding
@settings(deadline=None)
@given(size=sizes, seed=seeds, weight=st.integers(1, 65_535), s=st.integers(0, 32), cut=st.integers(0, 300))
def test_the_fold_is_the_exact_sum_of_the_decoded_values_however_they_are_cut(choice, size, seed, weight, s, cut):
    encoding, column = chosen(choice), group(size, s=s)
    wire = {name: vector.tobytes() for name, (vector,) in encoded(choice, size, seed).items()}
    received = {}
    for name, dtype, _ in encoding.wire_vectors(column):  # each over bytes at an odd address, in two chunks
        whole = np.frombuffer(b"\1" + wire[name], dtype, offset=1)
        received[name] = [whole[:cut], whole[cut:]]
    decoded = encoding.decode(column, received)
    sums = np.arange(size, dtype=np.int64)
    assert encoding.fold(sums, column, received, weight)
    q = [round(Fraction(float(value)) * 2**s) for value in decoded]
    assert sums.tolist() == [i + weight * one for i, one in enumerate(q)]
    assert encoding.fold(sums, column, received, -weight)
    assert sums.tolist() == list(range(size))


@every_encoding
@settings(max_examples=300, deadline=None)
@given(size=sizes, data=st.binary(min_size=1, max_size=64), cut=st.integers(0, 200))
def test_a_strangers_bytes_are_refused_or_within_bounds_and_never_half_folded(choice, size, data, cut):
    encoding, column = chosen(choice), group(size)
    received = from_bytes(encoding.wire_vectors(column), data, cut)
    sums = np.zeros(size, np.int64)
    if encoding.fold(sums, column, received, 3):
        encoding.check(column, received)
        assert np.abs(encoding.decode(column, received)).max() <= 8
        assert np.abs(sums).max() <= 3 * column.max_q
    else:
        with pytest.raises(ValueOutOfRange, match="vector 'train"):
            encoding.check(column, received)
        assert not sums.any()


@every_encoding
@settings(max_examples=300, deadline=None)
@given(size=sizes, seed=seeds, data=st.data())
def test_an_update_with_changed_bytes_is_refused_or_within_bounds(choice, size, seed, data):
    encoding, column = chosen(choice), group(size)
    received = {}
    for name, (vector,) in encoded(choice, size, seed).items():
        changed = bytearray(vector.tobytes())
        for _ in range(data.draw(st.integers(0, 3))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
        received[name] = [np.frombuffer(bytes(changed), vector.dtype)]
    sums = np.zeros(size, np.int64)
    folded = encoding.fold(sums, column, received, 65_535)
    assert np.abs(sums).max() <= (65_535 * column.max_q if folded else 0)
    if folded:
        encoding.check(column, received)
    else:
        with pytest.raises(ValueOutOfRange):
            encoding.check(column, received)


# --- whole updates

GROUPS = (
    group(200),
    group(3, "mean", kind=GroupKind.WIDE, max_abs=2.0**20),
    group(4, "votes", kind=GroupKind.COUNT, s=0),
)


def update(choice: str, seed: int) -> dict[str, list[np.ndarray]]:
    vectors = {"train": values(200, seed), "mean": np.array([seed, 1.5, -(2.0**19)], np.float32)}
    vectors["votes"] = np.array([1, 0, -3, 8], np.float32)
    wire = encodings.encode_update(chosen(choice), GROUPS, vectors, seed)
    return {name: [vector] for name, vector in wire.items()}


@every_encoding
def test_only_trained_values_are_encoded(choice):
    wire = update(choice, 5)
    assert wire["mean"][0].tolist() == [5, 1.5, -(2.0**19)]
    assert wire["votes"][0].tolist() == [1, 0, -3, 8]
    decoded = encodings.decode_update(chosen(choice), GROUPS, wire)
    assert list(decoded) == ["train", "mean", "votes"]


@every_encoding
@settings(deadline=None)
@given(
    cohort=st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 65_535)), min_size=2, max_size=7), data=st.data()
)
def test_any_grouping_and_order_of_encoded_updates_has_the_same_bits(choice, cohort, data):
    def fold(members: list[tuple[int, int]]) -> PartialAggregate:
        sums = Accumulator(GROUPS, chosen(choice))
        for seed, weight in members:
            sums.fold(update(choice, seed), weight)
        return sums.partial(len(members))

    flat = fold(cohort)
    shuffled = data.draw(st.permutations(cohort))
    cut = data.draw(st.integers(0, len(cohort)))
    regions = [fold(part) for part in (shuffled[:cut], shuffled[cut:]) if part]
    total = Accumulator(GROUPS)
    for partial in regions:
        total.add(partial)
    assert total.partial(len(cohort)) == flat
    for name, values_ in flat.finish().items():
        assert np.isfinite(values_).all(), name


@every_encoding
def test_an_update_refused_in_its_last_vector_leaves_no_trace_of_the_first(choice):
    sums = Accumulator(GROUPS, chosen(choice))
    sums.fold(update(choice, 1), 2)
    bad = update(choice, 2) | {"votes": [np.array([1, 0, 0.5, 0], np.float32)]}
    with pytest.raises(ValueOutOfRange, match=r"'votes', value 2 is 0\.5: must be a whole number"):
        sums.fold(bad, 3)
    once = Accumulator(GROUPS, chosen(choice))
    once.fold(update(choice, 1), 2)
    assert sums.partial(1) == once.partial(1)


@every_encoding
def test_vectors_of_another_length_dtype_or_name_are_refused(choice):
    for change in ("length", "dtype", "name"):
        wire = update(choice, 1)
        (vector,) = wire.pop("train")
        if change == "name":
            wire["tram"] = [vector]
        else:
            wire["train"] = [vector[1:] if change == "length" else vector.astype(np.float64)]
        with pytest.raises(LayoutMismatch, match="train"):
            Accumulator(GROUPS, chosen(choice)).fold(wire, 1)


# --- by name


def test_all_built_in_encodings_are_listed_frozen_and_survive_pickling():
    assert set(encodings.names()) >= {"float32", "bfloat16", "int8", "topk", "randomk"}
    for choice in CHOICES:
        assert pickle.loads(pickle.dumps(chosen(choice))) == chosen(choice)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("int4", {}, r"updates\.encoding = 'int4' is no encoding; did you mean 'int8'"),
        ("int8", {"blok": 64}, r"updates\.blok = 64 is no option of int8; did you mean 'block'"),
        ("int8", {"block": 100}, r"updates\.block = 100 must be a power of two from 16 to 65536"),
        ("int8", {"block": True}, r"updates\.block = True must be a power of two"),
        ("int8", {"rounding": "up"}, r"updates\.rounding = 'up' must be 'nearest' or 'stochastic'"),
        ("topk", {"fraction": 0}, r"updates\.fraction = 0\.0 must be above 0, at most 0\.5"),
        ("randomk", {"fraction": 0.6}, r"updates\.fraction = 0\.6 must be above 0"),
        ("bfloat16", {"block": 64}, r"updates\.block = 64 is no option of bfloat16; it has none"),
    ],
)
def test_nonsense_is_refused_by_its_key(name, options, words):
    with pytest.raises(ConfigError, match=words):
        encodings.get(name, options)


def test_a_spec_has_every_option_so_that_spelling_out_a_default_is_the_same_task():
    assert encodings.spec("int8") == encodings.spec("int8", {"block": 256, "rounding": "nearest"})
    text = documents.encode(encodings.spec("topk", {"fraction": 0.25}))
    assert text == b'{"name":"topk","options":{"fraction":0.25}}'
    assert documents.decode(text, encodings.EncodingSpec, "spec") == encodings.spec("topk", {"fraction": 0.25})


PLUG_IN = """
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hierfl.encodings import PLAIN, WireVector


@dataclass(frozen=True, kw_only=True)
class Signs:
    \"\"\"One byte a value: its sign, times a step of the job.\"\"\"

    feedback: ClassVar[bool] = True
    step: float = 0.5

    def wire_vectors(self, group):
        return (WireVector(group.name, "int8", group.num_values),)

    def encode(self, group, values, seed):
        return {group.name: np.sign(values).astype(np.int8)}

    def check(self, group, received):
        PLAIN.check(group, self._plain(group, received))

    def decode(self, group, received):
        return PLAIN.decode(group, self._plain(group, received))

    def fold(self, sums, group, received, multiplier):
        return PLAIN.fold(sums, group, self._plain(group, received), multiplier)

    def _plain(self, group, received):
        return {group.name: [chunk.astype(np.float32) * np.float32(self.step) for chunk in received[group.name]]}
"""


def test_a_package_registers_an_encoding_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "signs.py").write_text(PLUG_IN)
    info = tmp_path / "signs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: signs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[hierfl.encodings]\nsigns = signs:Signs\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [entry.name for entry in entry_points(group="hierfl.encodings")] == ["signs"]
    encoding, groups = encodings.get("signs", {"step": 1}), (group(3),)
    wire = encodings.encode_update(encoding, groups, {"train": np.array([3, 0, -2], np.float32)}, 1)
    sums = Accumulator(groups, encoding)
    sums.fold({name: [vector] for name, vector in wire.items()}, 2)
    assert sums.partial(1).finish()["train"].tolist() == [1, 0, -1]
