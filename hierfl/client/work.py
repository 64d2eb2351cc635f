"""One task, from the model's vectors to an update ready to be held: ``train`` and ``evaluate`` are called here only.

No network and no clock: what comes out depends on the plan, the model, this client's local tensors and the
site's data. Everything is checked here with the functions that the combiner uses, so that the site
learns what is wrong, by the tensor's name, before a byte leaves.
"""

from __future__ import annotations

import math
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from hierfl import buffers, observe
from hierfl.aggregation import ColumnGroup, check_values
from hierfl.client.app import App, seed_generators
from hierfl.client.params import deltas_of, local_arrays, returned_arrays
from hierfl.client.task import Declined, Metrics, Task, Update
from hierfl.errors import AppError, HierFLError, ValueOutOfRange
from hierfl.layout import Layout
from hierfl.metrics import quantise_metrics
from hierfl.plan import Plan, task_seed
from hierfl.records import UpdateHead
from hierfl.types import ClientRef, Float32Array, TaskKind

__all__ = ["Made", "TaskFailed", "do_task", "failing_with"]

T = TypeVar("T")


class TaskFailed(Exception):
    """The task gave no update: ``code`` goes to the combiner, ``sentence`` and ``details`` stay at the site."""

    def __init__(self, code: str, sentence: str, details: str = "") -> None:
        super().__init__(code, sentence, details)
        self.code, self.sentence, self.details = code, sentence, details


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a task made: flat vectors by the plan's groups, their head, and what stays here."""

    vectors: Mapping[str, Float32Array]
    head: UpdateHead
    local: Mapping[str, np.ndarray]
    said: tuple[str, ...]
    """What the site is told, sentence by sentence."""


def do_task(
    app: App,
    plan: Plan,
    layout: Layout,
    base: Mapping[str, Float32Array],
    local: Mapping[str, np.ndarray],
    site_config: Mapping[str, str],
    who: ClientRef,
) -> Made:
    """Evaluate, train, or both, as the plan asks.

    Args:
        base: The model's flat vectors; not changed.
        local: This client's local tensors from earlier rounds, or from the app's ``init``.
    Raises:
        TaskFailed: With the code to decline with.
    """

    def new_task() -> Task:
        return make_task(plan, layout, base, local, site_config, who)

    values, said = _evaluate(app, plan, new_task)
    if plan.task.kind is TaskKind.EVALUATE:
        return Made(vectors={}, head=_head(plan, values, 0), local={}, said=said)
    with observe.span(observe.SPAN_TRAIN, run=plan.run, round=plan.round, site=who.site, client=who.client) as span:
        update = _call(app.train, new_task(), Update, "train_error")
        num_examples = _num_examples(update.num_examples, "train")
        span.set(num_examples=num_examples)
    with failing_with("layout_mismatch"):
        arrays = returned_arrays(layout, update.params)
        vectors = deltas_of(layout, arrays, _as_given(layout, base))
    with failing_with("out_of_range"):
        check_update(plan.task.groups, layout, vectors)
    trained, words = _train_metrics(plan, update, num_examples)
    head = _head(plan, values | trained, num_examples)
    if head.weight < num_examples:
        words += f"; its weight is clipped to the plan's cap of {head.weight}"
    return Made(vectors=vectors, head=head, local=local_arrays(layout, arrays), said=(words, *said))


def make_task(
    plan: Plan,
    layout: Layout,
    base: Mapping[str, Float32Array],
    local: Mapping[str, np.ndarray],
    site_config: Mapping[str, str],
    who: ClientRef,
) -> Task:
    """The task with arrays of its own; tied tensors share one."""
    copies: dict[int, np.ndarray] = {}
    params = {}
    with failing_with("layout_mismatch"):
        given = {**layout.unflatten(base), **local}
    for name, array in given.items():
        if id(array) not in copies:
            copies[id(array)] = copied = buffers.empty(array.shape, array.dtype)
            copied[...] = array
        params[name] = copies[id(array)]
    return Task(
        params=params,
        config=dict(plan.task.config),
        site_config=dict(site_config),
        strategy=dict(plan.task.client_part),
        local={name: params[name] for name in local},
        layout=layout,
        seed=task_seed(plan.seed, plan.round, who),
        round=plan.round,
        run=plan.run,
        region=who.region,
        site=who.site,
        client=who.client,
    )


def check_update(groups: tuple[ColumnGroup, ...], layout: Layout, vectors: Mapping[str, Float32Array]) -> None:
    """The combiner's own check, with the tensor's name in the error.

    Raises:
        ValueOutOfRange: Names the tensor with the first NaN, infinity or value above its cap.
    """
    for group in groups:
        vector = vectors[group.name]
        try:
            check_values(group, vector)
        except ValueOutOfRange:
            index = int(np.argmax(~(np.abs(vector) <= group.limit)))
            name = layout.tensor_at(group.name, index)
            place = index - layout.slots[name].start
            raise ValueOutOfRange(
                f"tensor {name!r}: its change at flat index {place} is {vector[index]}; must be finite and at most"
                f" {group.max_abs:g} in magnitude: lower the learning rate, clip, or raise arithmetic.max_abs"
            ) from None


