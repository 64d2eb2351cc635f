"""``hierfl demo``: controller, regions and sites on this machine train a digits model, and show what came of it."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hierfl.cli.output import emit, output_option, say, table
from hierfl.cli.reach import STATE_DIR
from hierfl.errors import ConfigError, PolicyRefused

if TYPE_CHECKING:
    from hierfl.config import FederationConfig
    from hierfl.digits import Score
    from hierfl.job import Job
    from hierfl.local import Federation
    from hierfl.types import Params
    from hierfl.wire import hierfl_pb2 as pb

__all__ = ["demo"]

REGIONS = (
    *("eu-west", "us-east", "ap-south", "sa-east", "af-south", "me-central"),
    *("eu-north", "us-west", "ap-east", "ca-central", "eu-south", "ap-north"),
)
APP = "hierfl.digits"
RESULTS = Path("hierfl-demo")
"""Where the results go without ``--keep``; the next demo replaces them."""
REPORT = "demo.json"
POOLED = "pooled"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked for."""

    regions: int
    clients: int
    rounds: int
    intakes: int
    seed: int
    baselines: bool

    @property
    def k(self) -> int:
        return min(3, self.clients)

    def sites(self, region: str) -> list[str]:
        """Names of a region's sites: ``site-00`` and on, through all regions."""
        first = REGIONS.index(region) * self.clients
        return [f"site-{number:02d}" for number in range(first, first + self.clients)]

    @property
    def grouping(self) -> dict[str, list[str]]:
        return {region: self.sites(region) for region in REGIONS[: self.regions]}


