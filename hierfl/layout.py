"""Layout: which tensors a model has, and where each one's values stand in the flat vectors that travel.

Order is the layout's, never a dict's. Two vectors exist, in this order: ``train`` (the strategy moves it)
and ``mean`` (plain weighted mean, whatever the strategy); one without values does not exist. Vectors are
float32 masters, whatever the tensor's own dtype. Local and fixed tensors are in no vector.

The layout's hash is the SHA-256 of ``Layout.to_bytes()``: UTF-8 JSON, keys sorted, no white space::

    {"aliases":[{"name":...,"of":...}],
     "tensors":[{"digest":"","dtype":"float32","name":"fc.bias","role":"train","shape":[10]}]}

bfloat16 has no NumPy dtype: who reads such a model widens it to float32 (exact) first.
"""

from __future__ import annotations

import hashlib
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np

from hierfl import buffers, documents
from hierfl.errors import ConfigError, LayoutMismatch, ValueOutOfRange, WireError
from hierfl.types import Float32Array, ModelHash, Params

__all__ = ["Alias", "Layout", "Role", "Slot", "TensorSpec", "default_role", "model_hash", "tensor_digest"]

MAX_TENSORS = 65_536
MAX_NAME_BYTES = 1_024
MAX_RANK = 32
MAX_VALUES = 2**40
"""Caps on what a layout from a peer may claim, checked before anything is allocated."""

MODEL_HASH_CONTEXT = b"hierfl.model/1\0"
CARRIED_DTYPES = frozenset({"float16", "float32", "float64"})
"""Dtypes that a float32 master can stand for; float64 only where the job says ``cast``."""

_SHA256_HEX = re.compile(r"[0-9a-f]{64}")


class Role(StrEnum):
    """What happens to a tensor in a round."""

    TRAIN = "train"  # the strategy applies
    MEAN = "mean"  # floating buffers, such as BatchNorm's running statistics: plain weighted mean
    LOCAL = "local"  # never leaves its site: personal layers, integer counters
    FIXED = "fixed"  # only compared, by digest


VECTOR_OF = {Role.TRAIN: "train", Role.MEAN: "mean"}
"""The vector that carries a role, in the order of the vectors."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: ``dtype`` is NumPy's name for its own dtype, ``digest`` its ``tensor_digest`` if fixed."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    digest: str = ""

    def __post_init__(self) -> None:
        self._require(_is_name(self.name), f"must have a name of 1 to {MAX_NAME_BYTES} bytes of UTF-8")
        self._require(len(self.shape) <= MAX_RANK, f"must have at most {MAX_RANK} dimensions")
        self._require(all(0 <= length <= MAX_VALUES for length in self.shape), "has a length out of range")
        self._require(self.size <= MAX_VALUES, f"must have at most {MAX_VALUES} values")
        self._require(1 <= len(self.dtype) <= 32, "must name its dtype")
        carried = self.role not in VECTOR_OF or self.dtype in CARRIED_DTYPES
        self._require(carried, f"of dtype {self.dtype[:32]} cannot have the role {self.role}")
        if self.role is Role.FIXED:
            self._require(bool(_SHA256_HEX.fullmatch(self.digest)), "is fixed, and needs a SHA-256 digest")
        else:
            self._require(not self.digest, "is not fixed, and has no digest")

    def _require(self, ok: bool, rule: str) -> None:
        if not ok:
            raise WireError(f"layout: tensor {self.name[:80]!r} {rule}")

    @property
    def size(self) -> int:
        """Number of values; 1 for a 0-d tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Alias:
    """``name`` is tied to the tensor ``of``: the same values under a second name, counted once."""

    name: str
    of: str


