"""A federation's folder: its CAs under ``pki/`` (they stay here), its kits under ``kits/`` (they are handed out).

    pki/controller/{ca.pem,ca.key,settings.toml}     kits/controller/
    pki/regions/R/{ca.pem,ca.key,settings.toml}      kits/regions/R/combiner/, kits/regions/R/operators/NAME/
    pki/regions/R/{ledger.pem,ledger.key}            kits/sites/R/S/CLIENT/, kits/operators/NAME/

Folders appear whole or not at all (``hierfl/folders.py``). A region is done when its combiner's kit is there,
and a federation when its controller's is; a step cut short before is taken up by calling it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from hierfl.config import Address
from hierfl.errors import ConfigError, NotFound
from hierfl.folders import write_file, write_folder
from hierfl.identity import Identity, RoleName, require_name
from hierfl.pki import Authority, certificate_pem, issue_leaf, issue_ledger, key_pem, make_ca, make_key
from hierfl.toml import build, open_toml

__all__ = ["KitEntry", "Listing", "add_operator", "add_region", "add_site", "init", "listing", "renew", "set_addresses"]

MAX_CLIENTS = 10_000
"""Most clients of one site."""


@dataclass(frozen=True, kw_only=True)
class KitEntry:
    """One kit of the folder."""

    identity: Identity
    path: Path
    expires: datetime


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a federation's folder holds, by name."""

    federation: str
    regions: tuple[str, ...]
    kits: tuple[KitEntry, ...]


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """``settings.toml`` beside a CA: what later kits need to know."""

    federation: str
    addresses: tuple[str, ...] = ()
    """``host:port`` at which the server of this CA is dialled."""


# --- what there is to do


def init(directory: Path, federation: str, addresses: Sequence[str] = ()) -> Path:
    """Make a federation: the controller's CA and its kit. Done already under this name, it stays as it is.

    Args:
        directory: The federation's folder; made where it is missing.
        addresses: Where combiners and operators dial the controller, ``host:port``.
    Returns:
        The controller's kit.
    Raises:
        ConfigError: A bad name or address, or the folder holds a federation of another name.
    """
    require_name("federation", federation)
    _require_addresses("controller address", addresses)
    controller = _controller_dir(directory)
    if controller.exists() and (found := _settings(controller).federation) != federation:
        raise ConfigError("federation", federation, f"is not what {directory} holds, which is {found}")
    if not controller.exists():
        authority = make_ca(federation)
        write_folder(controller, {**_ca_files(authority), "settings.toml": _toml(federation, addresses)})
    kit = directory / "kits" / "controller"
    if not kit.exists():
        identity = Identity(federation, RoleName.CONTROLLER)
        _write_kit(
            kit, identity, _authority(directory), _trust(directory, controller=True, regions=_regions(directory))
        )
    return kit


def add_region(directory: Path, region: str, addresses: Sequence[str] = (), *, exist_ok: bool = False) -> Path:
    """Make a region: its CA, its ledger key, its combiner's kit; the controller's kit learns to trust it.

    Args:
        addresses: Where the region's clients and operators dial its combiner, ``host:port``.
    Returns:
        The combiner's kit. A controller that is running reads its kit again when it is restarted.
    Raises:
        ConfigError: A bad name or address, or there is a region of that name and not ``exist_ok``.
        NotFound: The folder holds no federation.
    """
    federation = _federation(directory)
    require_name("region", region)
    _require_addresses("combiner address", addresses)
    kit = directory / "kits" / "regions" / region / "combiner"
    if kit.exists():
        _require(exist_ok, "region", region, "exists already; regions need names of their own")
        return kit
    home = _region_dir(directory, region)
    if not home.exists():
        write_folder(home, _new_region(federation, region, addresses))
    trust = directory / "kits" / "controller" / "trust" / "regions"
    if trust.exists():  # handed out and gone from here, it is its holder's to update
        write_file(trust / f"{region}.pem", (home / "ca.pem").read_bytes())
    identity = Identity(federation, RoleName.COMBINER, region=region)
    ledger = {name: (home / name).read_bytes() for name in ("ledger.pem", "ledger.key")}
    own = _trust(directory, controller=True, regions=[region])
    _write_kit(kit, identity, _authority(directory, region), {**own, **ledger}, _addresses(directory))
    return kit


