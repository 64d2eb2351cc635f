"""Connections: mutual TLS on every hop, and who is at the other end. No plaintext way exists here.

On each hop exactly one CA vouches for the server, the one pinned for its identity, and the caller asks for
the server's name whatever its address. gRPC's own check of a caller is only the first: ``peer_identity``
checks the leaf against its region's CA key, and that TLS 1.3 was spoken (grpcio has no least version).
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TypeAlias

import grpc
from cryptography import x509

from hierfl.config import Address
from hierfl.errors import CertificateUntrusted, ConfigError, PortInUse
from hierfl.pki import Identity, Kit, RoleName, TrustStore, certificate_pem, key_pem, verify_leaf

__all__ = [
    "PeerVerifier",
    "bind",
    "channel_credentials",
    "channel_options",
    "open_channel",
    "peer_identity",
    "probe",
    "server_credentials",
    "server_options",
]

Options: TypeAlias = list[tuple[str, int | str]]

TLS_VERSION = "TLSv1.3"
MAX_MESSAGE_BYTES = 4 * 2**20
"""Of one gRPC message, both ways. Frames are about 1 MiB: no model is limited by it."""
MAX_METADATA_BYTES = 16 * 2**10

PING_EVERY_MS = 20_000
"""A caller asks so often whether its connection lives: less than what routers keep an idle one."""
PING_TIMEOUT_MS = 10_000
PING_LEAST_MS = 10_000
"""What a server takes without ``too_many_pings``: less than ``PING_EVERY_MS``, so both ends stand here."""
RECONNECT_FIRST_MS, RECONNECT_MOST_MS = 200, 5_000
"""Pauses between tries to connect; gRPC's own two minutes would keep a restarted region waiting."""

MAX_REMEMBERED = 16_384
"""Leaves that a server remembers to have verified."""

_COMMON: Options = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.keepalive_time_ms", PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


# --- callers


def channel_options(server: Identity) -> Options:
    """Options of a channel to ``server``: its name is what the certificate has to say, whatever its address.

    A channel shares its connection with no other: several identities may live in one process.
    """
    return [
        *_COMMON,
        ("grpc.ssl_target_name_override", _require_server(server).dns_name),
        ("grpc.enable_http_proxy", 0),  # https_proxy in the environment catches loopback too
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_FIRST_MS),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MOST_MS),
    ]


def channel_credentials(kit: Kit, server: Identity) -> grpc.ChannelCredentials:
    """The kit's identity, and as only root the CA that may speak for ``server``.

    Raises:
        CertificateUntrusted: The kit does not know that CA.
    """
    return grpc.ssl_channel_credentials(
        root_certificates=certificate_pem(kit.trust.authority(server)),
        private_key=key_pem(kit.key),
        certificate_chain=certificate_pem(kit.certificate),
    )


def open_channel(kit: Kit, address: str, server: Identity) -> grpc.aio.Channel:
    """A channel to ``server`` at ``address`` (``host:port``). It connects with the first call, and again by itself."""
    return grpc.aio.secure_channel(address, channel_credentials(kit, server), options=channel_options(server))


def _require_server(identity: Identity) -> Identity:
    if not identity.dns_name:
        raise ValueError(f"{identity} is no server")
    return identity


# --- servers


def server_options() -> Options:
    """Options of every server; a port is its own, where gRPC by default would share it with another process."""
    return [*_COMMON, ("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", PING_LEAST_MS)]


def server_credentials(kit: Kit) -> grpc.ServerCredentials:
    """The kit's identity; a caller must show a certificate of a CA that this server serves.

    A combiner serves its own region's CA. The controller serves every region's, for their combiners, and its
    own, for operators: with several roots gRPC alone cannot tell who may name whom (``peer_identity`` does).
    """
    _require_server(kit.identity)
    roots = [*kit.trust.regions.values()]
    if kit.identity.role is RoleName.CONTROLLER and kit.trust.controller:
        roots.append(kit.trust.controller)
    return grpc.ssl_server_credentials(
        [(key_pem(kit.key), certificate_pem(kit.certificate))],
        root_certificates=b"".join(map(certificate_pem, roots)),
        require_client_auth=True,
    )


def bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials) -> int:
    """Listen on ``address`` (``host:port``, port 0 for any free one); returns the port.

    Raises:
        PortInUse: Another program listens there.
        ConfigError: The address is none, or none of this machine, or not this user's to listen on.
    """
    probe(address)
    try:
        return int(server.add_secure_port(address, credentials))
    except RuntimeError:
        probe(address)
        raise PortInUse(f"cannot listen on {address}: another program took it just now; choose another port") from None


def probe(address: str) -> None:
    """Say why nobody can listen on ``address``, if so: gRPC only says that it could not.

    Raises:
        PortInUse, ConfigError: As ``bind``.
    """
    try:
        host, port = Address.parse(address)
    except ValueError as error:
        raise ConfigError("listen", address, str(error)) from None
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: closed connections may linger
            trial.bind(where)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"cannot listen on {address}: another program does already; stop it, or choose another port (0: any)"
            ) from None
        raise ConfigError("listen", address, f"cannot be listened on: {error.strerror}") from None


# --- who is at the other end


def peer_identity(context: grpc.aio.ServicerContext, trust: TrustStore, now: datetime) -> Identity:
    """Who calls: the identity of the leaf that this connection was made with.

    Raises:
        CertificateUntrusted: No certificate, not TLS 1.3, or ``verify_leaf`` does not believe it.
        CertificateExpired: It was valid when the connection was made, and is no more.
    """
    return verify_leaf(_der(_leaf_pem(context)), trust, now)


class PeerVerifier:
    """``peer_identity`` for a server: a leaf's signature is checked once, its validity at every call."""

    def __init__(self, trust: TrustStore, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._trust, self._clock = trust, clock
        self._seen: dict[bytes, tuple[Identity, datetime]] = {}

    def __call__(self, context: grpc.aio.ServicerContext) -> Identity:
        """Who calls. Raises as ``peer_identity`` does."""
        pem, now = _leaf_pem(context), self._clock()
        known = self._seen.get(pem)
        if known is not None and now <= known[1]:
            return known[0]
        der = _der(pem)
        identity = verify_leaf(der, self._trust, now)
        if len(self._seen) >= MAX_REMEMBERED:
            self._seen.clear()
        self._seen[pem] = (identity, _last_moment(der, self._trust, identity))
        return identity


def _last_moment(der: bytes, trust: TrustStore, identity: Identity) -> datetime:
    """When ``verify_leaf`` will first say otherwise."""
    leaf = x509.load_der_x509_certificate(der)
    return min(leaf.not_valid_after_utc, trust.authority(identity).not_valid_after_utc)


def _leaf_pem(context: grpc.aio.ServicerContext) -> bytes:
    found = context.auth_context()
    version = _first(found.get("ssl_tls_version"))
    if version != TLS_VERSION.encode():
        raise CertificateUntrusted(
            f"the connection speaks {version.decode() or 'no TLS'}; this server takes {TLS_VERSION} only"
        )
    pem = _first(found.get("x509_pem_cert"))
    if not pem:
        raise CertificateUntrusted("the connection shows no certificate")
    return pem


def _first(values: Sequence[bytes] | None) -> bytes:
    return values[0] if values else b""


def _der(pem: bytes) -> bytes:
    try:
        return ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))
    except ValueError:
        raise CertificateUntrusted("the connection shows no readable certificate") from None
