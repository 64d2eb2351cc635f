"""``hierfl client``: run an app at a site, and check one before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from hierfl.cli.output import emit, output_option, say
from hierfl.errors import ConfigError

__all__ = ["client"]

F = TypeVar("F", bound=Callable[..., Any])


def _set_option(function: F) -> F:
    return click.option(
        "--set",
        "settings",
        metavar="KEY=VALUE",
        multiple=True,
        help="Something the app finds in task.site_config, such as --set data=/srv/scans.",
    )(function)


@click.group()
def client() -> None:
    """Run an app at a site, and check it before."""


@client.command()
@click.argument("app_spec", metavar="APP")
@click.option(
    "--kit",
    "kits",
    metavar="DIR",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Folder of a client's kit. Several: one client each, all in this process.",
)
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where updates are held until their last word. Default: a folder of this user.",
)
@_set_option
@click.option(
    "--min-k", default=2, show_default=True, type=click.IntRange(min=2), help="Fewest sites in a sum to take part in."
)
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Clients that may train at once."
)
@click.option("--max-rounds", type=click.IntRange(min=1), help="Leave when each client has done so many rounds.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing while it goes well.")
def run(
    app_spec: str,
    kits: tuple[Path, ...],
    directory: Path | None,
    settings: tuple[str, ...],
    min_k: int,
    workers: int,
    max_rounds: int | None,
    quiet: bool,
) -> None:
    """Serve APP, a Python file or module with init and train, to the combiner of the kit's region.

    It dials out and opens no port. It runs until Ctrl-C, waits for a combiner that is away, and says what
    it waits for. Data, tracebacks and local tensors stay here; what leaves is the difference to the model.

    \b
    Examples:
      hierfl client run app.py --kit kits/client-00
      hierfl client run app.py --kit kits/client-00 --set data=/srv/scans --min-k 5
      hierfl client run my_package.app --kit kits/client-00 --kit kits/client-01 --dir /var/lib/hierfl
    """
    site_config = _pairs(settings)
    from hierfl.client.app import load_app
    from hierfl.client.runner import run as run_clients

    app = load_app(app_spec)
    talk = (lambda line: None) if quiet else say
    talk(f"app {app} from {app.source}")
    run_clients(
        app,
        kits,
        directory or Path(click.get_app_dir("hierfl")) / "client",
        site_config=site_config,
        min_k=min_k,
        workers=workers,
        max_rounds=max_rounds,
        say=talk,
    )


@client.command()
@click.argument("app_spec", metavar="APP")
@click.option(
    "--kit",
    "kits",
    metavar="DIR",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Also check this client's kit, and the way to its combiner.",
)
@click.option(
    "--config",
    "job_file",
    metavar="JOB.toml",
    type=click.Path(path_type=Path),
    help="Try it with this job's [app], [model] and [strategy].",
)
@_set_option
@click.option("--no-train", is_flag=True, help="Do not train a round.")
@output_option
def check(
    app_spec: str, kits: tuple[Path, ...], job_file: Path | None, settings: tuple[str, ...], no_train: bool, output: str
) -> int:
    """Try APP here: import it, make its model, train one round on this site's data, and send nothing.

    The exit code is that of the first thing that is wrong, 0 where all is fine.

    \b
    Examples:
      hierfl client check app.py
      hierfl client check app.py --kit kits/client-00 --config job.toml --set data=/srv/scans
    """
    site_config = _pairs(settings)
    from hierfl.client.check import check as look
    from hierfl.config import load_job

    job = None if job_file is None else load_job(job_file)
    findings = []
    for finding in look(app_spec, kits, job, site_config, train=not no_train):
        findings.append(finding)
        if output == "table":
            click.echo(f"{'wrong' if finding.error else 'ok':<6}{finding.name}: {finding.words}")
    rows = [{"name": f.name, "ok": f.error is None, "words": f.words} for f in findings]
    emit({"findings": rows}, "hierfl.client_check/1", output, lambda: None)
    return next((finding.error.exit_code for finding in findings if finding.error), 0)


def _pairs(settings: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise ConfigError("--set", setting, "must be KEY=VALUE, such as --set data=/srv/scans")
        pairs[key] = value
    return pairs