class Slot(NamedTuple):
    """Where a tensor's values stand: ``vector[start:stop]``, in C order."""

    vector: str
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """All tensors of a model in their order, and names tied to them."""

    tensors: tuple[TensorSpec, ...]
    aliases: tuple[Alias, ...] = ()

    def __post_init__(self) -> None:
        names = {spec.name for spec in self.tensors}
        if len(self.tensors) + len(self.aliases) > MAX_TENSORS:
            raise WireError(f"layout: more than {MAX_TENSORS} tensors")
        if len(names | {alias.name for alias in self.aliases}) != len(self.tensors) + len(self.aliases):
            raise WireError("layout: a name stands twice")
        if not all(_is_name(alias.name) for alias in self.aliases):
            raise WireError(f"layout: an alias must have a name of 1 to {MAX_NAME_BYTES} bytes of UTF-8")
        for alias in self.aliases:
            if alias.of not in names:
                raise WireError(f"layout: {alias.name[:80]!r} is tied to {alias.of[:80]!r}, which is no tensor")
        if sum(spec.size for spec in self.tensors) > MAX_VALUES:
            raise WireError(f"layout: more than {MAX_VALUES} values")

    @classmethod
    def of(
        cls,
        params: Params,
        roles: Mapping[str, Role] | Callable[[str, np.ndarray], Role] | None = None,
        *,
        cast: bool = False,
    ) -> Layout:
        """The layout of a model as it is in memory; two names for the same memory become one tensor.

        Args:
            params: Named arrays, in the order that the layout is to have.
            roles: By name, or a function of (name, array); names left out get ``default_role``.
            cast: Carry float64 tensors as float32.
        Raises:
            ConfigError: A tensor's dtype does not fit its role, or ``roles`` names what is not there.
        """
        role_of = _role_function(params, roles)
        specs: dict[str, TensorSpec] = {}
        aliases: list[Alias] = []
        first_at: dict[object, str] = {}
        for name, value in params.items():
            array = np.asarray(value)
            role = role_of(name, array)
            first = first_at.setdefault(_memory_of(name, array), name)
            if first == name:
                specs[name] = _spec_of(name, array, role, cast)
            elif specs[first].role is role:
                aliases.append(Alias(name, first))
            else:
                raise ConfigError(f"model.{name}", str(role), f"must have the role of {first!r}, to which it is tied")
        if not any(spec.role in VECTOR_OF for spec in specs.values()):
            raise ConfigError("model", None, "must have at least one tensor with the role train or mean")
        return cls(tuple(specs.values()), tuple(aliases))

    def to_bytes(self) -> bytes:
        """Canonical bytes (see the module)."""
        return documents.encode({"aliases": self.aliases, "tensors": self.tensors})

    @classmethod
    def from_bytes(cls, data: bytes) -> Layout:
        """Read a peer's layout.

        Raises:
            WireError: Not canonical, too large, or against a rule of this module.
        """
        try:
            layout = documents.decode(data, cls, "layout")
        except (RecursionError, OverflowError) as error:
            raise WireError(f"layout does not fit its schema: {error}") from None
        if layout.to_bytes() != data:
            raise WireError("layout is not in its canonical form")
        return layout

    @cached_property
    def hash(self) -> str:
        """SHA-256 of ``to_bytes()``, 64 hex digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @cached_property
    def vectors(self) -> Mapping[str, int]:
        """Names of the flat float32 vectors, in order, with their numbers of values; none is empty."""
        sizes = {
            vector: sum(spec.size for spec in self.tensors if spec.role is role) for role, vector in VECTOR_OF.items()
        }
        return {vector: size for vector, size in sizes.items() if size}

    @property
    def num_params(self) -> int:
        """Values in all vectors: what travels."""
        return sum(self.vectors.values())

    @cached_property
    def slots(self) -> Mapping[str, Slot]:
        """Place of each train and mean tensor, by name, in the layout's order."""
        ends = dict.fromkeys(VECTOR_OF.values(), 0)
        slots: dict[str, Slot] = {}
        for spec in self.tensors:
            if spec.role in VECTOR_OF:
                vector = VECTOR_OF[spec.role]
                slots[spec.name] = Slot(vector, ends[vector], ends[vector] + spec.size)
                ends[vector] += spec.size
        return slots

    def tensor_at(self, vector: str, index: int) -> str:
        """Name of the tensor that holds value ``index`` of ``vector``."""
        slots = [(name, slot) for name, slot in self.slots.items() if slot.vector == vector and slot.stop > slot.start]
        return slots[bisect_right([slot.start for _, slot in slots], index) - 1][0]

    def check(self, params: Params) -> None:
        """Compare a whole model with the layout: every name, shape, dtype, tie, and fixed tensor's digest.

        Raises:
            LayoutMismatch: Names the first tensor that differs.
        """
        self._check_names(params, required={spec.name for spec in self.tensors})
        self._check_arrays(params)
        for spec in self.tensors:
            if spec.role is Role.FIXED and tensor_digest(np.asarray(params[spec.name])) != spec.digest:
                raise LayoutMismatch(f"tensor {spec.name!r} is fixed, and its values are not those of the run's model")

    def flatten(self, params: Params, minus: Mapping[str, Float32Array] | None = None) -> dict[str, Float32Array]:
        """Copy the train and mean tensors into new flat vectors, each of shape ``(n,)``, float32.

        Local and fixed tensors may be missing; a name that the layout lacks is refused. ``minus`` is subtracted, in
        float32: flat vectors of this layout.

        Raises:
            LayoutMismatch: Names the first tensor that differs.
        """
        self._check_names(params, required=set(self.slots))
        self._check_arrays(params)
        vectors = {name: buffers.empty(size, np.float32) for name, size in self.vectors.items()}
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are for check_values to name
            for name, slot in self.slots.items():
                if slot.stop > slot.start:
                    part, values = slice(slot.start, slot.stop), np.asarray(params[name]).reshape(-1)
                    if minus is None:
                        vectors[slot.vector][part] = values
                    else:
                        values = values.astype(np.float32, copy=False)
                        np.subtract(values, minus[slot.vector][part], out=vectors[slot.vector][part])
        return vectors

    def unflatten(self, vectors: Mapping[str, Float32Array]) -> dict[str, np.ndarray]:
        """The train and mean tensors in their own dtypes; float32 ones are views. Tied names share one array.

        Raises:
            LayoutMismatch: Other vectors than the layout's.
            ValueOutOfRange: A master value that the tensor's own dtype cannot hold.
        """
        self.check_vectors(vectors)
        params: dict[str, np.ndarray] = {}
        for spec in self.tensors:
            if spec.role in VECTOR_OF:
                params[spec.name] = _narrowed(spec, _values(vectors, self.slots[spec.name]).reshape(spec.shape))
        for alias in self.aliases:
            if alias.of in params:
                params[alias.name] = params[alias.of]
        return params

    def check_vectors(self, vectors: Mapping[str, Float32Array]) -> None:
        """Raise ``LayoutMismatch`` unless these are the layout's vectors: names, float32, lengths."""
        if set(vectors) != set(self.vectors):
            raise LayoutMismatch(f"vectors are {sorted(vectors)}, the layout has {sorted(self.vectors)}")
        for name, size in self.vectors.items():
            vector = vectors[name]
            if vector.dtype != np.float32 or vector.shape != (size,):
                raise LayoutMismatch(
                    f"vector {name!r} is {vector.dtype} {vector.shape}, the layout has float32 ({size},)"
                )

    def _check_names(self, params: Params, required: set[str]) -> None:
        known = {spec.name for spec in self.tensors} | {alias.name for alias in self.aliases}
        for name in params:
            if name not in known:
                raise LayoutMismatch(f"tensor {name!r} is not in the run's layout")
        for spec in self.tensors:
            if spec.name in required and spec.name not in params:
                raise LayoutMismatch(f"tensor {spec.name!r} of the run's layout is missing")

    def _check_arrays(self, params: Params) -> None:
        for spec in self.tensors:
            if spec.name in params:
                _check_array(spec.name, np.asarray(params[spec.name]), spec)
        by_name = {spec.name: spec for spec in self.tensors}
        for alias in self.aliases:
            if alias.name in params and alias.of in params:
                tied, first = np.asarray(params[alias.name]), np.asarray(params[alias.of])
                _check_array(alias.name, tied, by_name[alias.of])
                if _memory_of(alias.name, tied) != _memory_of(alias.of, first) and tied.tobytes() != first.tobytes():
                    raise LayoutMismatch(
                        f"tensor {alias.name!r} is tied to {alias.of!r} (they shared memory when the layout was made),"
                        " but holds other values; give them arrays of their own in init, or keep them tied"
                    )