@click.command()
@click.option("--regions", type=click.IntRange(1, len(REGIONS)), default=3, show_default=True, help="Regions.")
@click.option("--clients-per-region", type=click.IntRange(1, 64), default=4, show_default=True, help="Sites of each.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=10, show_default=True, help="Rounds of training.")
@click.option("--intakes", type=click.IntRange(1, 8), default=1, show_default=True, help="Servers of each combiner.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=1, show_default=True, help="Of data split and training.")
@click.option("--keep", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), help="Keep everything in DIR.")
@click.option("--no-baselines", is_flag=True, help="Leave out what regions and pooled training reach alone.")
@output_option
def demo(
    regions: int,
    clients_per_region: int,
    rounds: int,
    intakes: int,
    seed: int,
    keep: Path | None,
    no_baselines: bool,
    output: str,
) -> None:
    """See it work: regions with sites of their own train one model of handwritten digits, here, in a minute.

    Real processes, a Ray cluster for each region, certificates made on the spot. The same sites make the
    same model, bit for bit, however they are grouped.

    \b
    Examples:
      hierfl demo
      hierfl demo --regions 1 --clients-per-region 12     the same SHA-256
      hierfl demo --keep here                             and look around afterwards
    """
    say(f"hierfl demo: {regions} regions with {clients_per_region} sites each, handwritten digits, {rounds} rounds")
    plan = Plan(
        regions=regions,
        clients=clients_per_region,
        rounds=rounds,
        intakes=intakes,
        seed=seed,
        baselines=not no_baselines,
    )
    if plan.clients == 1:
        raise PolicyRefused(
            "with one client a region its sum would be that client's update, which may not leave;"
            " use --clients-per-region 2 or more"
        )
    say(
        f"a sum leaves a region only over at least k = {plan.k} sites;"
        " one of them may carry any share of it (max_share = 1)"
    )
    from hierfl.cli.up import run_until_stopped

    with _folders(keep) as (state, results):
        report = run_until_stopped(_run(plan, state, results))
    emit(report, "hierfl.demo/1", output, lambda: _show(report, results))


@contextmanager
def _folders(keep: Path | None) -> Iterator[tuple[Path, Path]]:
    """The state's folder and the results'. Interrupted, neither is left but one that was there before."""
    if keep is not None:
        if keep.exists() and any(keep.iterdir()):
            raise ConfigError("--keep", str(keep), "must be an empty folder, or a new one")
        existed = keep.exists()
        keep.mkdir(parents=True, exist_ok=True)
        try:
            yield keep / STATE_DIR, keep
        except BaseException:
            shutil.rmtree(keep / STATE_DIR, ignore_errors=True)
            if not existed:
                shutil.rmtree(keep, ignore_errors=True)
            raise
        return
    if RESULTS.exists() and not (RESULTS / REPORT).exists():
        raise ConfigError(str(RESULTS), None, "is here and is no earlier demo's; move it, or use --keep DIR")
    with tempfile.TemporaryDirectory(prefix="hierfl-demo-") as folder:
        results = Path(folder) / "results"
        results.mkdir()
        yield Path(folder) / STATE_DIR, results
        for traces in (Path(folder) / STATE_DIR).glob("**/traces"):
            shutil.copytree(traces, results / traces.relative_to(Path(folder) / STATE_DIR))
        shutil.rmtree(RESULTS, ignore_errors=True)
        shutil.copytree(results, RESULTS)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to."""

    run: pb.GetRunResponse
    status: pb.GetStatusResponse
    models: tuple[Params, ...]
    """By version; the first is version 0."""


async def _run(plan: Plan, state: Path, results: Path) -> dict[str, Any]:
    from hierfl.local import serving

    started = time.monotonic()
    async with serving(_config(plan), state, say, restart=False) as federation:
        up = time.monotonic()
        say(f"all of it is up after {up - started:.0f} s; training")
        outcome = await _train(federation, _job(plan))
        trained = time.monotonic()
        say("stopping")
    say("measuring the model" + (", and what each region and pooled training reach" if plan.baselines else ""))
    federated, alone = await asyncio.to_thread(_measure, plan, outcome)
    seconds = {"startup": up - started, "training": trained - up, "total": time.monotonic() - started}
    report = _report(outcome, federated[-1].accuracy, alone, seconds)
    _write(results, report, outcome, federated, alone)
    return report


def _measure(plan: Plan, outcome: Outcome) -> tuple[list[Score], dict[str, list[Score]]]:
    """Scores after each round on the held-out test set: of the model, of pooled training, of each region alone."""
    from hierfl import digits

    num_sites = plan.regions * plan.clients
    federated = [digits.evaluate_params(params, num_sites, plan.seed) for params in outcome.models[1:]]
    groups = {POOLED: list(digits.site_names(num_sites)), **plan.grouping} if plan.baselines else {}
    return federated, {
        name: digits.baseline(
            outcome.models[0], sites, num_sites=num_sites, data_seed=plan.seed, rounds=plan.rounds, seed=plan.seed
        )
        for name, sites in groups.items()
    }


def _config(plan: Plan) -> FederationConfig:
    from hierfl.config import FederationConfig, RegionConfig, SiteConfig
    from hierfl.types import RegionId, SiteId

    regions = tuple(
        RegionConfig(
            name=RegionId(region),
            sites=tuple(SiteConfig(name=SiteId(site), app=APP) for site in sites),
            intakes=plan.intakes,
            k=plan.k,
            max_share=1.0,
        )
        for region, sites in plan.grouping.items()
    )
    return FederationConfig(name="demo", regions=regions)


def _job(plan: Plan) -> Job:
    from hierfl import digits
    from hierfl.job import Arithmetic, Job, JobHead, RoundRules

    return Job(
        job=JobHead(name="digits", app=digits.NAME, rounds=plan.rounds, seed=plan.seed),
        round=RoundRules(min_regions=plan.regions, min_clients=plan.clients, report_timeout_s=120.0),
        arithmetic=Arithmetic(k=plan.k),
        app=digits.app_config(plan.regions * plan.clients, plan.seed),
    )


async def _train(federation: Federation, job: Job) -> Outcome:
    """Submit, follow to the end, fetch the model."""
    from hierfl.cli.runs import follow, raise_for_outcome
    from hierfl.client import initial_model
    from hierfl.operator import connect
    from hierfl.pki import Kit

    layout, first = await asyncio.to_thread(initial_model, job, app=APP)
    async with connect(Kit.load(federation.operator_kit), *federation.controller_addresses) as operator:
        run = await operator.submit(job, await operator.upload_model(layout, first))
        raise_for_outcome(await follow(operator, run, goes_on=False))
        models = [first]
        for model in sorted(await operator.models(run), key=lambda model: model.version)[1:]:
            models.append((await operator.fetch_model(model))[1])  # noqa: PERF401  one at a time
        return Outcome(
            run=await operator.run(run),
            status=await operator.status(),
            models=tuple(layout.unflatten(vectors) for vectors in models),
        )


def _report(
    outcome: Outcome, federated: float, alone: Mapping[str, list[Score]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    run, status = outcome.run, outcome.status
    shares = [share for item in run.rounds for share in item.regions]
    regions = [
        {
            "name": region.region,
            "clients": region.clients_connected,
            "updates": sum(share.num_updates for share in shares if share.region == region.region),
            "bytes_in": region.bytes_from_sites,
            "bytes_out": sum(share.bytes_out for share in shares if share.region == region.region),
        }
        for region in status.regions
    ]
    accuracy: dict[str, Any] = {"federated": federated}
    if alone:
        # a region's best effort: it may stop at its best round, which the federation may not
        best = {name: max(each.accuracy for each in curve) for name, curve in alone.items()}
        accuracy |= {"pooled": alone[POOLED][-1].accuracy}
        accuracy |= {"regions": {name: value for name, value in best.items() if name != POOLED}}
    return {
        "run": run.summary.run,
        "model_sha256": run.summary.model_hash,
        "model_version": run.summary.model_version,
        "rounds": {"committed": run.summary.rounds_committed, "abandoned": run.summary.rounds_abandoned},
        "accuracy": accuracy,
        "regions": regions,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def _write(
    results: Path,
    report: dict[str, Any],
    outcome: Outcome,
    federated: list[Score],
    alone: Mapping[str, list[Score]],
) -> None:
    """The picture, the model, the history and the report."""
    from hierfl import modelfile
    from hierfl.cli.runs import round_row, write_history
    from hierfl.curves import Curve, draw

    def curve(scores: list[Score]) -> Curve:
        return Curve(accuracy=[score.accuracy for score in scores], loss=[score.loss for score in scores])

    regions = {name: curve(scores) for name, scores in alone.items() if name != POOLED}
    pooled = curve(alone[POOLED]) if POOLED in alone else None
    draw(results / "curves.png", "Handwritten digits, split unevenly", curve(federated), pooled, regions)
    write_history(results / "history.csv", [round_row(item) for item in outcome.run.rounds])
    metadata = {"hierfl.model_sha256": report["model_sha256"]}
    modelfile.write(results / "model.safetensors", outcome.models[-1], metadata)
    (results / REPORT).write_text(json.dumps({"schema": "hierfl.demo/1", **report}, indent=2))


def _show(report: dict[str, Any], results: Path) -> None:
    folder = results if results.exists() else RESULTS
    accuracy, run = report["accuracy"], report["run"]
    rows = [("federated, all regions", f"{accuracy['federated']:.3f}")]
    rows += [(f"{region} alone", f"{value:.3f}") for region, value in accuracy.get("regions", {}).items()]
    rows += [("pooled, if data could move", f"{accuracy['pooled']:.3f}")] if "pooled" in accuracy else []
    table(("accuracy on the held-out test set", ""), rows)
    click.echo()
    headings = ("region", "clients", "updates", "bytes in from sites", "bytes out across the border")
    columns = ("name", "clients", "updates", "bytes_in", "bytes_out")
    table(headings, [tuple(region[column] for column in columns) for region in report["regions"]])
    click.echo()
    click.echo(f"model SHA-256  {report['model_sha256']}")
    click.echo(f"picture        {folder / 'curves.png'}")
    click.echo(f"files          {folder}/")
    click.echo(
        f"took           {report['seconds']['total']:.0f} s, {report['seconds']['training']:.0f} s of it training"
    )
    click.echo()
    click.echo("next: " + f"hierfl trace {run} --dir {folder}".ljust(58) + "where a round spent its time")
    click.echo("      " + "hierfl demo --regions 1 --clients-per-region 12".ljust(58) + "the same SHA-256")
    click.echo("      " + "hierfl init my-federation".ljust(58) + "your own model")
