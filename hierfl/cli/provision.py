"""``hierfl provision``: a federation's certificate authorities, and the kits that are handed out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hierfl.cli.output import emit, output_option, say, table
from hierfl.cli.reach import STATE_DIR, state_dir

if TYPE_CHECKING:
    from hierfl.pki import Kit
    from hierfl.provision import KitEntry

__all__ = ["provision"]

F = TypeVar("F", bound=Callable[..., Any])


def _directory_option(function: F) -> F:
    return click.option(
        "--dir",
        "directory",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="HIERFL_FEDERATION_DIR",
        help=f"The federation's folder. Default: the nearest {STATE_DIR} in this folder or above.",
    )(function)


def _addresses_option(server: str) -> Callable[[F], F]:
    return click.option(
        "--address",
        "addresses",
        metavar="HOST:PORT",
        multiple=True,
        help=f"Where {server} is dialled; may be given several times. It goes into the kits of those who dial it.",
    )


def _find(directory: Path | None) -> Path:
    return directory or state_dir() or Path(STATE_DIR)


@click.group()
def provision() -> None:
    """Make a federation's certificates, and the kits that its members get.

    The folder's pki/ holds the certificate authorities and stays where it is; kits/ is handed out, each
    folder of it whole, to the one machine that its name says.

    \b
    Examples:
      hierfl provision init acme --address hub.acme.example:4433
      hierfl provision region eu-west --address eu.acme.example:4433
      hierfl provision site eu-west charite
      hierfl provision operator alice
      hierfl provision list
    """


@provision.command("init", short_help="Make a federation.")
@click.argument("federation")
@_addresses_option("the controller")
@_directory_option
@output_option
def init_(federation: str, addresses: tuple[str, ...], directory: Path | None, output: str) -> None:
    """Make the federation called FEDERATION: the controller's authority and its kit.

    \b
    Examples:
      hierfl provision init acme --address hub.acme.example:4433
      hierfl provision init acme --dir /srv/acme
    """
    from hierfl.provision import init

    kit = init(directory or Path(STATE_DIR), federation, addresses)
    _made([kit], output, f"federation {federation}; the controller's kit:")


@provision.command(short_help="Make a region.")
@click.argument("name")
@_addresses_option("the region's combiner")
@_directory_option
@output_option
def region(name: str, addresses: tuple[str, ...], directory: Path | None, output: str) -> None:
    """Make the region NAME: its own authority, its ledger key, its combiner's kit.

    The controller's kit learns to trust it; a controller that runs elsewhere needs that kit again, and a restart.

    \b
    Examples:
      hierfl provision region eu-west --address eu.acme.example:4433
    """
    from hierfl.provision import add_region

    kit = add_region(_find(directory), name, addresses)
    _made([kit], output, f"region {name}; its combiner's kit:")


@provision.command(short_help="Make the kits of a site's clients.")
@click.argument("region")
@click.argument("name")
@click.option("--clients", type=int, default=1, show_default=True, help="How many clients it runs in all.")
@_directory_option
@output_option
def site(region: str, name: str, clients: int, directory: Path | None, output: str) -> None:
    """Make the kits of the clients of site NAME in REGION, or of more clients there.

    \b
    Examples:
      hierfl provision site eu-west charite
      hierfl provision site eu-west charite --clients 3
    """
    from hierfl.provision import add_site

    kits = add_site(_find(directory), region, name, clients)
    _made(kits, output, f"site {name} in region {region}; its clients' kits:")


@provision.command(short_help="Make an operator's kit.")
@click.argument("name")
@click.option("--region", default="", help="Of this region's combiner only; else of the controller.")
@_directory_option
@output_option
def operator(name: str, region: str, directory: Path | None, output: str) -> None:
    """Make the kit of the operator NAME.

    \b
    Examples:
      hierfl provision operator alice
      hierfl provision operator bob --region eu-west
    """
    from hierfl.provision import add_operator

    kit = add_operator(_find(directory), name, region)
    _made([kit], output, f"operator {name}{f' of {region}' if region else ''}; the kit:")


@provision.command(short_help="Renew certificates.")
@click.option("--region", default="", help="Only certificates of this region.")
@_directory_option
@output_option
def renew(region: str, directory: Path | None, output: str) -> None:
    """Issue the certificates of all kits anew, for the same keys; only identity.pem changes.

    \b
    Examples:
      hierfl provision renew
      hierfl provision renew --region eu-west -o json
    """
    from hierfl.provision import renew as renew_all

    files = renew_all(_find(directory), region)
    _made(files, output, f"{len(files)} certificates renewed; copy each over the one in the kit that was handed out:")


def _made(paths: Iterable[Path], output: str, talk: str) -> None:
    paths = [path.resolve() for path in paths]
    say(talk)
    document = {"paths": [str(path) for path in paths]}
    emit(document, "hierfl.provision_made/1", output, lambda: click.echo("\n".join(document["paths"])))


@provision.command("list", short_help="List regions and kits.")
@_directory_option
@output_option
def list_(directory: Path | None, output: str) -> None:
    """List the regions and kits of the federation.

    \b
    Examples:
      hierfl provision list
      hierfl provision list -o json
    """
    from hierfl.provision import listing

    folder = _find(directory)
    found = listing(folder)
    document = {
        "federation": found.federation,
        "regions": list(found.regions),
        "kits": [_entry_document(entry) for entry in found.kits],
    }

    def show() -> None:
        say(f"federation {found.federation}, regions: {', '.join(found.regions) or 'none yet'}")
        rows = [(str(e.identity), f"{e.expires:%Y-%m-%d %H:%M} UTC", e.path.relative_to(folder)) for e in found.kits]
        table(("identity", "valid until", "kit"), rows)

    emit(document, "hierfl.provision_list/1", output, show)


def _entry_document(entry: KitEntry) -> dict[str, str]:
    return {
        "identity": entry.identity.uri,
        "role": str(entry.identity.role),
        "expires": entry.expires.isoformat(),
        "path": str(entry.path.resolve()),
    }


@provision.command(short_help="Check a kit and say whose it is.")
@click.argument("kit", type=click.Path(path_type=Path))
@output_option
def show(kit: Path, output: str) -> None:
    """Check the kit in the folder KIT and say whose it is, for how long, and whom it trusts.

    \b
    Examples:
      hierfl provision show .hierfl/kits/controller
      hierfl provision show kits/sites/eu-west/charite/client-00 -o json
    """
    from hierfl.pki import Kit

    document = _kit_document(Kit.load(kit))
    rows = [(key, ", ".join(value) if isinstance(value, list) else value) for key, value in document.items()]
    emit(document, "hierfl.provision_kit/1", output, lambda: table(("of this kit", "is"), rows))


def _kit_document(kit: Kit) -> dict[str, str | list[str]]:
    from cryptography.hazmat.primitives import hashes

    dials = kit.identity.dials
    return {
        "identity": kit.identity.uri,
        "role": str(kit.identity.role),
        "expires": kit.expires.isoformat(),
        "fingerprint": f"sha256:{kit.certificate.fingerprint(hashes.SHA256()).hex()}",
        "dials": dials.uri if dials else "",
        "addresses": list(kit.addresses),
        "trusts": [*(["controller"] if kit.trust.controller else []), *(f"region {r}" for r in kit.trust.regions)],
    }
