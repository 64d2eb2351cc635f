"""What a strategy is, and the parts that strategies share.

After the sum only IEEE float64 operations with one right answer: elementwise ``+ - * /``, ``sqrt``, comparison
and casts. No BLAS, no ``**``, ``exp`` or ``log`` on arrays: those differ by machine and number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple, Protocol, cast

import numpy as np

from hierfl import buffers, kernels_finish, parallel
from hierfl.aggregation import FINISH_BLOCK, ColumnGroup, GroupKind, PartialAggregate, Weighting, choose_scale
from hierfl.errors import ConfigError, ConfigErrors, StoreDamaged, ValueOutOfRange
from hierfl.layout import Layout
from hierfl.types import Float32Array, Float64Array

__all__ = [
    "FLAG",
    "FRACTION",
    "NOT_NEGATIVE",
    "POSITIVE",
    "Memory",
    "Rule",
    "State",
    "Step",
    "Strategy",
    "Vectors",
    "advance",
    "check_options",
    "delta_groups",
    "power",
    "zeros_like_train",
]

Vectors = Mapping[str, Float32Array]
"""A model as its layout's flat vectors, each of shape ``(n,)``."""

Memory = Mapping[str, Float64Array]
Step = Callable[[Float64Array, Memory], tuple[Float64Array, Memory]]
"""From the mean delta and what is remembered of it, to the step and what to remember: value by value, in blocks."""

MEAN_MAX_ABS = 2.0**20
SHARE = 64 * FINISH_BLOCK
"""Values that a thread does before it takes up others."""
STEP = "step"


@dataclass(frozen=True, eq=False)
class State:
    """What a strategy remembers between rounds: how many rounds it has applied, and named vectors."""

    step: int = 0
    arrays: Mapping[str, Float64Array] = field(default_factory=dict)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, for a safetensors blob; ``step`` is 0-d, int64."""
        return {STEP: np.array(self.step, np.int64), **self.arrays}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> State:
        """Read what ``to_arrays`` gave.

        Raises:
            StoreDamaged: It is not that.
        """
        step = arrays.get(STEP)
        if step is None or step.dtype != np.int64 or step.shape != () or step < 0:
            raise StoreDamaged("a strategy's state has no count of its steps")
        vectors = {name: array for name, array in arrays.items() if name != STEP}
        for name, array in vectors.items():
            if array.dtype != np.float64:
                raise StoreDamaged(f"a strategy's state has {name!r} as {array.dtype}, not float64")
        return cls(int(step), vectors)


class Strategy(Protocol):
    """Turns the sum over all regions into the next global model.

    It sees sums, never one client's update, so it needs no access to any zone. A strategy is a frozen, keyword-only
    dataclass of its options, which checks them in ``__post_init__``.
    """

    exact_in_two_tiers: ClassVar[bool]
    """Whether the model's bits do not depend on the grouping of clients into regions."""

    def column_groups(
        self, layout: Layout, *, max_abs: float = 8.0, total_weight: int = 2**27
    ) -> tuple[ColumnGroup, ...]:
        """What clients send and how it is summed, from the job's caps."""
        ...

    def client_part(self) -> Mapping[str, float]:
        """Numbers that the clients' training needs, such as ``proximal_mu``."""
        ...

    def init(self, params: Vectors) -> State:
        """The state before the first round."""
        ...

    def apply(self, params: Vectors, total: PartialAggregate, state: State) -> tuple[dict[str, Float32Array], State]:
        """The next model and state; ``params`` and ``state`` stay as they are."""
        ...


def delta_groups(layout: Layout, max_abs: float, total_weight: int) -> tuple[ColumnGroup, ...]:
    """One group for each of the layout's vectors: ``train`` fixed within ``max_abs``, ``mean`` wide within 2**20.

    Raises:
        ConfigError: The caps leave too few fraction bits; names what to lower.
    """
    forms = {"train": (GroupKind.FIXED, max_abs), "mean": (GroupKind.WIDE, MEAN_MAX_ABS)}
    return tuple(
        ColumnGroup(
            name=name,
            kind=forms[name][0],
            s=choose_scale(forms[name][1], total_weight, forms[name][0]),
            max_abs=forms[name][1],
            weighting=Weighting.WEIGHT,
            num_values=size,
        )
        for name, size in layout.vectors.items()
    )


def zeros_like_train(params: Vectors) -> Float64Array:
    """As many float64 zeros as ``train`` has values."""
    return np.zeros(params["train"].size if "train" in params else 0, np.float64)