def default_role(name: str, array: np.ndarray) -> Role:
    """Floating tensors train, all others stay local. (A framework's helper knows buffers from parameters.)"""
    del name
    return Role.TRAIN if array.dtype.kind in "fc" else Role.LOCAL


def tensor_digest(array: np.ndarray) -> str:
    """SHA-256 over a tensor's values, little-endian, in C order; 64 hex digits."""
    values = np.ascontiguousarray(array)
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<"), copy=False).reshape(-1).data).hexdigest()


def model_hash(layout: Layout, vectors: Mapping[str, Float32Array]) -> ModelHash:
    """A model's identity: SHA-256 over what it is, not over a file.

    Over ``b"hierfl.model/1\\0"``, the 32 bytes of the layout's hash, and each vector's values as
    little-endian float32, in the layout's order of vectors.

    Raises:
        LayoutMismatch: Other vectors than the layout's.
    """
    layout.check_vectors(vectors)
    state = hashlib.sha256(MODEL_HASH_CONTEXT + bytes.fromhex(layout.hash))
    for name in layout.vectors:
        state.update(np.ascontiguousarray(vectors[name], dtype="<f4").data)
    return ModelHash(state.hexdigest())


def _is_name(name: str) -> bool:
    try:
        return 1 <= len(name.encode()) <= MAX_NAME_BYTES
    except UnicodeEncodeError:  # a lone surrogate has no place in JSON
        return False


