"""Connections over loopback: who gets through, who does not, and in which words."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from hierfl import pki, provision
from hierfl.errors import (
    CertificateExpired,
    CertificateUntrusted,
    ConfigError,
    HierFLError,
    PortInUse,
    Unreachable,
)
from hierfl.pki import Authority, Identity, Kit, RoleName
from hierfl.wire import tls
from hierfl.wire.access import AccessInterceptor, current_identity
from hierfl.wire.status import from_rpc_error

CHECK = "/grpc.health.v1.Health/Check"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls") / "acme"
    provision.init(folder, "acme")
    for region in ("eu", "us"):
        provision.add_region(folder, region)
        provision.add_site(folder, region, "site")
    return folder


@pytest.fixture(scope="module")
def kits(folder: Path) -> dict[str, Kit]:
    """By short name: ``controller``, ``eu`` and ``us`` (combiners), ``eu client``, ``us client``."""
    found = [Kit.load(entry.path) for entry in provision.listing(folder).kits]
    return {_short(kit.identity): kit for kit in found}


def _short(identity: Identity) -> str:
    return {RoleName.CLIENT: f"{identity.region} client", RoleName.COMBINER: identity.region}.get(
        identity.role, str(identity.role)
    )


def authority_of(folder: Path, region: str) -> Authority:
    return provision._authority(folder, region)


class WhoAmI(grpc.GenericRpcHandler):
    """Answers every call with the caller's URI."""

    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def answer(_: bytes, __: grpc.aio.ServicerContext) -> bytes:
            return current_identity().uri.encode()

        return grpc.unary_unary_rpc_method_handler(answer)


