"""Certificates: a CA per region and one for the controller; leaves are believed only as their CA's own.

``verify_leaf`` takes a leaf alone, finds in its one SAN URI which CA may speak for it, and checks the
leaf's signature directly against that CA's pinned key. No chain is ever built: TLS libraries that trust
several roots accept a leaf for one region signed by an intermediate of another (DESIGN.md section 8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from hierfl.errors import CertificateExpired, CertificateUntrusted
from hierfl.identity import Identity, RoleName

__all__ = [
    "CA_LIFETIME",
    "LEAF_LIFETIME",
    "Authority",
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

CA_LIFETIME = timedelta(days=3652)
LEAF_LIFETIME = timedelta(days=30)
CLOCK_TOLERANCE = timedelta(hours=1)
"""A certificate is valid from so long before it was made: clocks of sites differ."""

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

_CLIENT_USE, _SERVER_USE = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
_USES: Mapping[RoleName, frozenset[ObjectIdentifier]] = {
    RoleName.CLIENT: frozenset({_CLIENT_USE}),
    RoleName.COMBINER: frozenset({_CLIENT_USE, _SERVER_USE}),
    RoleName.REGION_OPERATOR: frozenset({_CLIENT_USE}),
    RoleName.CONTROLLER: frozenset({_SERVER_USE}),
    RoleName.OPERATOR: frozenset({_CLIENT_USE}),
}
"""Which ends of a connection a role may be; a leaf says exactly this."""

_MALFORMED = (
    ValueError,
    TypeError,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
    x509.InvalidVersion,
)
"""What cryptography raises on bytes that a peer made up."""


@dataclass(frozen=True)
class Authority:
    """A CA that can issue: of ``region``, or of the controller where that is empty."""

    federation: str
    region: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)


@dataclass(frozen=True)
class TrustStore:
    """The pinned CAs: whom this process believes, and about what."""

    federation: str
    regions: Mapping[str, x509.Certificate]
    """CA of each region that is known here; it speaks for that region only."""
    controller: x509.Certificate | None = None
    """CA of the controller and of the federation's operators."""

    def authority(self, identity: Identity) -> x509.Certificate:
        """The one CA that may speak for ``identity``.

        Raises:
            CertificateUntrusted: Another federation, or a CA that is not pinned here.
        """
        if identity.federation != self.federation:
            raise CertificateUntrusted(f"{identity.uri} is of another federation than {self.federation}")
        found = self.regions.get(identity.region) if identity.region else self.controller
        if found is None:
            whose = f"region {identity.region}" if identity.region else "the controller"
            raise CertificateUntrusted(f"{identity} is not known here: the CA of {whose} is not in the trust folder")
        return found


# --- keys and PEM


def make_key() -> ec.EllipticCurvePrivateKey:
    """A new key for a CA or a leaf: ECDSA P-256, what gRPC's TLS takes on every platform."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    """PKCS #8, not encrypted: the file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


# --- issuing


def make_ca(federation: str, region: str = "", now: datetime | None = None) -> Authority:
    """A new CA for a region, or for the controller where ``region`` is empty. It signs leaves only."""
    key = make_key()
    name = _subject(federation, region, "certificate authority")
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(name, name, key.public_key(), now or datetime.now(UTC), CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(federation, region, certificate, key)


def issue_leaf(
    authority: Authority,
    identity: Identity,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime | None = None,
    lifetime: timedelta = LEAF_LIFETIME,
) -> x509.Certificate:
    """A certificate for ``identity``; its names are made from the identity, never taken from a request.

    Raises:
        ValueError: The authority is not the one that speaks for ``identity``.
    """
    if (authority.federation, authority.region) != (identity.federation, identity.region):
        raise ValueError(f"the CA of {authority.region or 'the controller'} cannot issue for {identity}")
    names = _subject(identity.federation, identity.region, identity.client or identity.operator or identity.role)
    uses = sorted(_USES[identity.role], key=lambda use: use.dotted_string)
    return _issue(authority, names, _alternative_names(identity), public_key, now, lifetime, uses)


def issue_ledger(
    authority: Authority, public_key: ed25519.Ed25519PublicKey, now: datetime | None = None
) -> x509.Certificate:
    """Certify a region's long-lived ledger key. It is no identity: it opens no connection."""
    names = _subject(authority.federation, authority.region, "border ledger")
    uri = x509.UniformResourceIdentifier(_ledger_uri(authority.federation, authority.region))
    return _issue(authority, names, [uri], public_key, now, CA_LIFETIME, [])


def _issue(
    authority: Authority,
    subject: x509.Name,
    names: list[x509.GeneralName],
    public_key: PublicKey,
    now: datetime | None,
    lifetime: timedelta,
    uses: list[ObjectIdentifier],
) -> x509.Certificate:
    now = now or datetime.now(UTC)
    lifetime = min(lifetime, authority.certificate.not_valid_after_utc - now)
    issuer = authority.key.public_key()
    builder = (
        _builder(subject, authority.certificate.subject, public_key, now, lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
    )
    if uses:
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    return builder.sign(authority.key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: PublicKey, now: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + lifetime)
    )


def _subject(federation: str, region: str, name: str) -> x509.Name:
    """For people only: nothing is decided by a subject. Differs between the CAs, as issuers have to."""
    parts = [(NameOID.ORGANIZATION_NAME, federation), (NameOID.ORGANIZATIONAL_UNIT_NAME, region)]
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in [*parts, (NameOID.COMMON_NAME, name)] if text])


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(identity: Identity) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    return [*names, x509.DNSName(identity.dns_name)] if identity.dns_name else names


