"""``hierfl init``: a federation, a job and an app that run as they are."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import click

from hierfl.cli.output import say
from hierfl.errors import ConfigError, StorageError

__all__ = ["FILES", "init"]

FILES = ("federation.toml", "job.toml", "app.py")


@click.command()
@click.argument("folder", metavar="[DIR]", default=".", type=click.Path(path_type=Path, file_okay=False))
def init(folder: Path) -> None:
    """Write a commented federation.toml, job.toml and app.py into DIR (default: this folder).

    They run as they are. Nothing is overwritten.

    \b
    Examples:
      hierfl init quickstart && cd quickstart
      hierfl up
      hierfl train job.toml          in another terminal
    """
    present = [name for name in FILES if (folder / name).exists()]
    if present:
        raise ConfigError(str(folder), None, f"already has {', '.join(present)}; nothing was written")
    source = resources.files("hierfl") / "cli" / "init-files"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).write_text((source / name).read_text(encoding="utf-8"), encoding="utf-8")
            click.echo(str(folder / name))
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}") from None
    where = "" if folder == Path() else f"cd {folder} && "
    say(f"next: {where}hierfl up, and in another terminal: {where}hierfl train job.toml")
