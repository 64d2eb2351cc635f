"""``hierfl audit``: from stores and files, what became of every update of a run, and whether it can be proved.

Its halves belong to the packages whose stores they read, and meet on signed summaries (``hierfl/audit.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hierfl.cli.output import emit, output_option, say, table
from hierfl.cli.reach import STATE_DIR, state_dir
from hierfl.errors import AuditMismatch, ConfigError, ExtraMissing, NotFound, WireError

if TYPE_CHECKING:
    from hierfl.audit import Book, Finding, RegionSummary, SignedSummary
    from hierfl.pki import Kit
    from hierfl.types import RegionId

__all__ = ["audit"]


@dataclass
class _Report:
    """What all halves that were run have found."""

    run: str
    books: list[Book] = field(default_factory=list)
    summaries: dict[RegionId, RegionSummary] = field(default_factory=dict)
    controller: Any = None
    """A ``ControllerReport``, where the controller's half was run."""

    @property
    def findings(self) -> list[Finding]:
        return [finding for book in self.books for finding in book.findings]


FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.argument("run")
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=FOLDER,
    help="State folder of `hierfl up`: all regions and the controller. Default: the federation in this folder.",
)
@click.option(
    "--region-dir",
    metavar="DIR",
    type=FOLDER,
    help="A combiner's --dir: only this region's half.",
)
@click.option(
    "--controller-dir",
    metavar="DIR",
    type=FOLDER,
    help="The controller's --dir: its half, against the regions' summaries.",
)
@click.option(
    "--kit",
    "kit_dir",
    envvar="HIERFL_KIT",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="With one of these two: the combiner's kit, or the controller's.",
)
@click.option(
    "--sites",
    metavar="DIR",
    type=FOLDER,
    help="With --region-dir: kits of the region's clients, to check each receipt's signature by itself.",
)
@click.option(
    "--summary",
    "summary_files",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="With --controller-dir: a region's signed summary; repeat it for each region.",
)
@click.option(
    "--write-summary",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --region-dir: where the signed summary goes. It holds no names.",
)
@click.option(
    "--replay", is_flag=True, help="Also make every model again from the partials kept, and compare its bits."
)
@output_option
def audit(
    run: str,
    directory: Path | None,
    region_dir: Path | None,
    controller_dir: Path | None,
    kit_dir: Path | None,
    sites: Path | None,
    summary_files: tuple[Path, ...],
    write_summary: Path | None,
    replay: bool,
    output: str,
) -> None:
    """Check everything that is stored of RUN: receipts, seals, border ledgers, records, models.

    Nothing has to run, and what runs is not disturbed. A region's receipts stay in it: its half writes a signed
    summary without names, and the controller's half is held against the summaries. The exit code is 8 where a row
    is wrong; the report names it.

    \b
    Examples:
      hierfl audit digits-7f3a2b --replay
      hierfl audit digits-7f3a2b --region-dir /var/lib/hierfl --kit combiner-kit --write-summary eu.json
      hierfl audit digits-7f3a2b --controller-dir /var/lib/hierfl --kit controller-kit --summary eu.json
    """
    report = _Report(run)
    if region_dir is not None:
        _refuse({"--controller-dir": controller_dir, "--dir": directory, "--summary": summary_files}, "--region-dir")
        signed = _region(report, region_dir, _kit(kit_dir, "--region-dir"), sites)
        if write_summary is not None:
            _write(write_summary, signed)
    elif controller_dir is not None:
        _refuse({"--dir": directory, "--sites": sites, "--write-summary": write_summary}, "--controller-dir")
        kit = _kit(kit_dir, "--controller-dir")
        _take_summaries(report, summary_files, kit)
        _controller(report, controller_dir, kit, replay=replay)
    else:
        _whole(report, _state(directory), replay=replay)
    emit(_document(report), "hierfl.audit/1", output, lambda: _show(report))
    wrong = [finding for finding in report.findings if finding.kind == "wrong"]
    if wrong:
        raise AuditMismatch(f"run {run}: {len(wrong)} of what was looked at is wrong; the first: {wrong[0]}")


# ---------------------------------------------------------------- the halves


def _half(name: str) -> Callable[..., Any]:
    """One half, from the package that has it (``hierfl`` imports neither)."""
    from importlib.metadata import entry_points

    found = list(entry_points(group="hierfl.audits", name=name))
    if not found:
        raise ExtraMissing(f"the audit of a {name}", "hierfl[server]")
    half: Callable[..., Any] = found[0].load()
    return half


def _region(report: _Report, directory: Path, kit: Kit, sites: Path | None, *, anyway: bool = False) -> SignedSummary:
    say(f"region {kit.identity.region}: receipts, seals, border ledger")
    book, summary, signed = _half("region")(report.run, directory, kit, sites, anyway=anyway)
    report.books.append(book)
    report.summaries[summary.region] = summary
    made: SignedSummary = signed
    return made


def _controller(report: _Report, directory: Path, kit: Kit, *, replay: bool) -> None:
    say("controller: records, rows, models" + ("; models are made again" if replay else ""))
    report.controller = _half("controller")(report.run, directory, kit, report.summaries, again=replay)
    report.books.append(report.controller.book)