def advance(
    params: Vectors, total: PartialAggregate, state: State, step: Step | float
) -> tuple[dict[str, Float32Array], State]:
    """One round of an elementwise rule: the next model is ``float32(params + step)``, vector by vector.

    ``train`` moves by what ``step`` makes of its mean delta, or by ``step`` times it where that is a number; all other
    vectors move by their mean delta. Works on blocks that fit the cache, on several threads; no bit depends on where
    they end, or on who does them.

    Raises:
        ValueOutOfRange: No update is in the sum, or a value of the model would not be finite.
        StoreDamaged: The state is another model's.
    """
    total.require_updates()
    if any("train" in params and array.shape != params["train"].shape for array in state.arrays.values()):
        raise StoreDamaged("a strategy's state has another number of values than the model")
    made = _Move(params, total, state.arrays, step)
    for name, vector in params.items():
        found = parallel.each(partial(made.share, name), range(0, vector.size, SHARE))
        bad = next((index for index in found if index >= 0), -1)
        if bad >= 0:
            raise ValueOutOfRange(
                f"value {bad} of vector {name!r} would become {made.model[name][bad]}; try a lower learning rate"
            )
    return made.model, State(state.step + 1, made.after)


class _Move:
    """A model on its way to the next one, of which several threads each do a share.

    Methods return the index of the first value that is not finite, or -1.
    """

    def __init__(self, params: Vectors, total: PartialAggregate, arrays: Memory, step: Step | float) -> None:
        self._params, self._total, self._arrays, self._step = params, total, arrays, step
        self._groups = {group.name: group for group in total.groups}
        self.model = {name: buffers.empty(vector.size, np.float32) for name, vector in params.items()}
        self.after = {key: buffers.empty(array.size, np.float64) for key, array in arrays.items()}

    def share(self, name: str, first: int) -> int:
        """``SHARE`` values of a vector, from ``first`` on."""
        step = self._step if name == "train" else 1.0
        if not callable(step) and self._groups[name].kind is not GroupKind.WIDE:
            bad = self._follow(name, slice(first, first + SHARE), float(step))
            return bad if bad < 0 else first + bad
        for start in range(first, min(first + SHARE, self._params[name].size), FINISH_BLOCK):
            bad = self._block(name, slice(start, start + FINISH_BLOCK), step)
            if bad >= 0:
                return start + bad
        return -1

    def _follow(self, name: str, part: slice, rate: float) -> int:
        """In one pass, where the step is the mean delta times a number."""
        sums, (divisor, scale) = self._total.sums[name][part], self._total.units(self._groups[name])
        kernel = kernels_finish.active().follow
        return kernel(self._params[name][part], sums, divisor, scale, rate, self.model[name][part])

    def _block(self, name: str, part: slice, step: Step | float) -> int:
        change = self._total.finish_part(self._groups[name], part)
        if callable(step):
            change, memory = step(change, {key: array[part] for key, array in self._arrays.items()})
            for key, values in memory.items():
                self.after[key][part] = values
        else:
            change *= step
        return kernels_finish.active().move(self._params[name][part], change, self.model[name][part])


def power(base: float, exponent: int) -> float:
    """``base`` times itself by repeated multiplication, left to right: the same bits everywhere, unlike ``**``."""
    product = 1.0
    for _ in range(exponent):
        product *= base
    return product


class Rule(NamedTuple):
    """What an option must be, as a test and as the words of its error."""

    holds: Callable[[object], bool]
    words: str


def _number(holds: Callable[[float], bool]) -> Callable[[object], bool]:
    def test(value: object) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(cast("float", value)) and holds(cast("float", value))

    return test


POSITIVE = Rule(_number(lambda value: value > 0), "must be a number above 0")
NOT_NEGATIVE = Rule(_number(lambda value: value >= 0), "must be a number, at least 0")
FRACTION = Rule(_number(lambda value: 0 <= value < 1), "must be a number from 0 to below 1")
FLAG = Rule(lambda value: isinstance(value, bool), "must be true or false")


def check_options(strategy: object, **rules: Rule) -> None:
    """Hold a strategy's options against their rules.

    Raises:
        ConfigError: Names the option that breaks its rule, ``strategy.OPTION``; ``ConfigErrors`` if several do.
    """
    values = {option: getattr(strategy, option) for option in rules}
    errors = [
        ConfigError(f"strategy.{option}", values[option], rule.words)
        for option, rule in rules.items()
        if not rule.holds(values[option])
    ]
    if len(errors) > 1:
        raise ConfigErrors(tuple(errors))
    if errors:
        raise errors[0]
