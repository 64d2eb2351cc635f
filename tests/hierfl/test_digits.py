"""The demo's app: who has which digits, the same bits again, and better together than alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from hierfl import curves, digits
from hierfl.client.app import load_app
from hierfl.client.params import make_layout
from hierfl.client.task import Task, Update
from hierfl.client.torch import named_tensors, seed_torch, to_arrays
from hierfl.digits import app_config, baseline, evaluate_params, load_split, site_names
from hierfl.errors import ConfigError
from hierfl.plan import task_seed
from hierfl.types import ClientId, ClientRef, RegionId, RunId, SiteId

Params = Mapping[str, np.ndarray]


def first_model(seed: int = 0) -> dict[str, np.ndarray]:
    seed_torch(seed)
    return {name: array.copy() for name, array in to_arrays(named_tensors(digits.init({}))).items()}


def task_of(site: str, params: Params, *, round_number: int = 1, region: str = "eu", num_sites: int = 12) -> Task:
    """As the SDK makes it, generators seeded."""
    who = ClientRef(RegionId(region), SiteId(site), ClientId("client-0"))
    seed = task_seed(0, round_number, who)
    seed_torch(seed)
    copies = {name: array.copy() for name, array in params.items()}
    return Task(
        params=copies,
        config=app_config(num_sites, 0),
        site_config={},
        strategy={},
        local={},
        layout=make_layout(digits.model({})),
        seed=seed,
        round=round_number,
        run=RunId("r"),
        region=who.region,
        site=who.site,
        client=who.client,
    )


def trained(update: Update) -> dict[str, np.ndarray]:
    return to_arrays(update.params)


def one_round(params: Params, round_number: int) -> dict[str, np.ndarray]:
    """Plain federated averaging over twelve sites, in float64."""
    total = {name: np.zeros(array.shape) for name, array in params.items()}
    weight = 0
    for site in site_names(12):
        update = digits.train(task_of(site, params, round_number=round_number))
        for name, array in trained(update).items():
            total[name] += update.num_examples * (array.astype(np.float64) - params[name])
        weight += update.num_examples
    return {name: (params[name] + total[name] / weight).astype(np.float32) for name in params}


def identities(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize("num_sites", [1, 2, 12, 60])
def test_every_image_is_in_one_part_and_every_site_has_some(num_sites: int) -> None:
    split = load_split(num_sites, 0)
    parts = [split.test, *split.train.values(), *split.held_out.values()]
    assert list(split.train) == list(split.held_out) == list(site_names(num_sites))
    assert sum(map(len, parts)) == 1797
    assert len(set().union(*(identities(part.images) for part in parts))) == 1797
    for site in split.train:
        assert len(split.train[site]) + len(split.held_out[site]) >= digits.LEAST_EXAMPLES
        assert len(split.held_out[site]) >= 1


def test_the_test_set_has_all_digits_in_their_usual_shares_and_sites_do_not() -> None:
    split = load_split(12, 0)
    counts = torch.bincount(split.test.digits, minlength=10)
    assert 75 <= int(counts.min()) <= int(counts.max()) <= 85
    shares = [torch.bincount(part.digits, minlength=10).max().item() / len(part) for part in split.train.values()]
    assert np.median(shares) > 0.25


def test_a_split_depends_on_its_seed_and_on_nothing_else() -> None:
    first = load_split(12, 0)
    load_split.cache_clear()
    again, other = load_split(12, 0), load_split(12, 1)
    for site in site_names(12):
        assert torch.equal(first.train[site].images, again.train[site].images)
    assert torch.equal(first.test.digits, again.test.digits)
    assert not torch.equal(first.test.images, other.test.images)


@pytest.mark.parametrize("num_sites", [0, 99])
def test_more_sites_than_images_are_refused(num_sites: int) -> None:
    with pytest.raises(ConfigError, match=r"app\.sites = \d+ must be from 1 to 98"):
        load_split(num_sites, 0)


def test_a_site_without_digits_is_told_which_have_some() -> None:
    with pytest.raises(ConfigError, match="site = 'site-12' must be site-00 to site-11"):
        digits.train(task_of("site-12", first_model()))


def test_the_module_is_an_app() -> None:
    app = load_app("hierfl.digits")
    assert (app.name, app.version) == ("digits", "1")
    assert app.evaluate is not None


def test_training_again_gives_the_same_bits_in_any_region() -> None:
    params = first_model()
    here = digits.train(task_of("site-03", params, region="eu"))
    between = digits.train(task_of("site-04", params))
    there = digits.train(task_of("site-03", params, region="us"))
    assert here.num_examples == there.num_examples == len(load_split(12, 0).train["site-03"])
    for name, array in trained(here).items():
        assert array.tobytes() == trained(there)[name].tobytes()
    assert any(trained(between)[name].tobytes() != array.tobytes() for name, array in trained(here).items())


def test_sites_drift_less_in_later_rounds() -> None:
    params = first_model()
    early, late = (trained(digits.train(task_of("site-00", params, round_number=n))) for n in (1, 20))
    moved = [sum(float(np.abs(new[name] - params[name]).sum()) for name in params) for new in (early, late)]
    assert moved[1] < moved[0]


def test_a_site_evaluates_on_what_it_has_held_out() -> None:
    found = digits.evaluate(task_of("site-00", first_model()))
    assert found.num_examples == len(load_split(12, 0).held_out["site-00"])
    assert found.accuracy is not None
    assert 0 <= found.accuracy <= 1


def test_a_model_gets_better_in_a_few_rounds() -> None:
    params = first_model()
    scores = [evaluate_params(params, 12, 0)]
    for number in (1, 2):
        params = one_round(params, number)
        scores.append(evaluate_params(params, 12, 0))
    assert scores[0].accuracy < 0.3
    assert scores[2].accuracy > 0.85
    assert scores[2].loss < scores[1].loss < scores[0].loss


def test_a_baseline_gives_a_score_a_round_and_the_same_ones_again() -> None:
    params = first_model()
    given = {name: array.copy() for name, array in params.items()}
    runs = [baseline(params, site_names(12)[:4], num_sites=12, data_seed=0, rounds=2, seed=0) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 2
    assert runs[0][1].accuracy > evaluate_params(params, 12, 0).accuracy
    assert all(np.array_equal(params[name], given[name]) for name in params)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ten_rounds_come_within_two_points_of_pooled_training_and_above_every_region_alone() -> None:
    first = params = first_model()
    for number in range(1, 11):
        params = one_round(params, number)
    federated = evaluate_params(params, 12, 0).accuracy
    sites = site_names(12)

    def best(chosen: tuple[str, ...]) -> float:
        scores = baseline(first, chosen, num_sites=12, data_seed=0, rounds=10, seed=0)
        return max(score.accuracy for score in scores)

    assert federated > best(sites) - 0.02
    assert federated > max(best(sites[start : start + 4]) for start in (0, 4, 8))


def curve(*accuracies: float) -> curves.Curve:
    return curves.Curve(accuracy=accuracies, loss=[2 * (1 - accuracy) for accuracy in accuracies])


@pytest.mark.parametrize("with_baselines", [True, False])
def test_the_curves_are_drawn_as_a_png(tmp_path: Path, with_baselines: bool) -> None:
    pictures = []
    for name in ("a.png", "b.png"):
        regions = {f"region-{n}": curve(0.3, 0.5, 0.6) for n in range(8)} if with_baselines else None
        pooled = curve(0.8, 0.9, 0.95) if with_baselines else None
        curves.draw(tmp_path / name, "Digits", curve(0.5, 0.8, 0.9), pooled, regions)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0].startswith(b"\x89PNG")
    assert len(pictures[0]) > 10_000
    assert pictures[0] == pictures[1]


def test_one_round_can_be_drawn_too(tmp_path: Path) -> None:
    curves.draw(tmp_path / "one.png", "Digits", curve(0.5))
    assert (tmp_path / "one.png").stat().st_size > 5_000
