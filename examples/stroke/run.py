"""The International Stroke Trial as a federation of hospitals: train it, measure it, compare it.

    python examples/stroke/run.py --data IST_corrected.csv
    python examples/stroke/run.py --data IST_corrected.csv --min-patients 30
    python examples/stroke/run.py --data IST_corrected.csv --in-process

The table goes to stdout, what happens meanwhile to stderr, everything measured to report.json.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import reference
from baselines import SET_ASIDE, baselines, risks_of
from evaluate import METRICS, Judge, estimate
from prepare import INPUTS, write_hospitals
from reference import Trained
from study import Study

from hierfl.cli.output import emit, output_option, say, table
from hierfl.cli.reach import STATE_DIR
from hierfl.cli.up import run_until_stopped
from hierfl.errors import ConfigError, HierFLError, Interrupted
from hierfl.types import Float64Array

__all__ = ["main", "study_report"]

SCHEMA = "hierfl.stroke/1"
SOURCE = (
    "International Stroke Trial database (version 2), Sandercock P, Niewada M, Czlonkowska A, University of Edinburgh,"
    " doi 10.7488/ds/104; Sandercock et al. 2011, Trials 12:101. Open Data Commons Attribution License 1.0"
)
WORDS = {
    "federated": "federated, all regions",
    "pooled": "pooled, if data could move",
    "region alone": "each region alone",
    "site alone": "each site alone",
    SET_ASIDE: "federated, where it never trained",
}
INTERCEPTS = {False: "one intercept for all", True: "an intercept kept at each site"}


@click.command()
@click.option("--data", required=True, type=click.Path(path_type=Path), help="The trial's CSV, or an extract of it.")
@click.option(
    "--min-patients",
    default=100,
    show_default=True,
    type=click.IntRange(min=10),
    help="Fewest patients with a known outcome for a hospital to take part.",
)
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1), help="Rounds of training.")
@click.option("--k", default=3, show_default=True, type=click.IntRange(min=2), help="Fewest hospitals in a sum.")
@click.option(
    "--site-intercept/--shared-intercept",
    default=None,
    help="Only with an intercept kept at each site, or only without. Default: both.",
)
@click.option("--in-process", is_flag=True, help="The same rounds in a plain loop, without a federation.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the split and the draws.")
@click.option("--draws", default=1000, show_default=True, type=click.IntRange(min=20), help="Of the bootstrap.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Keep the federation's folders here.")
@click.option("--report", default="report.json", show_default=True, type=click.Path(path_type=Path, dir_okay=False))
@output_option
def command(
    data: Path,
    min_patients: int,
    rounds: int,
    k: int,
    site_intercept: bool | None,
    in_process: bool,
    seed: int,
    draws: int,
    directory: Path | None,
    report: Path,
    output: str,
) -> None:
    """Train on the trial's hospitals as a real federation, and compare with what else could be done."""
    say(f"reading {data}")
    report.parent.mkdir(parents=True, exist_ok=True)
    study = Study.of(data, min_patients=min_patients, rounds=rounds, k=k, seed=seed)
    regions = ", ".join(f"{region} {len(own)}" for region, own in study.regions.items())
    say(f"{len(study.hospitals)} hospitals of at least {min_patients} patients: {regions}")
    kinds = (False, True) if site_intercept is None else (site_intercept,)
    with _folder(directory) as folder:
        document = study_report(study, kinds, folder, in_process=in_process, draws=draws)
    about = {"file": data.name, "sha256": hashlib.sha256(data.read_bytes()).hexdigest(), "source": SOURCE}
    document = {"data": about, "min_patients": min_patients, **document}
    report.write_text(json.dumps({"schema": SCHEMA, **document}, indent=2) + "\n", encoding="utf-8")
    emit(document, SCHEMA, output, lambda: _show(document))
    say(f"all of it is in {report}")


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        if kept.exists() and any(kept.iterdir()):
            raise ConfigError("--dir", str(kept), "must be an empty folder, or a new one")
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="hierfl-stroke-") as folder:
        yield Path(folder)