# ---------------------------------------------------------------- calling the app


def _call(function: Callable[[Task], Any], task: Task, kind: type[T], code: str) -> T:
    """Call user code; whatever it raises becomes a ``TaskFailed`` with a code of the fixed list."""
    name = code.removesuffix("_error")
    seed_generators(task.seed)
    try:
        result = function(task)
    except Declined as error:
        raise TaskFailed("declined", f"{name} sat this round out: {error}") from None
    except (Exception, SystemExit) as error:
        raise TaskFailed(_code_of(error, code), f"{name} raised {_one_line(error)}", traceback.format_exc()) from error
    if not isinstance(result, kind):
        raise TaskFailed(code, f"{name} must return {kind.__name__}, not {type(result).__name__}")
    return result


def _code_of(error: BaseException, otherwise: str) -> str:
    """torch's own error is known by its name, so that this file does without torch."""
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return "out_of_memory" if out_of_memory else otherwise


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class failing_with:  # noqa: N801  reads as a statement where it is used
    """Turn hierfl's own errors inside a block into a ``TaskFailed`` with this code."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, HierFLError):
            raise TaskFailed(self.code, str(error)) from error


def _evaluate(app: App, plan: Plan, new_task: Callable[[], Task]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Metric values of the base model on this client's held-out data; none where there is nothing to ask."""
    asked = plan.task.evaluate or plan.task.kind is TaskKind.EVALUATE
    if app.evaluate is None or not asked:
        return {}, ()
    task = new_task()
    with observe.span(observe.SPAN_EVALUATE, run=plan.run, round=plan.round, site=task.site, client=task.client):
        try:
            metrics = _call(app.evaluate, task, Metrics, "evaluate_error")
        except TaskFailed as failed:
            if failed.code == "declined":  # nothing held out here: the update is welcome all the same
                return {}, (failed.sentence,)
            raise
        num_examples = _num_examples(metrics.num_examples, "evaluate")
    values = {"eval_examples": float(num_examples), "eval_loss_sum": metrics.loss * num_examples}
    words = f"evaluated model version {plan.base.version} on {num_examples} examples, loss {metrics.loss:.4g}"
    if metrics.accuracy is not None:
        values["eval_correct"] = float(round(metrics.accuracy * num_examples))
        words += f", accuracy {metrics.accuracy:.1%}"
    return values, (words,)


def _num_examples(value: Any, function: str) -> int:
    code = f"{function}_error"
    try:
        number = operator.index(value)
    except TypeError:
        raise TaskFailed(code, f"{function} must say num_examples as a whole number, not {value!r}") from None
    if number < 0:
        raise TaskFailed(code, f"{function} returned num_examples = {number}")
    if number == 0 and function == "train":
        raise TaskFailed("declined", "train returned num_examples = 0: there is nothing to count")
    return number


def _train_metrics(plan: Plan, update: Update, num_examples: int) -> tuple[dict[str, float], str]:
    """Sums for the plan's metrics, and all of the app's own in words for this site."""
    with failing_with("train_error"):
        means = dict(_floats(update.metrics))
    values = {"num_examples": float(num_examples)}
    if "loss" in means:
        values["train_loss_sum"] = means["loss"] * num_examples
    words = "".join(f", {name} {mean:.4g}" for name, mean in means.items())
    return values, f"trained on {num_examples} examples{words}"


def _floats(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        try:
            yield name, float(value)
        except (TypeError, ValueError):
            raise AppError(f"train returned the metric {name!r} as {type(value).__name__}, not a number") from None


def _head(plan: Plan, values: Mapping[str, float], num_examples: int) -> UpdateHead:
    """Weight and quantised metrics. An evaluation weighs 1: its sums are weighted by their examples."""
    declared = {spec.name for spec in plan.task.metrics}
    sums = {name: value for name, value in values.items() if name in declared}
    for name, value in sums.items():
        if not math.isfinite(value):
            raise TaskFailed("out_of_range", f"the metric {name!r} is {value}: must be finite")
    with failing_with("out_of_range"):
        quantised = quantise_metrics(plan.task.metrics, sums)
    return UpdateHead(
        weight=max(1, min(num_examples, plan.caps.max_weight)),
        metrics=quantised,
        base_model_hash=plan.base.model_hash,
        task_hash=plan.task.hash,
    )


def _as_given(layout: Layout, base: Mapping[str, Float32Array]) -> Mapping[str, Float32Array]:
    """The base as the app saw it: a float16 tensor's rounding is not what training changed."""
    if all(spec.dtype != "float16" for spec in layout.tensors):
        return base
    return layout.flatten(layout.unflatten(base))
