"""``hierfl init``: a federation, a job and an app that run as they are."""

from __future__ import annotations

import contextlib
import errno
from importlib import resources
from pathlib import Path

import click

from hierfl.cli.output import say
from hierfl.errors import ConfigError, DiskFull, StorageError

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
    _write_all(folder)
    for name in FILES:
        click.echo(str(folder / name))
    where = "" if folder == Path() else f"cd {folder} && "
    say(f"next: {where}hierfl up, and in another terminal: {where}hierfl train job.toml")


def _write_all(folder: Path) -> None:
    """All files, or none."""
    source = resources.files("hierfl") / "cli" / "init-files"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).write_text((source / name).read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        for name in FILES:
            with contextlib.suppress(OSError):
                (folder / name).unlink()  # none was there before
        kind = DiskFull if error.errno == errno.ENOSPC else StorageError
        raise kind(f"{folder} cannot be written: {error.strerror}; nothing was left there") from None