def _whole(report: _Report, state: Path, *, replay: bool) -> None:
    """A federation on one machine: every region, then the controller, by the kits in its own folder."""
    kits = state / "kits"
    for kit_dir in sorted(kits.glob("regions/*/combiner")):
        kit = _load(kit_dir)
        home = state / "regions" / kit.identity.region
        if (home / "zone.sqlite").is_file():
            _region(report, home, kit, kits / "sites" / kit.identity.region, anyway=True)
    _controller(report, state / "controller", _load(kits / "controller"), replay=replay)


def _take_summaries(report: _Report, files: Iterable[Path], kit: Kit) -> None:
    from hierfl import documents
    from hierfl.audit import SignedSummary, read_summary, summaries_by_region

    found = []
    for file in files:
        try:
            signed = documents.decode(file.read_bytes(), SignedSummary, str(file))
        except WireError as error:
            raise ConfigError("--summary", str(file), f"must be what --write-summary wrote: {error}") from None
        found.append(read_summary(signed, kit.trust))
    report.summaries.update(summaries_by_region(found))


# ---------------------------------------------------------------- what is needed


def _refuse(options: Mapping[str, object], beside: str) -> None:
    for name, value in options.items():
        if value:
            raise ConfigError(name, None, f"does not go with {beside}: each half is run where its store is")


def _kit(path: Path | None, option: str) -> Kit:
    if path is None:
        raise ConfigError("--kit", None, f"is needed with {option}: it says whom the audit believes")
    return _load(path)


def _load(path: Path) -> Kit:
    """A kit at a moment of its life: an audit asks what was signed then, so one that has expired will do."""
    from cryptography import x509

    from hierfl.pki import Kit

    try:
        certificate = x509.load_pem_x509_certificate((path / "identity.pem").read_bytes())
    except (OSError, ValueError):
        return Kit.load(path)  # says what is wrong with it
    return Kit.load(path, certificate.not_valid_before_utc)


def _state(directory: Path | None) -> Path:
    found = directory or state_dir()
    if found is None:
        raise NotFound(
            "federation", STATE_DIR, "name its folder with --dir, or one half's with --region-dir or --controller-dir"
        )
    return found if (found / "kits").is_dir() else found / STATE_DIR


def _write(file: Path, signed: SignedSummary) -> None:
    from hierfl import documents
    from hierfl.folders import whole_file

    with whole_file(file) as temporary:
        temporary.write_bytes(documents.encode(signed))
    say(f"signed summary in {file}: hand it to the auditor at the controller")


# ---------------------------------------------------------------- what is said


def _document(report: _Report) -> dict[str, Any]:
    by_kind: dict[str, list[dict[str, str]]] = {"wrong": [], "pruned": [], "open": []}
    for finding in report.findings:
        about = ("where", "table", "key", "what", "found", "expected")
        by_kind[str(finding.kind)].append({name: getattr(finding, name) for name in about})
    half = report.controller
    return {
        "run": report.run,
        "ok": not by_kind["wrong"],
        "checks": sum(book.num_checks for book in report.books),
        **by_kind,
        "regions": [_region_document(summary) for _, summary in sorted(report.summaries.items())],
        "controller": half
        and {
            "versions": half.versions,
            "rounds": half.rounds,
            "weights": {str(version): weight for version, weight in half.weights.items()},
            "missing_summaries": list(half.missing_summaries),
            "replayed": half.replayed,
        },
    }


def _region_document(summary: RegionSummary) -> dict[str, Any]:
    return {
        "region": summary.region,
        "ledger_rows": summary.ledger_rows,
        "ledger_head": summary.ledger_head,
        "countersigned": summary.countersigned,
        "seals": [
            {
                "seal_id": seal.seal_id,
                "digest": seal.digest,
                "collected_in": seal.collected_in,
                "rounds": [str(key) for key in seal.addressed_to],
                "weight": seal.weight,
                "sites": seal.num_sites,
                "updates": seal.num_updates,
                "updates_root": seal.updates_root,
                "state": str(seal.state),
                "version": seal.version,
                "reason": seal.reason,
                "crossings": seal.crossings,
                "kept": seal.is_kept,
            }
            for seal in summary.seals
        ],
    }


def _show(report: _Report) -> None:
    _show_seals(report.summaries.values())
    for finding in report.findings:
        click.echo(f"{finding.kind:<7}{finding}")
    half = report.controller
    if half is not None:
        again = "" if half.replayed is None else f", {half.replayed} models made again with the same bits"
        click.echo(f"controller: {half.rounds} rounds, {half.versions} versions{again}")
        for region in half.missing_summaries:
            click.echo(f"missing: the summary of region {region}; its partials were counted and are not proved by it")
    num_wrong = sum(finding.kind == "wrong" for finding in report.findings)
    checks = sum(book.num_checks for book in report.books)
    click.echo(f"{checks:,} checks, {'all fine' if not num_wrong else f'{num_wrong} wrong'}")


def _show_seals(summaries: Iterable[RegionSummary]) -> None:
    rows: list[Sequence[object]] = []
    for summary in summaries:
        for seal in summary.seals:
            word = f"{seal.state}({seal.version or seal.reason})" if seal.version or seal.reason else str(seal.state)
            rows.append((summary.region, seal.seal_id, seal.num_sites, seal.num_updates, seal.weight, word))
    table(("region", "seal", "sites", "updates", "weight", "word"), rows, empty="no region has a seal of this run")
