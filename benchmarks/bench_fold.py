"""What is done to every value of a model, in CPU time: check, fold, add, pack, finish, apply, hash.

The update comes as it does from the wire: in read-only chunks of 1 MiB. All but the hash is held against copying the
update's values, also what touches more bytes than that (sums of 64 and 128 bits, a strategy's memory).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from benchmarks.harness import Figure, alternate, cpu_seconds
from hierfl import encodings, kernels_encodings
from hierfl import packing as packed
from hierfl.aggregation import Accumulator, ColumnGroup, GroupKind, PartialAggregate, Weighting, check_values
from hierfl.layout import Layout, model_hash
from hierfl.packing import PackedSums
from hierfl.strategies import Strategy, get
from hierfl.types import Float32Array

__all__ = ["measure"]

CHUNK_BYTES = 2**20
PIECE_WORDS = CHUNK_BYTES // 8
WEIGHT = 1000
TRAIN = "train"
ENCODINGS = ("float32", "bfloat16", "int8", "topk")
"""With their defaults: int8 in blocks of 256, one value of a hundred of topk (randomk is folded alike)."""

Actions = Mapping[str, Callable[[], object]]


def measure(seed: int, num_values: int = 25_000_000, repeats: int = 9) -> tuple[Figure, ...]:
    """Medians over ``repeats`` runs of each; ``seed`` is that of the update's values.

    Raises:
        RuntimeError: numba is not installed: servers never run without it.
    """
    if not kernels_encodings.warm_up():
        raise RuntimeError("numba is not installed: pip install 'hierfl[server]'")
    vector = np.random.default_rng(seed).standard_normal(num_values, np.float32) * np.float32(0.01)
    chunks = received(vector)
    copied = f"copying the update ({4 * num_values / 1e6:g} MB)"
    encoded = f"copying it as float32 ({4 * num_values / 1e6:g} MB)"
    hashed = "`hashlib.sha256` of the same bytes"
    return (
        *beside(copied, partial(copy, chunks, vector), folding(chunks, num_values), repeats),
        *beside(encoded, partial(copy, chunks, vector), decoding(vector), repeats),
        *beside(copied, partial(copy, chunks, vector), merging(chunks, vector), repeats),
        *beside(hashed, lambda: hashlib.sha256(vector.data).digest(), hashing(vector), repeats),
    )


def beside(name: str, yardstick: Callable[[], object], actions: Actions, repeats: int) -> list[Figure]:
    """Time ``actions`` in turns with ``yardstick``."""
    timings = {key: partial(cpu_seconds, action) for key, action in {name: yardstick, **actions}.items()}
    taken = alternate(repeats, timings)
    return [Figure(name=key, cpu_s=taken[key], beside=name, beside_cpu_s=taken[name]) for key in actions]


def received(vector: np.ndarray) -> list[np.ndarray]:
    """``vector`` as read-only chunks, each over bytes of its own."""
    full = CHUNK_BYTES // vector.itemsize
    starts = range(0, vector.size, full)
    return [np.frombuffer(vector[start : start + full].tobytes(), vector.dtype) for start in starts]


def copy(chunks: list[Float32Array], into: Float32Array) -> None:
    start = 0
    for chunk in chunks:
        into[start : start + chunk.size] = chunk
        start += chunk.size


def folding(chunks: list[Float32Array], num_values: int) -> Actions:
    """An intake's work on one update."""
    fixed, wide = group(GroupKind.FIXED, 8.0, num_values), group(GroupKind.WIDE, 2.0**20, num_values)
    return {
        "check an update's values": partial(check, fixed, chunks),
        "fold an update, 64-bit sums": partial(Accumulator((fixed,)).fold, {TRAIN: chunks}, WEIGHT),
        "fold an update, 128-bit sums": partial(Accumulator((wide,)).fold, {TRAIN: chunks}, WEIGHT),
    }


def decoding(vector: Float32Array) -> Actions:
    """An intake's work on one encoded update: check it, claim it, fold it (which checks it again)."""
    fixed, actions = group(GroupKind.FIXED, 8.0, vector.size), {}
    for name in ENCODINGS:
        encoding = encodings.get(name)
        wire = {key: received(part) for key, part in encoding.encode(fixed, vector, 0).items()}
        actions[f"check an update as {name}"] = partial(encoding.check, fixed, wire)
        actions[f"fold an update as {name}"] = partial(Accumulator((fixed,), encoding).fold, wire, WEIGHT)
    return actions


def check(column_group: ColumnGroup, chunks: list[Float32Array]) -> None:
    for chunk in chunks:
        check_values(column_group, chunk)


def group(kind: GroupKind, max_abs: float, num_values: int) -> ColumnGroup:
    return ColumnGroup(name=TRAIN, kind=kind, s=32, max_abs=max_abs, weighting=Weighting.WEIGHT, num_values=num_values)


def merging(chunks: list[Float32Array], model: Float32Array) -> Actions:
    """The controller's work on one partial aggregate, and once a round."""
    layout, params = Layout.of({"w": model}), {TRAIN: model}
    fedavg, fedadam = get("fedavg", {}), get("fedadam", {})
    groups = fedavg.column_groups(layout)
    sums = Accumulator(groups)
    sums.fold({TRAIN: chunks}, WEIGHT)
    total = sums.partial(1)
    return {
        "add a partial aggregate": partial(Accumulator(groups).add, total),
        **packing(groups, total),
        "finish: sums to means": total.finish,
        "FedAvg, finish included": applying(fedavg, params, total),
        "FedAdam, finish included": applying(fedadam, params, total),
    }


def packing(groups: tuple[ColumnGroup, ...], total: PartialAggregate) -> Actions:
    """A region's work on its partial aggregate, and the controller's on what comes of it."""
    blocks = packed.measure(groups, total.sums)
    pieces = [piece.copy() for piece in packed.pack(blocks, total.sums, PIECE_WORDS)]
    return {
        "pack a partial aggregate": lambda: sum(
            piece.size for piece in packed.pack(packed.measure(groups, total.sums), total.sums, PIECE_WORDS)
        ),
        "unpack one and add it": partial(PackedSums(blocks, pieces).add_into, Accumulator(groups).partial(0).sums),
    }


def applying(strategy: Strategy, params: Mapping[str, Float32Array], total: PartialAggregate) -> Callable[[], object]:
    return partial(strategy.apply, params, total, strategy.init(params))


def hashing(model: Float32Array) -> Actions:
    layout = Layout.of({"w": model})
    return {"`model_hash`": partial(model_hash, layout, {TRAIN: model})}
