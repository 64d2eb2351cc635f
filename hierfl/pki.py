"""Identities, certificates and kits, under one name.

A kit is all that a process needs to say who it is and to know whom to believe: one folder, made by
``hierfl provision`` (``hierfl/provision.py``) and handed out whole.

    identity.pem            its certificate
    key.pem                 its private key, mode 0600
    trust/controller.pem    CA of the controller and the federation's operators, where it needs it
    trust/regions/R.pem     CA of region R, for each region that it needs
    kit.toml                federation, identity, role, and the addresses of the server that it dials
    ledger.pem, ledger.key  the region's ledger key: in a combiner's kit only
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from hierfl.certificates import (
    CA_LIFETIME,
    LEAF_LIFETIME,
    Authority,
    TrustStore,
    certificate_pem,
    issue_leaf,
    issue_ledger,
    key_pem,
    make_ca,
    make_key,
    sign,
    verify,
    verify_leaf,
    verify_ledger,
)
from hierfl.errors import CertificateExpired, CertificateMissing, CertificateUntrusted, NotFound
from hierfl.identity import Identity, RoleName
from hierfl.toml import build, open_toml

__all__ = [
    "CA_LIFETIME",
    "LEAF_LIFETIME",
    "Authority",
    "Identity",
    "Kit",
    "KitFile",
    "LedgerKey",
    "RoleName",
    "TrustStore",
    "certificate_pem",
    "issue_leaf",
    "issue_ledger",
    "key_pem",
    "make_ca",
    "make_key",
    "sign",
    "verify",
    "verify_leaf",
    "verify_ledger",
]

T = TypeVar("T")

_ORIGIN = "kits are made with `hierfl provision` and handed out as whole folders"


@dataclass(frozen=True, kw_only=True)
class KitFile:
    """``kit.toml``: what the kit says of itself, for people and for a first check."""

    federation: str
    identity: str
    """The SAN URI of ``identity.pem``."""
    role: str
    addresses: tuple[str, ...] = ()
    """``host:port`` of the server that the holder dials, in order of preference."""


@dataclass(frozen=True)
class LedgerKey:
    """A region's border-ledger key and the certificate that its CA gave it."""

    certificate: x509.Certificate
    key: ed25519.Ed25519PrivateKey = field(repr=False)


@dataclass(frozen=True)
class Kit:
    """One identity with its key, and whom it believes. Read once, at the edge of a process."""

    path: Path
    identity: Identity
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    trust: TrustStore
    addresses: tuple[str, ...] = ()
    ledger: LedgerKey | None = None

    @classmethod
    def load(cls, path: Path | str, now: datetime | None = None) -> Kit:
        """Read a kit and check that it will work: whole, matching, signed by its own CA, in its validity.

        Raises:
            CertificateMissing: A file is not there or cannot be read.
            CertificateExpired: The certificate is past its life, or this clock is wrong.
            CertificateUntrusted: A file is damaged, or the files do not belong together.
            ConfigError: ``kit.toml`` is not what it must be.
        """
        path = Path(path)
        about = _read_about(path)
        certificate = _read(path / "identity.pem", x509.load_pem_x509_certificate)
        trust = _read_trust(path / "trust", about.federation)
        identity = _verify_own(path, certificate, trust, now or datetime.now(UTC))
        if about.identity != identity.uri or about.role != identity.role:
            raise CertificateUntrusted(f"{path / 'kit.toml'} says {about.identity}, but identity.pem is {identity.uri}")
        key = _read(path / "key.pem", _load_key)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise CertificateUntrusted(f"{path / 'key.pem'} does not belong to identity.pem; {_ORIGIN}")
        ledger = _read_ledger(path) if identity.role is RoleName.COMBINER else None
        return cls(path, identity, certificate, key, trust, about.addresses, ledger)

    @property
    def certificate_der(self) -> bytes:
        """The leaf as signed documents carry it."""
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def expires(self) -> datetime:
        return self.certificate.not_valid_after_utc

    def sign(self, message: bytes, context: bytes) -> bytes:
        """``certificates.sign`` with this identity's key."""
        return sign(self.key, message, context)


def _read_about(path: Path) -> KitFile:
    try:
        reading = open_toml(path / "kit.toml")
    except NotFound:
        raise CertificateMissing(f"{path} is no kit, it has no kit.toml; {_ORIGIN}") from None
    about = build(KitFile, reading.table, reading)
    reading.finish()
    assert about is not None, "a file that was not made has an error noted"
    return about


def _read(path: Path, load: Callable[[bytes], T]) -> T:
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        raise CertificateMissing(f"{path} is not there; {_ORIGIN}") from None
    except OSError as error:
        raise CertificateMissing(f"{path} cannot be read: {error.strerror}; {_ORIGIN}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise CertificateUntrusted(f"{path} is damaged: no PEM of the right kind; {_ORIGIN}") from None


def _load_key(pem: bytes) -> object:
    return serialization.load_pem_private_key(pem, password=None)


def _read_trust(path: Path, federation: str) -> TrustStore:
    files = sorted((path / "regions").glob("*.pem"))
    regions = {file.stem: _read(file, x509.load_pem_x509_certificate) for file in files}
    controller = path / "controller.pem"
    found = _read(controller, x509.load_pem_x509_certificate) if controller.exists() else None
    if found is None and not regions:
        raise CertificateMissing(f"{path} holds no CA to trust; {_ORIGIN}")
    return TrustStore(federation, regions, found)


def _verify_own(path: Path, certificate: x509.Certificate, trust: TrustStore, now: datetime) -> Identity:
    """A kit that its own CA does not vouch for would be refused everywhere, with fewer words."""
    file = path / "identity.pem"
    try:
        return verify_leaf(certificate.public_bytes(serialization.Encoding.DER), trust, now)
    except CertificateExpired as error:
        raise CertificateExpired(
            f"{file}: {error}; if that clock is right, whoever made the kit runs `hierfl provision renew` "
            "and hands out the new identity.pem"
        ) from None
    except CertificateUntrusted as error:
        raise CertificateUntrusted(f"{file}: {error}; {_ORIGIN}") from None


def _read_ledger(path: Path) -> LedgerKey:
    certificate = _read(path / "ledger.pem", x509.load_pem_x509_certificate)
    key = _read(path / "ledger.key", _load_key)
    if not isinstance(key, ed25519.Ed25519PrivateKey) or key.public_key() != certificate.public_key():
        raise CertificateUntrusted(f"{path / 'ledger.key'} does not belong to ledger.pem; {_ORIGIN}")
    return LedgerKey(certificate, key)
