"""``hierfl client``: run an app at a site, check one before, and see what became of its updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hierfl.cli.output import emit, output_option, say, table
from hierfl.cli.reach import state_dir
from hierfl.errors import AuditMismatch, ConfigError, HierFLError

if TYPE_CHECKING:
    from hierfl.client.receipts import Told
    from hierfl.pki import Kit
    from hierfl.types import ClientRef

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


def _kits_option(words: str, *, required: bool = False) -> Callable[[F], F]:
    return click.option(
        "--kit",
        "kits",
        metavar="DIR",
        type=click.Path(path_type=Path),
        multiple=True,
        required=required,
        help=words,
    )


@click.group()
def client() -> None:
    """Run an app at a site, check it before, and see what became of its updates."""


@client.command()
@click.argument("app_spec", metavar="APP")
@_kits_option("Folder of a client's kit. Several: one client each, all in this process.", required=True)
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
        directory or _default_dir(),
        site_config=site_config,
        min_k=min_k,
        workers=workers,
        max_rounds=max_rounds,
        say=talk,
    )


@client.command()
@click.argument("app_spec", metavar="APP")
@_kits_option("Also check this client's kit, and the way to its combiner.")
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


@client.command()
@click.argument("run")
@_kits_option("Kits of the clients: their combiner is asked anew. Default: those of the federation in this folder.")
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="The --dir of `hierfl client run`. Default: as there, or the federation in this folder.",
)
@click.option("--offline", is_flag=True, help="Do not ask the combiner: only what is kept here.")
@output_option
def receipts(run: str, kits: tuple[Path, ...], directory: Path | None, offline: bool, output: str) -> None:
    """Show what became of each update of RUN that was made here: counted in which version, or not and why.

    Last words are kept here for 30 days after a run's newest one. The clients may be running meanwhile. The exit
    code is 8 where a combiner gives another last word than it gave before.

    \b
    Examples:
      hierfl client receipts digits-7f3a2b --kit kits/client-00
      hierfl client receipts digits-7f3a2b --dir /var/lib/hierfl --offline -o json
    """
    from hierfl.client.receipts import ask_anew, find_folders, kept_of_run

    state = state_dir() if directory is None else None
    where = directory or (state / "clients" if state is not None else _default_dir())
    folders = find_folders(where)
    wanted = _kits_of(state) if state is not None and not kits else _given_kits(kits)
    if kits:
        folders = {client: paths for client, paths in folders.items() if client in wanted}
    told = kept_of_run(folders, run)
    if not offline:
        told = ask_anew(told, wanted, folders, say)
    rows = [_receipt_row(one) for one in told]
    document = {"run": run, "receipts": [dict(zip(_RECEIPT_NAMES, row, strict=True)) for row in rows]}
    emit(document, "hierfl.client_receipts/1", output, lambda: _show_receipts(rows))
    contradicted = next((one for one in told if one.contradicts), None)
    if contradicted is not None:
        key, now = contradicted.kept.key, contradicted.now
        kept = f"{contradicted.kept.state} {contradicted.kept.version or contradicted.kept.reason}"
        assert now is not None, "what was not asked contradicts nothing"
        raise AuditMismatch(f"{key}: the combiner says {now.state} {now.version or now.reason}, it had said {kept}")


_RECEIPT_NAMES = (
    *("site", "client", "task", "round", "attempt", "digest", "weight", "state", "version", "reason"),
    *("at", "held", "asked"),
)


def _receipt_row(told: Told) -> Sequence[object]:
    from datetime import UTC, datetime

    kept, key, now = told.kept, told.kept.key, told.now
    newer = now if now is not None and now.digest == kept.digest and not kept.state.is_last_word else None
    state, version, reason = (newer or kept).state, (newer or kept).version, (newer or kept).reason
    at = datetime.fromtimestamp(kept.at_unix_ns / 1e9, UTC).isoformat(timespec="seconds")
    words = "" if now is None else str(now.state)
    return (
        *(told.client.site, told.client.client, str(key.task), key.round, key.attempt, kept.digest, kept.weight),
        *(str(state), version, reason, at, told.is_held, words),
    )


def _show_receipts(rows: Sequence[Sequence[object]]) -> None:
    headings = ("site", "client", "round", "attempt", "digest", "weight", "what became of it", "when")
    shown = []
    for row in rows:
        one = dict(zip(_RECEIPT_NAMES, row, strict=True))
        word = f"{one['state']} {one['version'] or one['reason'] or ''}".strip().replace("_", " ")
        round_ = f"{one['task']} {one['round']}"
        digest = str(one["digest"])[:19]
        shown.append((one["site"], one["client"], round_, one["attempt"], digest, one["weight"], word, one["at"]))
    table(headings, shown)


def _given_kits(paths: Sequence[Path]) -> dict[ClientRef, Kit]:
    from hierfl.client.link import checked
    from hierfl.pki import Kit

    kits = [checked(Kit.load(path)) for path in paths]
    return {kit.identity.client_ref: kit for kit in kits}


def _kits_of(state: Path) -> dict[ClientRef, Kit]:
    """Those of a federation on this machine; one that cannot be used is said, and its combiner not asked."""
    found = {}
    for path in sorted(state.glob("kits/sites/*/*/*")):
        try:
            found.update(_given_kits([path]))
        except HierFLError as error:
            say(f"the combiner is not asked with {path}: {error}")
    return found


def _default_dir() -> Path:
    return Path(click.get_app_dir("hierfl")) / "client"


def _pairs(settings: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise ConfigError("--set", setting, "must be KEY=VALUE, such as --set data=/srv/scans")
        pairs[key] = value
    return pairs
