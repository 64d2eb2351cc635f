"""What the federation is compared with, each measured on the same held-out patients.

    federated     the run's own model
    pooled        one fit to all training patients in one place: what the federation is there to do without
    region alone  a federation of one region's hospitals only; each hospital is measured with its own region's
    site alone    a fit to one hospital's training patients only
    set aside     the federated model at hospitals that never trained: these are dealt into folds, and a
                  federation of all the others trains for each

With an intercept kept at each site, a hospital that never trained fits its own on its training patients, and
nothing else. Fits have a normal prior, the same everywhere; federated models need none: they start at 0 and
take a fixed number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import reference
from logistic import fit, fit_intercept, predict
from prepare import Sample
from reference import Grouping, Trained

from hierfl.job import Job
from hierfl.types import Float64Array, Params

__all__ = ["SET_ASIDE", "Split", "baselines", "folds", "risks_of"]

RIDGE = 10.0
"""Of fits: a coefficient is expected within about 0.3 of 0. Of 2, 5, 10, 20 and 40, less gave hospitals alone a lower
AUC, more a higher log loss."""

NUM_FOLDS = 5
SET_ASIDE = "set aside"

Split = Mapping[str, tuple[Sample, Sample]]
"""Training and held-out patients by site."""
Risks = dict[str, Float64Array]


def risks_of(trained: Trained, split: Split) -> Risks:
    """Of the held-out patients of each site, by the model as that site has it."""
    return {site: _risks(trained.of(site), held_out) for site, (_, held_out) in split.items()}


def _risks(params: Params, sample: Sample) -> Float64Array:
    return predict(sample.inputs, params["coefficients"].astype(np.float64), float(params["intercept"]))


def baselines(job: Job, sites: Grouping, split: Split, data: Path, *, own_intercept: bool) -> dict[str, Risks]:
    """Risks of the held-out patients by site, for each of the models above but the federated one."""
    return {
        "pooled": _pooled(split, own_intercept=own_intercept),
        "region alone": _regions_alone(job, sites, split, data),
        "site alone": _sites_alone(split),
        SET_ASIDE: _set_aside(job, sites, split, data, own_intercept=own_intercept),
    }


def _pooled(split: Split, *, own_intercept: bool) -> Risks:
    everybody = Sample.concatenate(training for training, _ in split.values())
    sizes = [len(training) for training, _ in split.values()]
    groups = np.repeat(np.arange(len(sizes)), sizes) if own_intercept else None
    coefficients, intercepts = fit(everybody, RIDGE, groups)
    return {
        site: predict(held_out.inputs, coefficients, intercepts[n if own_intercept else 0])
        for n, (site, (_, held_out)) in enumerate(split.items())
    }


def _regions_alone(job: Job, sites: Grouping, split: Split, data: Path) -> Risks:
    found: Risks = {}
    for region, own in sites.items():
        trained = reference.train(job, {region: own}, data)
        found |= risks_of(trained, {site: split[site] for site in own})
    return found


def _sites_alone(split: Split) -> Risks:
    found: Risks = {}
    for site, (training, held_out) in split.items():
        coefficients, intercepts = fit(training, RIDGE)
        found[site] = predict(held_out.inputs, coefficients, intercepts[0])
    return found


def _set_aside(job: Job, sites: Grouping, split: Split, data: Path, *, own_intercept: bool) -> Risks:
    found: Risks = {}
    for aside in folds(sites, job.job.seed):
        others = {region: [site for site in own if site not in aside] for region, own in sites.items()}
        trained = reference.train(job, {region: own for region, own in others.items() if own}, data)
        for site in aside:
            training, held_out = split[site]
            params = dict(trained.params)
            if own_intercept:
                coefficients = params["coefficients"].astype(np.float64)
                params["intercept"] = np.asarray(fit_intercept(training, coefficients))
            found[site] = _risks(params, held_out)
    return found


def folds(sites: Grouping, seed: int) -> Iterator[Sequence[str]]:
    """Deal the hospitals of each region into folds at random: each is set aside once, never a whole region at once."""
    rng = np.random.default_rng([seed, NUM_FOLDS])
    dealt = [site for own in sites.values() for site in rng.permutation(sorted(own)).tolist()]
    yield from (dealt[fold::NUM_FOLDS] for fold in range(min(NUM_FOLDS, len(dealt))))
