"""``hierfl doctor``: is this machine fit, is this kit whole, does its server answer?

Every check looks at one thing and returns findings; none changes anything. What is wrong comes with
the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import shutil
import socket
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hierfl.cli.output import emit, output_option, say, table
from hierfl.config import Address
from hierfl.errors import ConfigError, HierFLError, NotTheLeader

if TYPE_CHECKING:
    from hierfl.pki import Kit

__all__ = ["Finding", "State", "doctor"]

GIB = 2**30
LEAST_DISK_BYTES, GOOD_DISK_BYTES = GIB // 4, 5 * GIB
GOOD_FILE_LIMIT = 4_096
"""Open files: a combiner holds one for each waiting client, up to 4,000 an intake."""
LEAST_LIFE_LEFT = 0.1
"""Share of a certificate's life below which it is time for the next one."""
ANSWER_WITHIN_S = 5.0

PACKAGES = {
    "a site's client": ("grpc", "pyarrow", "numpy", "cryptography", "msgspec", "blake3"),
    "controllers and combiners (hierfl[server])": ("ray", "numba", "psutil"),
    "apps with PyTorch (hierfl[torch])": ("torch",),
    "the demo (hierfl[demo])": ("sklearn", "matplotlib"),
}
"""What each use of hierfl imports; the first is part of every installation."""


class State(StrEnum):
    """How a thing is. Only ``WRONG`` makes the command fail."""

    OK = "ok"
    ABSENT = "absent"  # not there, and perhaps not needed here
    WARNING = "warning"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """One thing looked at; ``next`` is a step to take, where there is one."""

    check: str
    state: State
    found: str
    next: str = ""


@click.command()
@click.option("--kit", type=click.Path(path_type=Path), help="Check this kit, and whether its server answers.")
@click.option(
    "--server", "servers", metavar="HOST:PORT", multiple=True, help="Where to look for it. Default: the kit's."
)
@click.option("--listen", metavar="HOST:PORT", multiple=True, help="Check that this address is free to listen on.")
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), default=".", show_default=True, help="Check this folder's disk."
)
@output_option
def doctor(kit: Path | None, servers: tuple[str, ...], listen: tuple[str, ...], folder: Path, output: str) -> int:
    """Check this machine: Python, packages, disk, limits; with --kit its certificates and its server.

    Exits with 1 if anything is wrong.

    \b
    Examples:
      hierfl doctor
      hierfl doctor --kit kits/site-00
      hierfl doctor --kit kits/combiner --listen 0.0.0.0:4433 --dir /var/lib/hierfl
    """
    found = list(examine(kit, servers, listen, folder))
    rows = [(finding.state, finding.check, finding.found) for finding in found]
    emit(
        {"findings": [asdict(finding) for finding in found]},
        "hierfl.doctor/1",
        output,
        lambda: table(("is", "check", "found"), rows),
    )
    for finding in found:
        if finding.next:
            say(f"{finding.check}: {finding.next}")
    return 1 if any(finding.state is State.WRONG for finding in found) else 0


def examine(kit: Path | None, servers: Sequence[str], listen: Sequence[str], folder: Path) -> Iterator[Finding]:
    """All checks, in order; those of a kit only where one is given."""
    yield check_python(sys.version_info[:3], sys.maxsize)
    for use, names in PACKAGES.items():
        say(f"importing the packages of {use}")  # it can take seconds
        yield check_packages(use, names)
    yield check_disk(folder)
    yield from check_file_limit()
    for address in listen:
        yield check_listen(address)
    if kit is not None:
        yield from check_kit(kit, servers, datetime.now(UTC))


# --- the machine


def check_python(version: tuple[int, ...], maxsize: int) -> Finding:
    words = f"{'.'.join(map(str, version))}, {64 if maxsize > 2**32 else 32} bit"
    if version < (3, 11) or maxsize <= 2**32:
        return Finding("python", State.WRONG, words, "hierfl needs Python 3.11 or later, 64 bit")
    return Finding("python", State.OK, words)


def check_packages(use: str, names: Iterable[str]) -> Finding:
    """Import what ``use`` needs: only that shows whether it can be."""
    absent: list[str] = []
    broken: list[str] = []
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:
                absent.append(name)
            else:
                broken.append(f"{name} ({error})")
        except Exception as error:  # noqa: BLE001  a package may fail in any way while it loads; that is the finding
            broken.append(f"{name} ({type(error).__name__}: {error})")
    check = f"packages of {use}"
    if broken:
        return Finding(check, State.WRONG, f"cannot be imported: {'; '.join(broken)}", "install it again")
    if absent:
        missing = State.WRONG if "client" in use else State.ABSENT
        return Finding(check, missing, f"not installed: {', '.join(absent)}")
    return Finding(check, State.OK, ", ".join(names))


