"""Layouts: hashes, flat vectors, and what is refused by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hierfl.errors import ConfigError, LayoutMismatch, ValueOutOfRange, WireError
from hierfl.layout import Alias, Layout, Role, Slot, TensorSpec, model_hash, tensor_digest


def model() -> dict[str, np.ndarray]:
    return {
        "fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "bn.mean": np.array([0.5, 1.5], np.float32),
        "bn.count": np.array(7, np.int64),
        "scale": np.array(2.0, np.float32),
        "nothing": np.empty((0, 4), np.float32),
        "frozen": np.array([1, 2], np.int8),
    }


ROLES = {"bn.mean": Role.MEAN, "frozen": Role.FIXED}


def test_layout_keeps_the_order_of_the_model_and_defaults_roles_by_dtype():
    layout = Layout.of(model(), ROLES)
    assert [spec.name for spec in layout.tensors] == list(model())
    assert [spec.role for spec in layout.tensors] == ["train", "mean", "local", "train", "train", "fixed"]
    assert dict(layout.vectors) == {"train": 7, "mean": 2}
    assert layout.num_params == 9


def test_slots_follow_each_other_and_locate_any_value():
    layout = Layout.of(model(), ROLES)
    assert dict(layout.slots) == {
        "fc.weight": Slot("train", 0, 6),
        "bn.mean": Slot("mean", 0, 2),
        "scale": Slot("train", 6, 7),
        "nothing": Slot("train", 7, 7),
    }
    assert [layout.tensor_at("train", i) for i in (0, 5, 6)] == ["fc.weight", "fc.weight", "scale"]
    assert layout.tensor_at("mean", 1) == "bn.mean"


def test_flatten_and_unflatten_are_inverse_and_float32_comes_back_as_views():
    layout = Layout.of(model(), ROLES)
    vectors = layout.flatten(model())
    assert vectors["train"].tolist() == [0, 1, 2, 3, 4, 5, 2]
    assert vectors["mean"].tolist() == [0.5, 1.5]
    back = layout.unflatten(vectors)
    assert list(back) == ["fc.weight", "bn.mean", "scale", "nothing"]
    for name, array in back.items():
        assert array.shape == model()[name].shape
        assert np.array_equal(array, model()[name])
    assert np.shares_memory(back["fc.weight"], vectors["train"])


def test_a_layout_of_empty_tensors_only_has_no_vectors():
    layout = Layout.of({"nothing": np.empty((0, 4), np.float32)})
    assert dict(layout.vectors) == {}
    assert layout.unflatten(layout.flatten({"nothing": np.empty((0, 4), np.float32)}))["nothing"].shape == (0, 4)


def test_hash_is_sha256_of_the_canonical_json():
    layout = Layout.of({"b": np.zeros(2, np.float32), "a": np.array(1, np.int64)})
    expected = (
        b'{"aliases":[],"tensors":[{"digest":"","dtype":"float32","name":"b","role":"train","shape":[2]},'
        b'{"digest":"","dtype":"int64","name":"a","role":"local","shape":[]}]}'
    )
    assert layout.to_bytes() == expected
    assert layout.hash == hashlib.sha256(expected).hexdigest()
    assert Layout.from_bytes(expected) == layout


def test_model_hash_is_over_layout_hash_and_vectors_in_the_layouts_order():
    layout = Layout.of(model(), ROLES)
    vectors = layout.flatten(model())
    data = b"hierfl.model/1\0" + bytes.fromhex(layout.hash)
    data += vectors["train"].astype("<f4").tobytes() + vectors["mean"].astype("<f4").tobytes()
    assert model_hash(layout, dict(reversed(vectors.items()))) == hashlib.sha256(data).hexdigest()


def test_model_hash_depends_on_the_layout_and_on_every_bit():
    one, other = Layout.of({"a": np.zeros(2, np.float32)}), Layout.of({"b": np.zeros(2, np.float32)})
    zeros = {"train": np.zeros(2, np.float32)}
    assert model_hash(one, zeros) != model_hash(other, zeros)
    assert model_hash(one, zeros) != model_hash(one, {"train": np.array([0.0, -0.0], np.float32)})


def test_16_bit_tensors_have_a_float32_master_and_come_back_as_16_bits():
    params = {"half": np.array([1.5, -2.25], np.float16)}
    layout = Layout.of(params)
    vectors = layout.flatten(params)
    assert vectors["train"].dtype == np.float32
    vectors["train"] += np.float32(1e-4)  # the master keeps what 16 bits would lose
    assert layout.unflatten(vectors)["half"].dtype == np.float16
    assert vectors["train"][0] != np.float32(1.5)
    with pytest.raises(ValueOutOfRange, match="'half'"):
        layout.unflatten({"train": np.array([1e6, 0], np.float32)})


def test_float64_is_refused_by_name_unless_cast_is_said():
    params = {"w": np.array([0.1, 0.2])}
    with pytest.raises(ConfigError, match=r"model\.w.*float64.*cast"):
        Layout.of(params)
    layout = Layout.of(params, cast=True)
    back = layout.unflatten(layout.flatten(params))["w"]
    assert back.dtype == np.float64
    assert np.array_equal(back, params["w"].astype(np.float32))


@pytest.mark.parametrize("dtype", [np.complex64, np.int32, np.uint8, np.bool_])
def test_complex_and_integer_tensors_cannot_travel(dtype):
    with pytest.raises(ConfigError, match=r"model\.w"):
        Layout.of({"w": np.zeros(3, dtype), "x": np.zeros(1, np.float32)}, {"w": Role.TRAIN})
    Layout.of({"w": np.zeros(3, dtype), "x": np.zeros(1, np.float32)}, {"w": Role.LOCAL})


def test_a_complex_tensor_without_a_role_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"model\.w.*complex64.*local or fixed"):
        Layout.of({"w": np.zeros(3, np.complex64)})


def test_tensors_of_no_numbers_and_models_without_a_travelling_tensor_are_refused():
    with pytest.raises(ConfigError, match=r"model\.w"):
        Layout.of({"w": np.array(["text"])}, {"w": Role.LOCAL})
    with pytest.raises(ConfigError, match="at least one tensor"):
        Layout.of({"count": np.array(1)})
    with pytest.raises(ConfigError, match=r"model\.y.*no tensor of the model"):
        Layout.of({"x": np.zeros(1, np.float32)}, {"y": Role.LOCAL})


def test_roles_may_be_a_function():
    layout = Layout.of(model(), lambda name, array: Role.TRAIN if name == "fc.weight" else Role.LOCAL)
    assert dict(layout.vectors) == {"train": 6}


def test_tied_tensors_count_once_and_stay_tied():
    table = np.ones((2, 2), np.float32)
    params = {"embed": table, "other": np.zeros(1, np.float32), "head": table}
    layout = Layout.of(params)
    assert layout.aliases == (Alias("head", "embed"),)
    assert dict(layout.vectors) == {"train": 5}
    back = layout.unflatten(layout.flatten(params))
    assert back["head"] is back["embed"]
    layout.check({"embed": table, "other": params["other"], "head": table.copy()})
    with pytest.raises(LayoutMismatch, match="'head' is tied to 'embed'"):
        layout.flatten({**params, "head": table + 1})
    with pytest.raises(ConfigError, match=r"model\.head"):
        Layout.of(params, {"head": Role.LOCAL})


def test_views_that_read_the_same_memory_differently_are_not_tied():
    table = np.arange(4, dtype=np.float32).reshape(2, 2)
    assert Layout.of({"a": table, "b": table.T, "c": table[:1]}).aliases == ()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"fc.weight": np.zeros((3, 2), np.float32)}, "fc.weight"),
        ({"fc.weight": np.zeros((2, 3), np.float64)}, "fc.weight"),
        ({"extra": np.zeros(1, np.float32)}, "extra"),
        ({"scale": None}, "scale"),
        ({"bn.count": np.zeros(2, np.int64)}, "bn.count"),
    ],
)
def test_a_model_that_differs_is_refused_naming_the_tensor(change, names):
    layout = Layout.of(model(), ROLES)
    params = {name: array for name, array in (model() | change).items() if array is not None}
    for question in (layout.flatten, layout.check):
        with pytest.raises(LayoutMismatch, match=f"'{names}'"):
            question(params)


def test_only_travelling_tensors_are_needed_to_flatten_but_all_to_check():
    layout = Layout.of(model(), ROLES)
    params = {name: model()[name] for name in layout.slots}
    layout.flatten(params)
    with pytest.raises(LayoutMismatch, match=r"'bn.count' .* missing"):
        layout.check(params)


def test_fixed_tensors_are_compared_by_digest():
    layout = Layout.of(model(), ROLES)
    layout.check(model())
    with pytest.raises(LayoutMismatch, match="'frozen' is fixed"):
        layout.check(model() | {"frozen": np.array([1, 3], np.int8)})


def test_digest_does_not_depend_on_byte_order_or_memory_order():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert tensor_digest(array) == tensor_digest(np.asfortranarray(array)) == tensor_digest(array.astype(">f4"))
    assert tensor_digest(array) == hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()


@pytest.mark.parametrize(
    "vectors",
    [
        {},
        {"train": np.zeros(7, np.float32)},
        {"train": np.zeros(6, np.float32), "mean": np.zeros(2, np.float32)},
        {"train": np.zeros(7, np.float64), "mean": np.zeros(2, np.float32)},
    ],
)
def test_other_vectors_than_the_layouts_are_refused(vectors):
    layout = Layout.of(model(), ROLES)
    with pytest.raises(LayoutMismatch):
        layout.unflatten(vectors)
    with pytest.raises(LayoutMismatch):
        model_hash(layout, vectors)


def test_layout_survives_pickling_after_its_hash_was_asked_for():
    layout = Layout.of(model(), ROLES)
    assert layout.hash
    assert layout.vectors
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout
    assert again.hash == layout.hash


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_layout_or_a_wire_error(data):
    with contextlib.suppress(WireError):
        Layout.from_bytes(data)


def spec(**change: object) -> dict[str, object]:
    return {"digest": "", "dtype": "float32", "name": "w", "role": "train", "shape": [2]} | change


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"aliases": [], "tensors": [spec(shape=[-1])]},
        {"aliases": [], "tensors": [spec(shape=[2**50])]},
        {"aliases": [], "tensors": [spec(shape=[2**39, 2**39])]},
        {"aliases": [], "tensors": [spec(shape=[10**40])]},
        {"aliases": [], "tensors": [spec(shape=[1] * 33)]},
        {"aliases": [], "tensors": [spec(shape=["2"])]},
        {"aliases": [], "tensors": [spec(), spec()]},
        {"aliases": [], "tensors": [spec(shape=[2**40]), spec(name="v", shape=[2**40])]},
        {"aliases": [], "tensors": [spec(name="")]},
        {"aliases": [], "tensors": [spec(name="n" * 1025)]},
        {"aliases": [], "tensors": [spec(dtype="int64")]},
        {"aliases": [], "tensors": [spec(dtype="complex64", role="mean")]},
        {"aliases": [], "tensors": [spec(role="other")]},
        {"aliases": [], "tensors": [spec(role="fixed")]},
        {"aliases": [], "tensors": [spec(digest="ab")]},
        {"aliases": [], "tensors": [spec(more=1)]},
        {"aliases": [{"name": "v", "of": "u"}], "tensors": [spec()]},
        {"aliases": [{"name": "w", "of": "w"}], "tensors": [spec()]},
        {"aliases": [{"name": "", "of": "w"}], "tensors": [spec()]},
    ],
)
def test_hostile_layouts_are_refused(document):
    with pytest.raises(WireError):
        Layout.from_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def test_bytes_that_are_not_canonical_are_refused():
    data = Layout.of({"w": np.zeros(2, np.float32)}).to_bytes()
    with pytest.raises(WireError, match="canonical"):
        Layout.from_bytes(data.replace(b",", b", "))
    with pytest.raises(WireError, match="more than"):
        Layout.from_bytes(b" " * (16 * 2**20 + 1))


def test_a_lone_surrogate_is_no_name():
    with pytest.raises(WireError, match="name"):
        TensorSpec("\ud800", (1,), "float32", Role.TRAIN)
