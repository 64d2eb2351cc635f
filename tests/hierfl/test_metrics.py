"""Metrics: declared, bounded, summed as integers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hierfl.errors import ConfigError, ValueOutOfRange
from hierfl.metrics import MetricSpec, add_metrics, check_metric_sums, metric_values, quantise_metrics

LOSS = MetricSpec(name="loss_sum", scale=20, max_abs=2**20)
RIGHT = MetricSpec(name="num_correct", scale=0, max_abs=2**32)
SPECS = (LOSS, RIGHT)


def test_values_become_the_nearest_integers():
    assert quantise_metrics(SPECS, {"loss_sum": 1.5, "num_correct": 12}) == {"loss_sum": 3 * 2**19, "num_correct": 12}
    assert quantise_metrics(SPECS, {"num_correct": 2.5}) == {"num_correct": 2}  # half to even
    assert quantise_metrics(SPECS, {}) == {}


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"loss_sum": float("nan")}, "loss_sum"),
        ({"loss_sum": float("-inf")}, "loss_sum"),
        ({"num_correct": 2**32 + 1}, "num_correct"),
        ({"patient": 1.0}, "patient"),
    ],
)
def test_what_does_not_fit_the_declaration_is_refused_by_name(values, name):
    with pytest.raises(ValueOutOfRange, match=f"'{name}'"):
        quantise_metrics(SPECS, values)


@given(st.lists(st.floats(-(2.0**20), 2.0**20), min_size=1, max_size=10))
def test_sums_do_not_depend_on_order(values):
    one: dict[str, int] = {}
    other: dict[str, int] = {}
    for value in values:
        one = add_metrics(one, quantise_metrics(SPECS, {"loss_sum": value}))
    for value in reversed(values):
        other = add_metrics(quantise_metrics(SPECS, {"loss_sum": value}), other)
    assert one == other
    check_metric_sums(SPECS, one, len(values))
    assert metric_values(SPECS, one)["loss_sum"] == pytest.approx(sum(values), abs=len(values) * 2**-21)


def test_sums_that_updates_cannot_have_are_refused():
    check_metric_sums(SPECS, {"num_correct": -(2**33)}, 2)
    with pytest.raises(ValueOutOfRange, match="'num_correct'"):
        check_metric_sums(SPECS, {"num_correct": 2**33 + 1}, 2)
    with pytest.raises(ValueOutOfRange, match="'patient'"):
        check_metric_sums(SPECS, {"patient": 0}, 2)


@pytest.mark.parametrize("change", [{"scale": -1}, {"scale": 41}, {"max_abs": 0}, {"max_abs": 2**29}, {"name": ""}])
def test_declarations_that_cannot_be_are_refused(change):
    with pytest.raises(ConfigError, match="metrics"):
        MetricSpec(**({"name": "x", "scale": 20, "max_abs": 1} | change))
