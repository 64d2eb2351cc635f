"""``hierfl models``: committed versions, and their export as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hierfl.cli.output import emit, output_option, say, table
from hierfl.cli.reach import call, operator_options
from hierfl.errors import NotFound

if TYPE_CHECKING:
    from hierfl.operator import Operator
    from hierfl.wire import hierfl_pb2 as pb

__all__ = ["models"]


@click.group()
def models() -> None:
    """List and export committed models."""


@models.command("list")
@click.argument("run", required=False, default="")
@operator_options
@output_option
def list_(run: str, kit: Path | None, address: tuple[str, ...], output: str) -> None:
    """Model versions of RUN, or of all runs."""
    found = call(kit, address, lambda operator: operator.models(run))
    rows = [(m.run, m.version, m.num_params, m.size_bytes, sums_of(m), m.model_hash) for m in found]
    headings = ("run", "version", "parameters", "bytes", "sums", "sha256")
    document = {"models": [dict(zip(headings, row, strict=True)) for row in rows]}
    emit(document, "hierfl.models/1", output, lambda: table(headings, rows, empty="no models yet"))


def sums_of(model: pb.Model) -> str:
    """Of which sums a version was made, in words."""
    return "approximate across regions" if model.approximate_across_regions else "exact"


@models.command()
@click.argument("run")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--version", "version", type=int, help="Which version. Default: the newest.")
@operator_options
@output_option
def export(run: str, file: Path, version: int | None, kit: Path | None, address: tuple[str, ...], output: str) -> None:
    """Write a model of RUN to FILE: .safetensors, or .pt where torch is installed.

    \b
    Examples:
      hierfl models export digits-7f3a2b model.safetensors
      hierfl models export digits-7f3a2b model.pt --version 5
    """
    from hierfl import modelfile

    modelfile.check_suffix(file)

    async def work(operator: Operator) -> pb.Model:
        model = _pick(await operator.models(run), run, version)
        layout, vectors = await operator.fetch_model(model)
        metadata = {
            "hierfl.run": model.run,
            "hierfl.version": str(model.version),
            "hierfl.model_sha256": model.model_hash,
            "hierfl.layout_sha256": model.layout_hash,
            "hierfl.sums": sums_of(model),
        }
        modelfile.write(file, layout.unflatten(vectors), metadata)
        return model

    model = call(kit, address, work)
    document = {"run": model.run, "version": model.version, "sha256": model.model_hash, "file": str(file)}
    emit(document, "hierfl.model_export/1", output, lambda: click.echo(str(file)))
    say(f"version {model.version} of run {model.run}, SHA-256 {model.model_hash}")


def _pick(found: list[pb.Model], run: str, version: int | None) -> pb.Model:
    by_version = {model.version: model for model in found}
    if not by_version:
        raise NotFound("model of run", run, "list the runs with `hierfl runs list`")
    wanted = max(by_version) if version is None else version
    if wanted not in by_version:
        raise NotFound("version", str(wanted), f"run {run} has {min(by_version)} to {max(by_version)}")
    return by_version[wanted]
