"""A region's endpoint list: where its intakes are, signed by its combiner. Pure.

A client believes the signature, not whoever passed the list on, and never takes up an older one: lists of one
region are ordered by (``region_epoch``, ``version``).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from hierfl import documents
from hierfl.errors import CertificateUntrusted, PolicyRefused, StaleEpoch, WireError
from hierfl.identity import Identity, RoleName
from hierfl.pki import Kit, TrustStore, verify, verify_leaf

__all__ = ["ENDPOINTS_CONTEXT", "Endpoint", "EndpointList", "Signed", "accept_endpoints", "sign_endpoints"]

ENDPOINTS_CONTEXT = b"hierfl.endpoints/1"
MAX_ENDPOINTS = 1024
MAX_TEXT = 255
"""Characters of a name, or of an address."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One intake: its name, which clients choose by, and ``host:port`` as they reach it."""

    name: str
    address: str


@dataclass(frozen=True, kw_only=True)
class EndpointList:
    """The document. Intakes whose address for clients is not known are left out."""

    federation: str
    region: str
    region_epoch: int
    """Raised by every start of the Region."""
    version: int
    """Counts from 1 within the epoch."""
    endpoints: tuple[Endpoint, ...]

    @property
    def age(self) -> tuple[int, int]:
        """What orders lists: the greater, the newer."""
        return self.region_epoch, self.version


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A list as it travels: exact bytes, signature, and the leaf (DER) that signed."""

    document: bytes
    signature: bytes
    certificate: bytes


def sign_endpoints(kit: Kit, listed: EndpointList) -> Signed:
    """Sign with the combiner's leaf key."""
    document = documents.encode(listed)
    return Signed(document=document, signature=kit.sign(document, ENDPOINTS_CONTEXT), certificate=kit.certificate_der)


def accept_endpoints(
    signed: Signed, own: Identity, trust: TrustStore, known: tuple[int, int], now: datetime
) -> EndpointList:
    """The list, if this client believes it.

    Args:
        own: The client.
        known: ``age`` of the newest list that it has seen.
        now: Wall time, for the validity of the combiner's certificate.
    Raises:
        CertificateUntrusted, CertificateExpired: Not signed by the combiner of this region.
        WireError: It is no list.
        PolicyRefused: Of another region or federation.
        StaleEpoch: Older than ``known``.
    """
    signer = verify_leaf(signed.certificate, trust, now)
    if (signer.role, signer.region) != (RoleName.COMBINER, own.region):
        raise CertificateUntrusted(f"the endpoint list is signed by {signer}, not by the combiner of {own.region}")
    leaf = x509.load_der_x509_certificate(signed.certificate)
    verify(leaf, signed.signature, signed.document, ENDPOINTS_CONTEXT)
    listed = documents.decode(signed.document, EndpointList, "endpoint list")
    if (listed.federation, listed.region) != (own.federation, own.region):
        raise PolicyRefused(f"the endpoint list is of {listed.region} of {listed.federation}, this is {own}")
    _check_entries(listed)
    if listed.age < known:
        raise StaleEpoch(f"the endpoint list is version {listed.age}, the newest seen is {known}")
    return listed


def _check_entries(listed: EndpointList) -> None:
    names = {endpoint.name for endpoint in listed.endpoints}
    if len(names) != len(listed.endpoints) or len(names) > MAX_ENDPOINTS:
        raise WireError(f"the endpoint list names an intake twice, or more than {MAX_ENDPOINTS}")
    for endpoint in listed.endpoints:
        host, _, port = endpoint.address.rpartition(":")
        is_right = host and port.isdecimal() and 0 < int(port) < 2**16
        if not is_right or not endpoint.name or max(len(endpoint.name), len(endpoint.address)) > MAX_TEXT:
            raise WireError(f"the endpoint list has an entry without name or address: {str(endpoint)[:MAX_TEXT]}")