def study_report(
    study: Study, kinds: tuple[bool, ...], folder: Path, *, in_process: bool, draws: int
) -> dict[str, Any]:
    """Train with and without an intercept at each site (``kinds``), measure, compare: the report's document."""
    started, data = time.monotonic(), folder / "hospitals"
    write_hospitals(study.hospitals, data)
    jobs = [study.job(own_intercept=kind) for kind in kinds]
    same = [reference.train(job, study.sites, data) for job in jobs]
    ran: list[tuple[Trained, dict[str, Any]]]
    if in_process:
        ran = [(one, {}) for one in same]
    else:
        from real import run_jobs  # it needs hierfl[server]; the loop does not

        ran = run_until_stopped(run_jobs(study, jobs, data, folder / STATE_DIR))
    say("measuring, and training what it is compared with")
    judge = Judge(
        {site: held_out.outcomes for site, (_, held_out) in study.split.items()}, draws=draws, seed=study.seed
    )
    results = [
        {
            "intercept": "site" if kind else "shared",
            "model_sha256": trained.model_sha256,
            "in_process_sha256": loop.model_sha256,
            **about,
            "models": _measure(study, trained, data, judge, own_intercept=kind),
        }
        for kind, loop, (trained, about) in zip(kinds, same, ran, strict=True)
    ]
    seconds = round(time.monotonic() - started, 1)
    return {**_describe(study), "in_process": in_process, "seconds": seconds, "results": results}


def _describe(study: Study) -> dict[str, Any]:
    regions = [
        {
            "name": region,
            "countries": sorted({hospital.country for hospital in own}),
            "hospitals": len(own),
            "patients": sum(len(hospital.rows) for hospital in own),
        }
        for region, own in study.regions.items()
    ]
    return {
        "hospitals": len(study.hospitals),
        "patients": {
            "training": sum(len(training) for training, _ in study.split.values()),
            "held_out": sum(len(held_out) for _, held_out in study.split.values()),
        },
        "inputs": len(INPUTS),
        "k": study.k,
        "seed": study.seed,
        "rounds_planned": study.rounds,
        "regions": regions,
    }


def _measure(study: Study, trained: Trained, data: Path, judge: Judge, *, own_intercept: bool) -> dict[str, Any]:
    """Every model's metrics with their intervals, and those of the federated model minus each other one's."""
    job = study.job(own_intercept=own_intercept)
    risks = {"federated": risks_of(trained, study.split)}
    risks |= baselines(job, study.sites, study.split, data, own_intercept=own_intercept)
    measured = {name: judge.measure(own, other_hospitals=name == SET_ASIDE) for name, own in risks.items()}
    federated = {True: judge.measure(risks["federated"], other_hospitals=True), False: measured["federated"]}
    return {
        name: {
            **_documents(found),
            "federated_minus_this": _documents(_minus(federated[name == SET_ASIDE], found)),
        }
        for name, found in measured.items()
    }


def _minus(left: Mapping[str, Float64Array], right: Mapping[str, Float64Array]) -> dict[str, Float64Array]:
    return {name: left[name] - right[name] for name in METRICS}


def _documents(found: Mapping[str, Float64Array]) -> dict[str, Any]:
    return {name: estimate(found[name]).document() for name in METRICS}


# --- the table


def _show(document: Mapping[str, Any]) -> None:
    patients = document["patients"]
    click.echo(
        f"death or dependency at six months: {document['hospitals']} hospitals in {len(document['regions'])} regions,"
        f" {patients['training']:,} patients to train on, {patients['held_out']:,} held out"
    )
    for result in document["results"]:
        click.echo()
        headings = (INTERCEPTS[result["intercept"] == "site"], "AUC", "log loss", "calibration error", "slope")
        rows = [
            (WORDS[name], *(_cell(found[metric]) for metric in METRICS)) for name, found in result["models"].items()
        ]
        table(headings, rows)
        difference = result["models"]["pooled"]["federated_minus_this"]["auc"]
        click.echo(f"federated minus pooled AUC  {_cell(difference, '+.3f')}")
        click.echo(f"model SHA-256  {result['model_sha256']}  ({_origin(document, result)})")
    click.echo()
    click.echo(
        "AUC, log loss: means over hospitals. Calibration error: of a hospital's rate, root mean square over them."
    )
    click.echo("In brackets 95 % bootstrap intervals; where it never trained, of other hospitals like these.")
    click.echo(f"data: {SOURCE}")


def _origin(document: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if document["in_process"]:
        return "made in a plain loop"
    if result["model_sha256"] == result["in_process_sha256"]:
        return "a plain loop makes the same"
    return "a plain loop makes another: not every hospital was in every round"


def _cell(found: Mapping[str, float], form: str = ".3f") -> str:
    return "{value:{form}} ({low:{form}} to {high:{form}})".format(form=form, **found)


def main() -> int:
    """Run the command; every way to end is a line and an exit code, as with ``hierfl``."""
    try:
        command(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Interrupted as error:
        click.echo(str(error), err=True)
        return error.exit_code
    except HierFLError as error:
        click.echo(f"error {error.code}: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return Interrupted.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
