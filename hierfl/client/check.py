"""A dry run of an app at a site: everything that a round would ask of it, and nothing sent.

Each check looks at one thing and gives a finding in words; those that need what failed before are left out.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hierfl.client.app import App, load_app
from hierfl.client.link import probe
from hierfl.client.params import call_init, check_app_model, initial_model
from hierfl.client.work import TaskFailed, do_task
from hierfl.errors import AppError, HierFLError, Unreachable
from hierfl.job import Job, JobHead
from hierfl.layout import Layout, Role
from hierfl.metrics import MetricSpec
from hierfl.pki import Kit
from hierfl.plan import Caps, ModelRef, Plan, TaskSpec
from hierfl.types import ClientId, ClientRef, Float32Array, ModelHash, RegionId, RunId, SiteId, TaskKind

__all__ = ["Finding", "check"]

SUMS = {"num_examples": 0, "train_loss_sum": 20, "eval_examples": 0, "eval_loss_sum": 20, "eval_correct": 0}
"""Metrics of the dry run and their fraction bits."""
MAX_METRIC = 2**28


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``error`` is empty where it is fine."""

    name: str
    words: str
    error: HierFLError | None = None


def check(
    spec: str, kits: Sequence[Path], job: Job | None, site_config: Mapping[str, str], *, train: bool = True
) -> Iterator[Finding]:
    """Look at the app, its model, one round of its work, each kit, and the way to the combiner."""
    try:
        app = load_app(spec)
    except AppError as error:
        yield Finding("app", f"{error}{_details(error)}", error)
    else:
        yield Finding("app", f"{app} from {app.source}; {'with' if app.evaluate else 'without'} evaluate")
        yield from _check_model(app, job or _any_job(app), site_config, _client_of(kits), train=train)
    for path in kits:
        yield from _check_kit(path)


def _any_job(app: App) -> Job:
    return Job(job=JobHead(name="check", app=app.name, rounds=1))


def _client_of(kits: Sequence[Path]) -> ClientRef:
    """Whose round is tried: the first kit's, since an app may look for its data by the site's name."""
    for path in kits:
        try:
            return Kit.load(path).identity.client_ref
        except (HierFLError, ValueError):
            continue  # said below
    return ClientRef(RegionId("region"), SiteId("site-00"), ClientId("client-00"))


def _check_model(
    app: App, job: Job, site_config: Mapping[str, str], who: ClientRef, *, train: bool
) -> Iterator[Finding]:
    try:
        layout, vectors = initial_model(job, app=app)
    except HierFLError as error:
        yield Finding("model", f"{error}{_details(error)}", error)
        return
    yield Finding("model", _in_words(layout))
    if train:
        yield _check_round(app, job, layout, vectors, site_config, who)


def _details(error: HierFLError) -> str:
    """The traceback of the app's own mistake, for who wrote it."""
    return "\n" + "".join(traceback.format_exception(error.__cause__)) if error.__cause__ else ""


def _in_words(layout: Layout) -> str:
    roles = Counter(spec.role for spec in layout.tensors)
    kinds = ", ".join(f"{roles[role]} {role}" for role in Role if roles[role])
    return f"{layout.num_params:,} parameters travel, {4 * layout.num_params:,} bytes each way; tensors: {kinds}"


def _check_round(
    app: App,
    job: Job,
    layout: Layout,
    vectors: Mapping[str, Float32Array],
    site_config: Mapping[str, str],
    who: ClientRef,
) -> Finding:
    try:
        local = check_app_model(layout, call_init(app, job.app, job.job.seed))
        made = do_task(app, _dry_plan(job, layout, who), layout, vectors, local, site_config, who)
    except TaskFailed as failed:
        details = f"\n{failed.details}" if failed.details else ""
        return Finding("round", f"{failed.sentence}{details}", AppError(failed.sentence))
    except HierFLError as error:
        return Finding("round", str(error), error)
    return Finding("round", "; ".join(made.said))


def _dry_plan(job: Job, layout: Layout, who: ClientRef) -> Plan:
    """What the controller would ask in round 1; signed by nobody, so no combiner would take its answer."""
    from hierfl import encodings, strategies

    strategy = strategies.get(job.strategy.name, job.strategy.options)
    caps = job.arithmetic
    name, _, version = job.job.app.partition("@")
    return Plan(
        federation="dry-run",
        region=who.region,
        run=RunId("dry-run"),
        round=1,
        attempt=1,
        seed=job.job.seed,
        task=TaskSpec(
            kind=TaskKind.TRAIN,
            app=name,
            app_version=version,
            config=job.app,
            client_part=strategy.client_part(),
            groups=strategy.column_groups(layout, max_abs=caps.max_abs, total_weight=caps.total_weight),
            metrics=tuple(MetricSpec(name=name, scale=bits, max_abs=MAX_METRIC) for name, bits in SUMS.items()),
            evaluate=True,
            encoding=encodings.spec(job.updates.encoding, job.updates.options),
        ),
        base=ModelRef(version=0, model_hash=ModelHash(""), layout_hash=layout.hash, size_bytes=4 * layout.num_params),
        caps=Caps(max_weight=caps.max_weight, region_weight=caps.total_weight, max_upload_bytes=0),
        k=caps.k,
        min_clients=1,
        report_timeout_s=job.round.report_timeout_s,
        hold_s=job.round.hold_s,
    )


def _check_kit(path: Path) -> Iterator[Finding]:
    try:
        kit = Kit.load(path)
    except HierFLError as error:
        yield Finding("kit", str(error), error)
        return
    yield Finding("kit", f"{kit.identity} of {kit.identity.federation}, valid until {kit.expires:%Y-%m-%d %H:%M} UTC")
    address, words = asyncio.run(probe(kit))
    yield Finding("combiner", words, None if address else Unreachable(words))
