"""Layouts from models, and what an app returns held against them; in NumPy alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hierfl.client.app import App
from hierfl.client.params import check_app_model, deltas_of, initial_model, make_layout, returned_arrays
from hierfl.errors import AppError, ConfigError, LayoutMismatch
from hierfl.job import Job, JobHead, ModelChoice
from hierfl.layout import Role

MODEL = {
    "encoder.w": np.ones((2, 3), np.float32),
    "head.w": np.full((3,), 2, np.float32),
    "head.b": np.float32(0.5),
    "steps": np.array(4),
}


def roles(tensors: str | tuple[str, ...]) -> dict[str, Role]:
    layout, _ = make_layout(MODEL, tensors)
    return {spec.name: spec.role for spec in layout.tensors}


def test_floating_arrays_train_and_whole_numbers_stay_local() -> None:
    layout, vectors = make_layout(MODEL)
    assert roles("all") == roles("trainable")
    assert roles("all")["steps"] is Role.LOCAL
    assert vectors["train"].tolist() == [1] * 6 + [2] * 3 + [0.5]
    assert layout.num_params == 10


def test_patterns_choose_what_is_shared_and_the_rest_stays_local() -> None:
    layout, vectors = make_layout(MODEL, ("encoder.*",))
    assert vectors["train"].size == 6
    assert roles(("encoder.*",))["head.w"] is Role.LOCAL
    assert set(layout.slots) == {"encoder.w"}
    assert roles("head.?") == {
        "encoder.w": Role.LOCAL,
        "head.w": Role.TRAIN,
        "head.b": Role.TRAIN,
        "steps": Role.LOCAL,
    }


def test_a_pattern_that_fits_nothing_names_the_near_tensor() -> None:
    with pytest.raises(ConfigError, match=r"model.tensors = 'encoder.v' .* did you mean 'encoder.w'"):
        make_layout(MODEL, ("head.*", "encoder.v"))


@pytest.mark.parametrize("model", [None, [1, 2], {}, {"w": "text"}])
def test_what_is_no_model_is_refused(model: object) -> None:
    with pytest.raises((AppError, ConfigError)):
        make_layout(model)


def test_the_difference_is_taken_in_float32() -> None:
    layout, base = make_layout(MODEL)
    new = {name: np.asarray(array) + 0.25 for name, array in MODEL.items() if name != "steps"}
    new["head.w"] = new["head.w"].astype(np.float64)  # arithmetic widened it: fine
    deltas = deltas_of(layout, returned_arrays(layout, new), base)
    assert deltas["train"].dtype == np.float32
    assert deltas["train"].tolist() == [0.25] * 10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head.w": None}, r"did not return the tensor 'head.w'"),
        ({"heads.w": np.ones(3)}, r"a tensor 'heads.w' that the run's model does not have; did you mean 'head.w'"),
        ({"head.w": np.ones(4)}, r"tensor 'head.w' came in shape \(4,\); the run's model has \(3,\)"),
        ({"head.w": np.ones(3, complex)}, r"'head.w' came as complex128"),
        ({"steps": np.array(1.5)}, r"'steps' came as float64"),
        ({"head.w": "text"}, r"'head.w' is str"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], sentence: str) -> None:
    layout, _ = make_layout(MODEL)
    new = {name: value for name, value in {**MODEL, **change}.items() if value is not None}
    with pytest.raises(AppError, match=sentence):
        returned_arrays(layout, new)


def test_local_tensors_may_be_left_out_and_never_reach_a_vector() -> None:
    layout, base = make_layout(MODEL, ("encoder.*",))
    secret = {"encoder.w": np.ones((2, 3)), "head.w": np.full(3, 99.0)}
    arrays = returned_arrays(layout, secret)
    assert [vector.tolist() for vector in deltas_of(layout, arrays, base).values()] == [[0.0] * 6]
    assert set(returned_arrays(layout, {"encoder.w": np.ones((2, 3))})) == {"encoder.w"}


def test_the_app_at_the_site_is_held_against_the_layout() -> None:
    layout, _ = make_layout(MODEL)
    assert set(check_app_model(layout, MODEL)) == {"steps"}
    with pytest.raises(LayoutMismatch, match=r"head.w"):
        check_app_model(layout, {**MODEL, "head.w": np.ones(4, np.float32)})


def app_of(model: object) -> App:
    return App(name="linear", init=lambda config: model, train=lambda task: task)  # type: ignore[arg-type,return-value]


def job_of(**model: object) -> Job:
    return Job(job=JobHead(name="j", app="linear@3", rounds=1, seed=5), model=ModelChoice(**model), app={"width": 3})  # type: ignore[arg-type]


def test_version_zero_is_the_apps_init_with_the_jobs_keys_and_seed() -> None:
    seen = {}

    def init(config: object) -> dict[str, np.ndarray]:
        seen["config"] = config
        return {"w": np.random.rand(3).astype(np.float32)}

    app = App(name="linear", init=init, train=lambda task: task)  # type: ignore[arg-type,return-value]
    _, first = initial_model(job_of(), app=app)
    _, again = initial_model(job_of(), app=app)
    assert seen["config"] == {"width": 3, "seed": 5}
    assert np.array_equal(first["train"], again["train"])


def test_version_zero_may_come_from_arrays_of_a_file() -> None:
    given = {name: np.asarray(array) * 0 + 7 for name, array in MODEL.items()}
    layout, vectors = initial_model(job_of(), app=app_of(MODEL), params=given)
    assert vectors["train"].tolist() == [7.0] * 10
    assert layout.hash == make_layout(MODEL)[0].hash
    with pytest.raises(ConfigError, match=r"model.initial.*head.b"):
        initial_model(job_of(), app=app_of(MODEL), params={"encoder.w": MODEL["encoder.w"], "head.w": MODEL["head.w"]})


def test_a_job_for_another_app_is_refused() -> None:
    other = App(name="other", init=lambda c: MODEL, train=lambda task: task)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match="must name the app"):
        initial_model(job_of(), app=other)


def test_an_app_is_looked_for_in_the_jobs_folder(tmp_path: Path) -> None:
    with pytest.raises(AppError, match="there is no app 'linear'"):
        initial_model(job_of(), folder=tmp_path)


def test_a_failing_init_is_the_apps_fault() -> None:
    broken = App(name="linear", init=lambda c: 1 / 0, train=lambda task: task)  # type: ignore[arg-type,return-value]
    with pytest.raises(AppError, match="init of the app linear failed: ZeroDivisionError"):
        initial_model(job_of(), app=broken)
    with pytest.raises(AppError, match="returned NoneType"):
        initial_model(job_of(), app=app_of(None))