@asynccontextmanager
async def serving(
    kit: Kit,
    credentials: grpc.ServerCredentials | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> AsyncIterator[str]:
    """The kit's server on loopback; its address."""
    gate = AccessInterceptor(kit.trust, kit.identity, clock=clock)
    server = grpc.aio.server(interceptors=[gate], options=tls.server_options())
    server.add_generic_rpc_handlers((WhoAmI(),))
    port = tls.bind(server, "127.0.0.1:0", credentials or tls.server_credentials(kit))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def call(channel: grpc.aio.Channel, address: str = "there", who: str = "the server") -> str:
    """One call; the caller as the server saw it, or the error as a caller of ours sees it."""
    async with channel:
        try:
            return bytes(await channel.unary_unary(CHECK)(b"", timeout=10)).decode()
        except grpc.RpcError as error:
            raise from_rpc_error(error, who, address) from None


def raw_channel(address: str, roots: Kit, key: bytes, chain: bytes, server: Identity) -> grpc.aio.Channel:
    """As ``open_channel``, for certificates that no kit would hold."""
    root = pki.certificate_pem(roots.trust.authority(server))
    credentials = grpc.ssl_channel_credentials(root, key, chain)
    return grpc.aio.secure_channel(address, credentials, options=tls.channel_options(server))


@pytest.mark.parametrize(("caller", "callee"), [("eu client", "eu"), ("us client", "us"), ("eu", "controller")])
async def test_a_kit_reaches_its_server_under_its_own_name(kits: dict[str, Kit], caller: str, callee: str) -> None:
    kit, server = kits[caller], kits[callee]
    assert kit.identity.dials == server.identity
    async with serving(server) as address:
        assert await call(tls.open_channel(kit, address, server.identity)) == kit.identity.uri


async def test_a_proxy_in_the_environment_is_not_used(kits: dict[str, Kit], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    kit, server = kits["eu client"], kits["eu"]
    async with serving(server) as address:
        assert await call(tls.open_channel(kit, address, server.identity)) == kit.identity.uri


async def test_the_wrong_server_is_recognised_by_its_certificate(kits: dict[str, Kit], folder: Path) -> None:
    async with serving(kits["us"]) as address:
        with pytest.raises(CertificateUntrusted, match=r"the combiner of eu at 127.*did not sign"):
            await call(tls.open_channel(kits["eu client"], address, kits["eu"].identity), address, "the combiner of eu")


async def test_a_client_cannot_stand_in_for_its_combiner(kits: dict[str, Kit]) -> None:
    """The same CA signed both; only one of them says that it is the server."""
    client, server = kits["eu client"], kits["eu"]
    pair = (pki.key_pem(client.key), pki.certificate_pem(client.certificate))
    credentials = grpc.ssl_server_credentials(
        [pair], b"".join(map(pki.certificate_pem, client.trust.regions.values())), True
    )
    async with serving(server, credentials) as address:
        with pytest.raises(HierFLError) as caught:
            await call(tls.open_channel(client, address, server.identity))
    assert isinstance(caught.value, CertificateUntrusted | Unreachable)


async def test_an_expired_server_is_called_so(kits: dict[str, Kit], folder: Path) -> None:
    server = kits["eu"]
    past = datetime.now(UTC) - timedelta(days=40)
    leaf = pki.issue_leaf(authority_of(folder, "eu"), server.identity, server.key.public_key(), now=past)
    async with serving(replace(server, certificate=leaf)) as address:
        with pytest.raises(CertificateExpired, match="expired certificate, or the clock here is wrong"):
            await call(tls.open_channel(kits["eu client"], address, server.identity))


async def test_an_expired_client_does_not_get_through_the_handshake(kits: dict[str, Kit], folder: Path) -> None:
    client = kits["eu client"]
    past = datetime.now(UTC) - timedelta(days=40)
    leaf = pki.issue_leaf(authority_of(folder, "eu"), client.identity, client.key.public_key(), now=past)
    async with serving(kits["eu"]) as address:
        with pytest.raises(Unreachable, match="takes this kit's certificate"):
            await call(tls.open_channel(replace(client, certificate=leaf), address, kits["eu"].identity))


async def test_a_certificate_that_expires_on_an_open_connection_is_refused_in_clear_words(kits: dict[str, Kit]) -> None:
    now = datetime.now(UTC)
    kit, server = kits["eu client"], kits["eu"]
    async with (
        serving(server, clock=lambda: now) as address,
        tls.open_channel(kit, address, server.identity) as channel,
    ):
        assert await channel.unary_unary(CHECK)(b"") == kit.identity.uri.encode()
        now += timedelta(days=31)
        with pytest.raises(CertificateExpired, match=r"client eu/site/client-00 was valid until .* clock here says"):
            await call(channel)


@pytest.mark.parametrize("named", ["us", "eu"])
async def test_a_self_signed_certificate_is_refused(kits: dict[str, Kit], named: str) -> None:
    own = pki.make_ca("acme", named)
    identity = Identity("acme", RoleName.COMBINER, region=named)
    key = pki.make_key()
    chain = pki.certificate_pem(pki.issue_leaf(own, identity, key.public_key())) + pki.certificate_pem(own.certificate)
    controller = kits["controller"]
    async with serving(controller) as address:
        with pytest.raises(Unreachable):
            await call(raw_channel(address, kits["eu"], pki.key_pem(key), chain, controller.identity))


async def test_a_leaf_for_us_signed_by_eu_is_refused(kits: dict[str, Kit], folder: Path) -> None:
    """The controller trusts both CAs, so that TLS lets it through; the pinned key does not."""
    eu = authority_of(folder, "eu")
    identity = Identity("acme", RoleName.COMBINER, region="us")
    key = pki.make_key()
    leaf = pki.issue_leaf(replace(eu, region="us"), identity, key.public_key())
    controller = kits["controller"]
    async with serving(controller) as address:
        with pytest.raises(CertificateUntrusted, match="combiner of us is not signed by the CA pinned for it"):
            await call(
                raw_channel(address, kits["eu"], pki.key_pem(key), pki.certificate_pem(leaf), controller.identity)
            )


def _intermediate(parent: Authority, region: str) -> Authority:
    """A CA under ``parent`` that calls itself the CA of ``region``."""
    key = pki.make_key()
    name = pki.make_ca("acme", region).certificate.subject
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(parent.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(parent.key, hashes.SHA256())
    )
    return Authority("acme", region, certificate, key)


async def test_a_leaf_for_us_under_an_intermediate_of_eu_is_refused(kits: dict[str, Kit], folder: Path) -> None:
    """gRPC accepts this chain, ``pathlen:0`` of eu's CA notwithstanding: the leaf's own signature decides."""
    middle = _intermediate(authority_of(folder, "eu"), "us")
    identity = Identity("acme", RoleName.COMBINER, region="us")
    key = pki.make_key()
    leaf = pki.issue_leaf(middle, identity, key.public_key())
    chain = pki.certificate_pem(leaf) + pki.certificate_pem(middle.certificate)
    controller = kits["controller"]
    async with serving(controller) as address:
        with pytest.raises(CertificateUntrusted, match="combiner of us is not signed by the CA pinned for it"):
            await call(raw_channel(address, kits["eu"], pki.key_pem(key), chain, controller.identity))


async def test_no_certificate_and_no_tls_are_refused(kits: dict[str, Kit]) -> None:
    server = kits["eu"]
    options = tls.channel_options(server.identity)
    root = pki.certificate_pem(server.trust.regions["eu"])
    async with serving(server) as address:
        bare = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(root), options=options)
        plain = grpc.aio.insecure_channel(address, options=options)
        for channel in (bare, plain):
            with pytest.raises(Unreachable):
                await call(channel)


async def test_a_server_that_speaks_no_tls_is_called_so(kits: dict[str, Kit]) -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with pytest.raises(CertificateUntrusted, match="speaks no TLS"):
        await call(tls.open_channel(kits["eu client"], f"127.0.0.1:{port}", kits["eu"].identity))
    await server.stop(None)


@asynccontextmanager
async def tunnel(address: str, context: ssl.SSLContext, name: str) -> AsyncIterator[tuple[str, list[str]]]:
    """A port that takes plain bytes and speaks TLS to ``address``; and the versions that were agreed on."""
    versions: list[str] = []
    tasks: list[asyncio.Task[None]] = []
    host, port = address.split(":")

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=name)
        versions.append(far_writer.get_extra_info("ssl_object").version())
        try:
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
        finally:
            for end in (writer, far_writer):
                end.transport.abort()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.ensure_future(carry(reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", versions
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_call_over_tls_1_2_is_refused(kits: dict[str, Kit], folder: Path, version: ssl.TLSVersion) -> None:
    kit, server = kits["eu client"], kits["eu"]
    context = ssl.create_default_context(cadata=pki.certificate_pem(kit.trust.regions["eu"]).decode())
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(kit.path / "identity.pem", kit.path / "key.pem")
    context.set_alpn_protocols(["h2"])
    name = server.identity.dns_name
    options = [("grpc.default_authority", name), ("grpc.enable_http_proxy", 0)]
    async with serving(server) as address, tunnel(address, context, name) as (near, versions):
        channel = grpc.aio.insecure_channel(near, options=options)
        if version is ssl.TLSVersion.TLSv1_3:
            assert await call(channel) == kit.identity.uri
        else:
            with pytest.raises(CertificateUntrusted, match=r"speaks TLSv1\.2; this server takes TLSv1\.3 only"):
                await call(channel)
            assert versions == ["TLSv1.2"]


async def test_nobody_there_names_the_address_and_what_to_check(kits: dict[str, Kit], unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    with pytest.raises(Unreachable, match=f"the combiner of eu at {address} refuses the connection: check the address"):
        await call(tls.open_channel(kits["eu client"], address, kits["eu"].identity), address, "the combiner of eu")


async def test_two_servers_never_share_a_port(kits: dict[str, Kit]) -> None:
    async with serving(kits["eu"]) as address:
        other = grpc.aio.server(options=tls.server_options())
        with pytest.raises(PortInUse, match=f"cannot listen on {address}: another program does already"):
            tls.bind(other, address, tls.server_credentials(kits["us"]))


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", "203.0.113.7:4433", "no-such-host.invalid:4433"])
async def test_an_address_that_is_not_this_machines_is_a_configuration_error(
    kits: dict[str, Kit], address: str
) -> None:
    server = grpc.aio.server(options=tls.server_options())
    with pytest.raises(ConfigError) as caught:
        tls.bind(server, address, tls.server_credentials(kits["eu"]))
    assert caught.value.key == "listen"
    assert caught.value.value == address


def test_keep_alive_is_set_at_both_ends_together(kits: dict[str, Kit]) -> None:
    caller, callee = dict(tls.channel_options(kits["eu"].identity)), dict(tls.server_options())
    assert int(callee["grpc.http2.min_ping_interval_without_data_ms"]) < int(caller["grpc.keepalive_time_ms"])
    assert caller["grpc.keepalive_permit_without_calls"] == callee["grpc.keepalive_permit_without_calls"] == 1
    assert callee["grpc.so_reuseport"] == 0


def test_only_servers_can_be_dialled_and_serve(kits: dict[str, Kit]) -> None:
    for refuse in (
        lambda: tls.channel_options(kits["eu client"].identity),
        lambda: tls.server_credentials(kits["eu client"]),
    ):
        with pytest.raises(ValueError, match="is no server"):
            refuse()


def test_a_kit_cannot_dial_whom_it_has_no_authority_for(kits: dict[str, Kit]) -> None:
    with pytest.raises(CertificateUntrusted, match="CA of region us is not in the trust folder"):
        tls.channel_credentials(kits["eu client"], kits["us"].identity)


def test_a_kit_still_loads_after_being_moved(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder / "kits" / "sites" / "eu" / "site" / "client-00", tmp_path / "handed-out")
    assert Kit.load(moved).identity.client_ref.site == "site"