def add_site(directory: Path, region: str, site: str, clients: int = 1, *, exist_ok: bool = False) -> list[Path]:
    """Make the kits of a site's clients: ``client-00``, ``client-01``, ... A site may be given more of them later.

    Returns:
        The kits of its first ``clients`` clients, those that were there included.
    Raises:
        ConfigError: A bad name or number, or they are all there and not ``exist_ok``.
        NotFound: No such federation or region.
    """
    federation = _federation(directory)
    authority = _authority(directory, region)
    require_name("site", site)
    _require(1 <= clients <= MAX_CLIENTS, "clients", clients, f"must be from 1 to {MAX_CLIENTS:,}")
    home = directory / "kits" / "sites" / region / site
    names = [f"client-{n:02d}" for n in range(clients)]
    missing = [name for name in names if not (home / name).exists()]
    held = "exists already, with as many clients; sites need names of their own, or ask for more clients"
    _require(bool(missing) or exist_ok, "site", site, held)
    trust = _trust(directory, controller=True, regions=[region])
    addresses = _addresses(directory, region)
    for name in missing:
        identity = Identity(federation, RoleName.CLIENT, region=region, site=site, client=name)
        _write_kit(home / name, identity, authority, trust, addresses)
    return [home / name for name in names]


def add_operator(directory: Path, name: str, region: str = "", *, exist_ok: bool = False) -> Path:
    """Make the kit of an operator of the federation, or of ``region`` only, where one is named.

    Raises:
        ConfigError: A bad name, or there is one of that name and not ``exist_ok``.
        NotFound: No such federation or region.
    """
    federation = _federation(directory)
    authority = _authority(directory, region)
    require_name("operator", name)
    home = directory / "kits" / "regions" / region if region else directory / "kits"
    kit = home / "operators" / name
    if kit.exists():
        _require(exist_ok, "operator", name, "exists already; operators need names of their own")
        return kit
    role = RoleName.REGION_OPERATOR if region else RoleName.OPERATOR
    trust = _trust(directory, controller=not region, regions=[region] if region else [])
    identity = Identity(federation, role, region=region, operator=name)
    _write_kit(kit, identity, authority, trust, _addresses(directory, region))
    return kit


def set_addresses(kit: Path, addresses: Sequence[str]) -> None:
    """Change where the holder of a kit dials its server, ``host:port``; identity and keys stay.

    Raises:
        ConfigError: A bad address.
    """
    _require_addresses("addresses", addresses)
    identity = _entry(kit).identity
    about = _about(identity, addresses)
    if (kit / "kit.toml").read_bytes() != about:
        write_file(kit / "kit.toml", about)


def renew(directory: Path, region: str = "") -> list[Path]:
    """Issue every leaf here anew, or those of ``region`` only, for the same keys: only ``identity.pem`` changes.

    Returns:
        The certificates written, to be copied over those in the kits that were handed out.
    Raises:
        NotFound: No such federation or region.
    """
    if region:
        _authority(directory, region)  # says that it does not exist
    written = []
    for entry in listing(directory).kits:
        if region and entry.identity.region != region:
            continue
        file = entry.path / "identity.pem"
        key = _certificate(file).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey), "leaves are made with P-256 keys"
        leaf = issue_leaf(_authority(directory, entry.identity.region), entry.identity, key)
        write_file(file, certificate_pem(leaf))
        written.append(file)
    return written


def listing(directory: Path) -> Listing:
    """The federation's regions and kits, in order of their folders. ``NotFound`` where there is no federation."""
    found = [
        _entry(file.parent) for file in sorted((directory / "kits").rglob("kit.toml")) if _is_whole(file, directory)
    ]
    return Listing(federation=_federation(directory), regions=tuple(_regions(directory)), kits=tuple(found))


def _entry(kit: Path) -> KitEntry:
    certificate = _certificate(kit / "identity.pem")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    return KitEntry(identity=Identity.parse(uri), path=kit, expires=certificate.not_valid_after_utc)