def check_disk(folder: Path) -> Finding:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    words = f"{free / GIB:.1f} GiB free at {existing}"
    if free < LEAST_DISK_BYTES:
        return Finding("disk", State.WRONG, words, "make room: models, sealed sums and stores are written here")
    if free < GOOD_DISK_BYTES:
        return Finding("disk", State.WARNING, words, "make room before a long run: every version of a model is kept")
    return Finding("disk", State.OK, words)


def check_file_limit() -> Iterator[Finding]:
    """The limit on open files; Windows has none that matters."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < GOOD_FILE_LIMIT:
        step = f"`ulimit -n {GOOD_FILE_LIMIT}` before a combiner starts: each waiting client is one open file"
        yield Finding("open files", State.WARNING, f"at most {soft:,} (could be {hard:,})", step)
    else:
        yield Finding("open files", State.OK, "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft:,}")


def check_listen(text: str) -> Finding:
    check = f"listen on {text}"
    try:
        address = Address.parse(text)
    except ValueError as error:
        raise ConfigError("--listen", text, str(error)) from None
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as server:
            if sys.platform != "win32":
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((address.host.strip("[]"), address.port))
            server.listen()
    except OSError as error:
        return Finding(check, State.WRONG, error.strerror or str(error), "choose another address, or port 0 for any")
    return Finding(check, State.OK, "free")


# --- the kit


def check_kit(path: Path, servers: Sequence[str], now: datetime) -> Iterator[Finding]:
    """The kit's files, its certificate beside this clock, its key's mode, and its server."""
    from hierfl.pki import Kit

    try:
        kit = Kit.load(path, now)
    except HierFLError as error:
        words = f"{error}; this clock says {now:%Y-%m-%d %H:%M} UTC" if "expire" in str(error) else str(error)
        yield Finding("kit", State.WRONG, words, f"hierfl explain {error.code}")
        return
    yield Finding("kit", State.OK, f"{kit.identity} of {kit.identity.federation}")
    yield check_life(kit.certificate.not_valid_before_utc, kit.certificate.not_valid_after_utc, now)
    if os.name == "posix":
        yield check_mode(path / "key.pem")
    yield from asyncio.run(check_servers(kit, servers or kit.addresses))


def check_life(begins: datetime, ends: datetime, now: datetime) -> Finding:
    """How much of a valid certificate's life is left on this clock."""
    days = (ends - now).total_seconds() / 86_400
    words = f"{begins:%Y-%m-%d} to {ends:%Y-%m-%d}, {days:.0f} days left on this clock ({now:%Y-%m-%d %H:%M} UTC)"
    if (ends - now) < LEAST_LIFE_LEFT * (ends - begins):
        return Finding("certificate", State.WARNING, words, "ask for the next one now: `hierfl provision` makes it")
    return Finding("certificate", State.OK, words)


def check_mode(key: Path) -> Finding:
    mode = stat.S_IMODE(key.stat().st_mode)
    if mode & 0o077:
        return Finding("private key", State.WARNING, f"{key} is open to others, mode {mode:04o}", f"chmod 600 {key}")
    return Finding("private key", State.OK, f"mode {mode:04o}")


async def check_servers(kit: Kit, addresses: Sequence[str]) -> list[Finding]:
    """Say hello to the server that the kit's holder connects to, at each address."""
    server = kit.identity.dials
    if server is None:
        return []
    if not addresses:
        return [Finding("server", State.ABSENT, "the kit names no address", f"give that of {server} with --server")]
    return [await _check_server(kit, address) for address in addresses]


async def _check_server(kit: Kit, address: str) -> Finding:
    from hierfl.wire import rpc, tls

    server = kit.identity.dials
    assert server is not None, "asked only of those who dial"
    check = f"{server} at {address}"
    host, port = Address.parse(address)
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), port)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    except (OSError, TimeoutError) as error:
        words = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return Finding(check, State.WRONG, words, "is it running there, and does a firewall let this machine through?")
    channel = tls.open_channel(kit, address, server)
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            version = await rpc.hello(rpc.stub(channel, _SERVICES[kit.identity.role]), str(server), address)
    except TimeoutError:
        return Finding(check, State.WRONG, "listens, but does not answer", "is it hierfl, and not a proxy in between?")
    except NotTheLeader as error:
        return Finding(check, State.OK, str(error))
    except HierFLError as error:
        return Finding(check, State.WRONG, str(error), f"hierfl explain {error.code}")
    finally:
        await channel.close()
    return Finding(check, State.OK, f"answers, protocol version {version}")


_SERVICES = {
    "client": "CombinerService",
    "region_operator": "RegionOperatorService",
    "combiner": "ControllerService",
    "operator": "OperatorService",
}
"""The service that each role speaks to."""
