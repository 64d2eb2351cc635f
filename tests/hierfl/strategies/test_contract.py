"""What every strategy keeps, whatever its rule; and how strategies are found."""

from __future__ import annotations

import dataclasses
import pickle
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

from hierfl.aggregation import Accumulator, GroupKind, PartialAggregate
from hierfl.errors import ConfigError, ConfigErrors, StoreDamaged, ValueOutOfRange
from hierfl.layout import Layout, Role
from hierfl.strategies import State, get, names, power

BUILT_IN = ("fedadagrad", "fedadam", "fedavg", "fedavgm", "fedprox", "fedyogi")
every_strategy = pytest.mark.parametrize("name", BUILT_IN)


def test_all_built_in_strategies_are_listed():
    assert set(BUILT_IN) <= set(names())


@every_strategy
def test_strategies_are_exact_in_two_tiers_frozen_and_survive_pickling(name):
    strategy = get(name)
    assert strategy.exact_in_two_tiers is True
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.learning_rate = 2.0


@every_strategy
def test_groups_are_fixed_for_train_and_wide_for_mean(name, layout):
    train, mean = get(name).column_groups(layout, max_abs=4, total_weight=2**27)
    assert (train.name, train.kind, train.s, train.max_abs, train.num_values) == ("train", GroupKind.FIXED, 32, 4, 6)
    assert (mean.name, mean.kind, mean.s, mean.max_abs, mean.num_values) == ("mean", GroupKind.WIDE, 32, 2**20, 2)


@every_strategy
def test_apply_changes_nothing_that_it_was_given_and_repeats_itself(name, params, total):
    strategy = get(name)
    state = strategy.init(params)
    before = {vector: values.tobytes() for vector, values in params.items()}
    remembered = {vector: values.tobytes() for vector, values in state.arrays.items()}
    for array in (*params.values(), *state.arrays.values()):
        array.flags.writeable = False
    first, next_state = strategy.apply(params, total(strategy, 1), state)
    again, _ = strategy.apply(params, total(strategy, 1), state)
    assert {vector: values.tobytes() for vector, values in params.items()} == before
    assert {vector: values.tobytes() for vector, values in state.arrays.items()} == remembered
    assert (state.step, next_state.step) == (0, 1)
    for vector, values in first.items():
        assert values.dtype == np.float32
        assert values.tobytes() == again[vector].tobytes()


@every_strategy
def test_a_state_that_was_stored_goes_on_with_the_same_bits(name, params, total):
    strategy = get(name)
    model, state = strategy.apply(params, total(strategy, 1), strategy.init(params))
    stored = State.from_arrays(state.to_arrays())
    straight, _ = strategy.apply(model, total(strategy, 2), state)
    resumed, _ = strategy.apply(model, total(strategy, 2), stored)
    assert straight["train"].tobytes() == resumed["train"].tobytes()


@every_strategy
def test_a_model_without_a_train_vector_takes_the_plain_mean(name):
    layout = Layout.of({"running": np.ones(2, np.float32)}, {"running": Role.MEAN})
    strategy, params = get(name), {"mean": np.ones(2, np.float32)}
    sums = Accumulator(strategy.column_groups(layout))
    sums.fold({"mean": [np.array([1, 2], np.float32)]}, 3)
    moved, _ = strategy.apply(params, sums.partial(1), strategy.init(params))
    assert {vector: values.tolist() for vector, values in moved.items()} == {"mean": [2, 3]}


@every_strategy
def test_a_model_that_would_not_be_finite_is_refused(name, params, total):
    strategy = get(name, {"learning_rate": 1e300})
    with pytest.raises(ValueOutOfRange, match="lower learning rate"):
        strategy.apply(params, total(strategy, 1), strategy.init(params))


def test_the_state_of_another_model_is_refused(params, total):
    strategy = get("fedavgm")
    with pytest.raises(StoreDamaged, match="another number of values"):
        strategy.apply(params, total(strategy, 1), strategy.init({"train": np.zeros(2, np.float32)}))


@every_strategy
def test_a_round_over_nobody_is_refused(name, params, layout):
    strategy = get(name)
    nobody = PartialAggregate.empty(strategy.column_groups(layout))
    with pytest.raises(ValueOutOfRange, match="no update"):
        strategy.apply(params, nobody, strategy.init(params))


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"step": np.array(1.0)},
        {"step": np.array([1])},
        {"step": np.array(-1)},
        {"step": np.array(1), "m": np.zeros(2, np.float32)},
    ],
)
def test_damaged_states_are_refused(arrays):
    with pytest.raises(StoreDamaged):
        State.from_arrays(arrays)


def test_powers_are_products():
    assert power(0.9, 0) == 1.0
    assert power(0.9, 3) == 0.9 * 0.9 * 0.9
    assert power(0.0, 5) == 0.0


# --- by name


def test_an_unknown_name_names_the_near_one():
    with pytest.raises(ConfigError, match=r"strategy\.name = 'fedavgn' is no strategy; did you mean 'fedavg"):
        get("fedavgn")
    with pytest.raises(ConfigError, match=r"there are .*fedyogi"):
        get("zzz")


def test_an_unknown_option_names_the_near_one_and_all_are_told():
    with pytest.raises(ConfigError, match="is no option of fedavg; did you mean 'learning_rate'"):
        get("fedavg", {"learning_rat": 1.0})
    with pytest.raises(ConfigErrors) as caught:
        get("fedavg", {"a": 1, "b": 2})
    assert [error.key for error in caught.value.errors] == ["strategy.a", "strategy.b"]


PLUG_IN = """
from dataclasses import dataclass
from typing import ClassVar

from hierfl.strategies import State, advance, delta_groups


@dataclass(frozen=True, kw_only=True)
class Half:
    exact_in_two_tiers: ClassVar[bool] = True
    share: float = 0.5

    def column_groups(self, layout, *, max_abs=8.0, total_weight=2**27):
        return delta_groups(layout, max_abs, total_weight)

    def client_part(self):
        return {}

    def init(self, params):
        return State()

    def apply(self, params, total, state):
        return advance(params, total, state, lambda delta, _: (self.share * delta, {}))


NOT_A_CLASS = 3
"""


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of somebody else's, installed as pip would: a module and its metadata."""
    (tmp_path / "half_strategy.py").write_text(PLUG_IN)
    metadata = tmp_path / "half_strategy-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: half-strategy\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[hierfl.strategies]\nhalf = half_strategy:Half\nnumber = half_strategy:NOT_A_CLASS\n"
        "gone = half_strategy:Gone\nmissing = no_such_module:X\nfedavg = half_strategy:Half\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "half" in entry_points(group="hierfl.strategies").names


@pytest.mark.usefixtures("plug_in")
def test_third_parties_register_strategies_by_entry_point(same_bits_as):
    assert "half" in names()
    strategy = get("half", {"share": 0.25})
    same_bits_as(strategy, lambda t, x, d, memory: x + 0.25 * d)
    with pytest.raises(ConfigError, match="did you mean 'share'"):
        get("half", {"shar": 1})


@pytest.mark.usefixtures("plug_in")
def test_a_built_in_name_cannot_be_registered_over():
    assert type(get("fedavg")).__name__ == "FedAvg"


@pytest.mark.usefixtures("plug_in")
@pytest.mark.parametrize(
    ("name", "words"), [("number", "must be a dataclass"), ("gone", "Gone"), ("missing", "no_such_module")]
)
def test_an_entry_point_that_leads_nowhere_is_said(name, words):
    with pytest.raises(ConfigError, match=rf"strategy\.name = '{name}'.*{words}"):
        get(name)