def _is_whole(file: Path, directory: Path) -> bool:
    """Not in a folder that is still being written, or was left behind so."""
    return not any(part.startswith(".") for part in file.relative_to(directory).parts)


# --- what is there


def _controller_dir(directory: Path) -> Path:
    return directory / "pki" / "controller"


def _region_dir(directory: Path, region: str) -> Path:
    return directory / "pki" / "regions" / region


def _home(directory: Path, region: str) -> Path:
    """Folder of a CA: of ``region``, or of the controller where that is empty."""
    return _region_dir(directory, region) if region else _controller_dir(directory)


def _regions(directory: Path) -> list[str]:
    return sorted(home.name for home in (directory / "pki" / "regions").glob("[!.]*"))


def _federation(directory: Path) -> str:
    if not _controller_dir(directory).exists():
        raise NotFound("federation", str(directory), "`hierfl provision init NAME` makes one")
    return _settings(_controller_dir(directory)).federation


def _settings(home: Path) -> _Settings:
    reading = open_toml(home / "settings.toml")
    settings = build(_Settings, reading.table, reading)
    reading.finish()
    assert settings is not None, "a file that was not made has an error noted"
    return settings


def _addresses(directory: Path, region: str = "") -> tuple[str, ...]:
    return _settings(_home(directory, region)).addresses


def _authority(directory: Path, region: str = "") -> Authority:
    """The CA with its key; ``NotFound`` where there is no such region."""
    federation, home = _federation(directory), _home(directory, region)
    if not home.exists():
        names = _regions(directory)
        hint = f"there are {', '.join(names)}" if names else "`hierfl provision region NAME` makes one"
        raise NotFound("region", region, hint)
    key = serialization.load_pem_private_key((home / "ca.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey), "CAs are made with P-256 keys"
    return Authority(federation, region, _certificate(home / "ca.pem"), key)


def _certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _trust(directory: Path, *, controller: bool, regions: Sequence[str]) -> dict[str, bytes]:
    """The files of a kit's ``trust/``."""
    files = {
        f"trust/regions/{region}.pem": (_region_dir(directory, region) / "ca.pem").read_bytes() for region in regions
    }
    if controller:
        files["trust/controller.pem"] = (_controller_dir(directory) / "ca.pem").read_bytes()
    return files


def _require(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(key, value, rule)


def _require_addresses(key: str, addresses: Sequence[str]) -> None:
    for address in addresses:
        try:
            port = Address.parse(address).port
        except ValueError:
            port = 0
        _require(
            port > 0, key, address, "must be HOST:PORT with the port that is dialled, such as hub.example.org:4433"
        )


# --- what is written


def _ca_files(authority: Authority) -> dict[str, bytes]:
    return {"ca.pem": certificate_pem(authority.certificate), "ca.key": key_pem(authority.key)}


def _new_region(federation: str, region: str, addresses: Sequence[str]) -> dict[str, bytes]:
    authority = make_ca(federation, region)
    ledger = ed25519.Ed25519PrivateKey.generate()
    certificate = issue_ledger(authority, ledger.public_key())
    return {
        **_ca_files(authority),
        "ledger.pem": certificate_pem(certificate),
        "ledger.key": key_pem(ledger),
        "settings.toml": _toml(federation, addresses),
    }


def _toml(federation: str, addresses: Sequence[str], **more: str) -> bytes:
    """TOML of names and addresses. JSON's text is TOML's, for what the rules above let through."""
    values = {"federation": federation, **more, "addresses": list(addresses)}
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()).encode()


def _about(identity: Identity, addresses: Sequence[str]) -> bytes:
    """``kit.toml`` (``pki.KitFile``)."""
    return _toml(identity.federation, addresses, identity=identity.uri, role=str(identity.role))


def _write_kit(
    path: Path, identity: Identity, authority: Authority, files: Mapping[str, bytes], addresses: Sequence[str] = ()
) -> None:
    key = make_key()
    own = {
        "identity.pem": certificate_pem(issue_leaf(authority, identity, key.public_key())),
        "key.pem": key_pem(key),
        "kit.toml": _about(identity, addresses),
    }
    folders = ["trust/regions"] if identity.role is RoleName.CONTROLLER else []
    write_folder(path, {**own, **files}, folders)
