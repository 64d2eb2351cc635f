"""The command line. ``main`` turns every way to end into one line and an exit code (``hierfl/errors.py``)."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from hierfl.errors import DiskFull, ExtraMissing, HierFLError, Interrupted, PortInUse, StorageError

__all__ = ["main"]

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC is imported: its own log is not for users

_FORBIDDEN = "this user may not do that here{where}: check who owns the file or folder, its mode, and its disk's"
_ERRNO = {
    errno.ENOSPC: (DiskFull, "no space left on the disk{where}; nothing half-written remains, make room and try again"),
    errno.EDQUOT: (DiskFull, "the disk quota is used up{where}; make room and try again"),
    errno.EACCES: (StorageError, _FORBIDDEN),
    errno.EPERM: (StorageError, _FORBIDDEN),
    errno.EROFS: (StorageError, _FORBIDDEN),
    errno.EADDRINUSE: (PortInUse, "another program listens on the port asked for{where}; choose another, or port 0"),
}
"""What the operating system says, for the few cases that reach the edge without a name of ours."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit. A command may return its exit code; ``None`` is 0."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, whatever happens."""
    from hierfl.cli.root import root

    try:
        code = root.main(args, prog_name="hierfl", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
        return 1
    except (KeyboardInterrupt, click.Abort):
        return Interrupted.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except HierFLError as error:
        return _report(error)
    except Exception as error:  # noqa: BLE001  the last resort of a program: its own bug, said in one line
        known = _known(error)
        return _report_bug(error) if known is None else _report(known)
    return code if isinstance(code, int) else 0


def _report(error: HierFLError) -> int:
    if isinstance(error, Interrupted):
        click.echo(str(error), err=True)
        return error.exit_code
    for one in getattr(error, "errors", (error,)):
        click.secho(f"error {one.code}: ", fg="red", err=True, nl=False)
        click.echo(str(one), err=True)
    first = getattr(error, "errors", (error,))[0]
    click.echo(f"more: hierfl explain {first.code}", err=True)
    return error.exit_code


def _known(error: Exception) -> HierFLError | None:
    """The error of ours that a foreign one amounts to."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        from hierfl.cli.root import EXTRA_OF

        extra = next((extra for package, extra in EXTRA_OF.items() if f"{error.name}.".startswith(package + ".")), "")
        return ExtraMissing(f"package {error.name}", f"hierfl[{extra}]") if extra else None
    if isinstance(error, OSError) and error.errno in _ERRNO:
        kind, text = _ERRNO[error.errno]
        return kind(text.format(where=f" ({error.filename})" if error.filename else ""))
    return None


def _report_bug(error: Exception) -> int:
    text = "".join(traceback.format_exception(error))
    if os.environ.get("HIERFL_DEBUG"):
        click.echo(text, err=True)
    saved = _save_traceback(text)
    words = f"{type(error).__name__}: {error}".splitlines()[0]
    click.echo(f"error {HierFLError.code}: {words}; this is a bug of hierfl, {saved}", err=True)
    return HierFLError.exit_code


def _save_traceback(text: str) -> str:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "hierfl" / "last-error.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(text, encoding="utf-8")
    except OSError:
        return "and HIERFL_DEBUG=1 shows where"
    return f"its traceback is in {path}"


def _silence_stdout() -> None:
    """Who read our output has gone; nothing more is to be written, at exit neither."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