def _role_function(
    params: Params, roles: Mapping[str, Role] | Callable[[str, np.ndarray], Role] | None
) -> Callable[[str, np.ndarray], Role]:
    if roles is None:
        return default_role
    if not isinstance(roles, Mapping):
        return roles
    given = roles
    for name in given:
        if name not in params:
            raise ConfigError(f"model.{name}", None, "has a role, but is no tensor of the model")
    return lambda name, array: given.get(name) or default_role(name, array)


def _memory_of(name: str, array: np.ndarray) -> object:
    """Equal for two arrays that are the same memory read the same way; an empty array is only itself."""
    if not array.size:
        return name
    return (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str)


def _spec_of(name: str, array: np.ndarray, role: Role, cast: bool) -> TensorSpec:
    dtype, key = array.dtype.name, f"model.{name}"
    if array.dtype.kind not in "fcbiu":
        raise ConfigError(key, dtype, "is no tensor of numbers")
    if role in VECTOR_OF and dtype not in CARRIED_DTYPES:
        raise ConfigError(key, dtype, f"cannot have the role {role}: make it local or fixed, or convert it to float32")
    if role in VECTOR_OF and dtype == "float64" and not cast:
        raise ConfigError(key, dtype, "would lose precision as float32: convert it, or say cast")
    return TensorSpec(name, array.shape, dtype, role, tensor_digest(array) if role is Role.FIXED else "")


def _check_array(name: str, array: np.ndarray, spec: TensorSpec) -> None:
    if array.shape != spec.shape or array.dtype.name != spec.dtype:
        raise LayoutMismatch(
            f"tensor {name!r} is {array.dtype.name} {array.shape}, the run's layout has {spec.dtype} {spec.shape}"
        )


def _values(vectors: Mapping[str, Float32Array], slot: Slot) -> Float32Array:
    """A tensor's values; an empty tensor's vector may not exist."""
    return vectors[slot.vector][slot.start : slot.stop] if slot.stop > slot.start else np.empty(0, np.float32)


def _narrowed(spec: TensorSpec, values: Float32Array) -> np.ndarray:
    with np.errstate(over="ignore"):
        own = values.astype(spec.dtype, copy=False)
    if spec.dtype == "float16" and not np.array_equal(np.isfinite(own), np.isfinite(values)):
        raise ValueOutOfRange(f"tensor {spec.name!r} has a value above what {spec.dtype} holds")
    return own
