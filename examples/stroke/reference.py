"""The same rounds without a federation around them: one loop, one process, the same app and the same sums.

It makes the model that the real federation makes, bit for bit, if every hospital answers in every round.
So what would take many federations (one a region, one without some hospitals) is measured with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import add
from pathlib import Path

import numpy as np

from hierfl import strategies
from hierfl.aggregation import Accumulator, PartialAggregate
from hierfl.client import App, Task, initial_model, load_app
from hierfl.client.params import deltas_of, local_arrays, returned_arrays
from hierfl.job import Job
from hierfl.layout import Layout, model_hash
from hierfl.plan import task_seed
from hierfl.types import ClientId, ClientRef, Float32Array, ModelHash, Params, RegionId, RunId, SiteId

__all__ = ["APP_FILE", "Grouping", "Trained", "the_app", "train"]

APP_FILE = Path(__file__).with_name("app.py")

Grouping = Mapping[str, Sequence[str]]
"""Sites by region."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run leaves: the global tensors, and each site's local ones (none where nothing is local)."""

    model_sha256: ModelHash
    params: Params
    local: Mapping[str, Params]

    def of(self, site: str) -> dict[str, np.ndarray]:
        """The model as that site has it."""
        return {**self.params, **self.local.get(site, {})}


@cache
def the_app() -> App:
    """The app, loaded once: it keeps the patients that it has read."""
    return load_app(str(APP_FILE))


def train(job: Job, sites: Grouping, data: Path) -> Trained:
    """Train as ``job`` says over ``sites``, whose files lie in ``data``."""
    app = the_app()
    layout, vectors = initial_model(job, app=app)
    strategy = strategies.get(job.strategy.name, job.strategy.options)
    groups = strategy.column_groups(layout, max_abs=job.arithmetic.max_abs, total_weight=job.arithmetic.total_weight)
    state = strategy.init(vectors)
    first = local_arrays(layout, app.init(job.app))
    local: dict[str, Params] = {site: first for region in sites.values() for site in region}
    for number in range(1, job.job.rounds + 1):
        round_ = _Round(job=job, app=app, layout=layout, vectors=vectors, data=data, number=number)
        partials = []
        for region, own in sites.items():
            accumulator = Accumulator(groups)
            for site in own:
                local[site] = round_.fold(accumulator, region, site, local[site])
            partials.append(accumulator.partial(len(own)))
        total: PartialAggregate = reduce(add, partials)
        vectors, state = strategy.apply(vectors, total, state)
    return Trained(model_sha256=model_hash(layout, vectors), params=layout.unflatten(vectors), local=local)


@dataclass(frozen=True, kw_only=True)
class _Round:
    """What all sites of one round have in common."""

    job: Job
    app: App
    layout: Layout
    vectors: Mapping[str, Float32Array]
    data: Path
    number: int

    def fold(self, accumulator: Accumulator, region: str, site: str, local: Params) -> Params:
        """One site's work: train, and add what left it. Returns what stayed."""
        update = self.app.train(self._task(ClientRef(RegionId(region), SiteId(site), ClientId("client-00")), local))
        arrays = returned_arrays(self.layout, update.params)
        deltas = deltas_of(self.layout, arrays, self.vectors)
        weight = min(update.num_examples, self.job.arithmetic.max_weight)
        accumulator.fold({name: [vector] for name, vector in deltas.items()}, weight)
        return local_arrays(self.layout, arrays)

    def _task(self, client: ClientRef, local: Params) -> Task:
        given = {**self.layout.unflatten(self.vectors), **local}
        return Task(
            params={name: array.copy() for name, array in given.items()},
            config=self.job.app,
            site_config={"data": str(self.data)},
            strategy={},
            local=local,
            layout=self.layout,
            seed=task_seed(self.job.job.seed, self.number, client),
            round=self.number,
            run=RunId("in-process"),
            region=client.region,
            site=client.site,
            client=client.client,
        )