def _ledger_uri(federation: str, region: str) -> str:
    return f"spiffe://{federation}/region/{region}/ledger"


# --- verifying


def verify_leaf(leaf_der: bytes, trust: TrustStore, now: datetime) -> Identity:
    """Who holds this leaf: a name that the one CA which may give it has signed.

    Args:
        leaf_der: The leaf as the peer sent it; certificates sent with it are not looked at.
        trust: The pinned CAs.
        now: Aware wall time to check validity at: of a connection the present, of a signed document
            the time that it was signed.
    Raises:
        CertificateUntrusted: It is malformed, names no identity, or is not signed by that identity's CA.
        CertificateExpired: All of that is right, but ``now`` is outside its validity.
    """
    try:
        leaf = x509.load_der_x509_certificate(leaf_der)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        if len(uris) != 1:
            raise CertificateUntrusted(f"the certificate has {len(uris)} SAN URIs; an identity has exactly one")
        identity = Identity.parse(uris[0])
        authority = trust.authority(identity)
        _check_signature(leaf, authority, str(identity))
        if list(names) != _alternative_names(identity):
            raise CertificateUntrusted(f"the certificate of {identity} carries other names than its own")
        _check_purpose(leaf, _USES[identity.role], str(identity))
        if not _is_p256(leaf.public_key()):
            raise CertificateUntrusted(f"the certificate of {identity} holds no P-256 key")
    except (*_MALFORMED, UnsupportedAlgorithm) as error:
        raise CertificateUntrusted(f"the certificate is malformed: {type(error).__name__}") from None
    _check_validity(leaf, now, str(identity))
    _check_validity(authority, now, f"the CA that signed for {identity}")
    return identity


def verify_ledger(ledger_der: bytes, trust: TrustStore, region: str, now: datetime) -> ed25519.Ed25519PublicKey:
    """The ledger key of ``region``, if that region's CA certifies it. Raises as ``verify_leaf`` does."""
    what = f"the ledger key of {region}"
    authority = trust.regions.get(region)
    if authority is None:
        raise CertificateUntrusted(f"{what} cannot be checked: the CA of region {region} is not in the trust folder")
    try:
        certificate = x509.load_der_x509_certificate(ledger_der)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        _check_signature(certificate, authority, what)
        if list(names) != [x509.UniformResourceIdentifier(_ledger_uri(trust.federation, region))]:
            raise CertificateUntrusted(f"the certificate shown is not that of {what}")
        _check_purpose(certificate, frozenset(), what)
        key = certificate.public_key()
    except (*_MALFORMED, UnsupportedAlgorithm) as error:
        raise CertificateUntrusted(f"the certificate of {what} is malformed: {type(error).__name__}") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise CertificateUntrusted(f"{what} is no Ed25519 key")
    _check_validity(certificate, now, what)
    return key


def _check_signature(leaf: x509.Certificate, authority: x509.Certificate, who: str) -> None:
    try:
        leaf.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise CertificateUntrusted(f"the certificate that names {who} is not signed by the CA pinned for it") from None


def _check_purpose(leaf: x509.Certificate, uses: frozenset[ObjectIdentifier], who: str) -> None:
    constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    extended = [e.value for e in leaf.extensions if isinstance(e.value, x509.ExtendedKeyUsage)]
    found = frozenset(use for extension in extended for use in extension)
    if constraints.ca or usage.key_cert_sign or not usage.digital_signature or found != uses:
        raise CertificateUntrusted(f"the certificate of {who} was made for another use")


def _check_validity(certificate: x509.Certificate, now: datetime, who: str) -> None:
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= now <= last:
        life = (
            f"was valid until {last:%Y-%m-%d %H:%M} UTC" if now > last else f"is valid from {first:%Y-%m-%d %H:%M} UTC"
        )
        raise CertificateExpired(f"the certificate of {who} {life}; the clock here says {now:%Y-%m-%d %H:%M} UTC")


def _is_p256(key: object) -> bool:
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


# --- signed documents


def sign(key: PrivateKey, message: bytes, context: bytes) -> bytes:
    """Sign ``message`` as a document of the kind that ``context`` names (``b"hierfl.plan/1"``).

    The context is part of what is signed, so that a signature under one kind is never one under another.
    """
    payload = _payload(message, context)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(payload)
    return key.sign(payload, ec.ECDSA(hashes.SHA256()))


def verify(signer: x509.Certificate | PublicKey, signature: bytes, message: bytes, context: bytes) -> None:
    """Check a signature of ``sign``. Whose certificate ``signer`` is, ``verify_leaf`` says, not this.

    Raises:
        CertificateUntrusted: The signature is not that key's, or not over this message and context.
    """
    key = signer.public_key() if isinstance(signer, x509.Certificate) else signer
    payload = _payload(message, context)
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, payload)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, payload, ec.ECDSA(hashes.SHA256()))
        else:
            raise CertificateUntrusted("documents are signed with P-256 or Ed25519 keys only")
    except InvalidSignature:
        raise CertificateUntrusted(f"the signature does not fit this {context.decode()} document") from None


def _payload(message: bytes, context: bytes) -> bytes:
    """The signed bytes: ``hierfl-signature``, 0, the context, 0, the message."""
    if b"\0" in context or not context:
        raise ValueError("a context is a non-empty name without zero bytes")
    return b"hierfl-signature\0" + context + b"\0" + message
