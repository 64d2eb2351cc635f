"""The product's own code on the simulation's clock, network, disks and dice: what is put in place of what.

Only the edges of a process are replaced: gRPC's channels and servers, the wall clock, random numbers, threads, files'
durability, kernels' compilation, and the reading of certificates from disk. Everything that decides runs as it is.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import random
import secrets
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any
from unittest import mock

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import hierfl.client.work
from hierfl import kernels, kernels_encodings
from hierfl.errors import CertificateUntrusted
from hierfl.identity import Identity
from hierfl.pki import Kit, TrustStore, verify_leaf
from hierfl.wire import tls
from tests.simulation import disks
from tests.simulation.kits import Kits
from tests.simulation.loop import SimLoop
from tests.simulation.wire import Network, SimChannel, SimServer

__all__ = ["InlinePool", "InlineWorker", "simulated"]

HEARTBEAT_S = 2.0
"""Between two ticks of an idle intake: half as often, for less to do."""
IN_THREADS = 0.5
"""How often updates are checked and folded in threads, as large ones are."""
DAY_NS = 86_400_000_000_000


def _nothing(*_: object) -> None:
    """What is not needed here."""


VERIFIERS = ("combiners.trust", "controller.leader", "hierfl.client.offers", "hierfl.endpoints", "hierfl.wire.tls")
"""Modules that check leaves: the same few, again and again."""


@functools.cache
def _leaf(leaf: bytes, trust: int) -> Identity:
    return verify_leaf(leaf, _trusts[trust], datetime.now(UTC))


_trusts: dict[int, TrustStore] = {}


def _verified_leaf(leaf: bytes, trust: TrustStore, now: datetime) -> Identity:
    """``verify_leaf``, once for each leaf and store: clocks are right here, and nothing expires."""
    _trusts[id(trust)] = trust
    return _leaf(leaf, id(trust))


SIGNERS = ("hierfl.pki", "hierfl.border")
CHECKERS = ("hierfl.border", "hierfl.endpoints", "hierfl.client.offers", "combiners.trust", "combiners.intake")


def _public(key: object) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]


@functools.cache
def _owner(certificate: bytes) -> bytes:
    return _public(x509.load_der_x509_certificate(certificate).public_key())


_signers: dict[int, tuple[object, bytes]] = {}
"""By the identity of the key, which is kept: its public half."""


def _signer(key: object) -> bytes:
    if id(key) not in _signers:
        _signers[id(key)] = (key, _public(key.public_key()))  # type: ignore[attr-defined]
    return _signers[id(key)][1]


def _sign(key: object, message: bytes, context: bytes) -> bytes:
    """A signature that nobody here forges: quick, and the same each time."""
    return hashlib.sha256(b"\0".join((_signer(key), context, message))).digest()


def _verify(signer: object, signature: bytes, message: bytes, context: bytes) -> None:
    is_leaf = isinstance(signer, x509.Certificate)
    owner = _owner(signer.public_bytes(Encoding.DER)) if is_leaf else _public(signer)
    if signature != hashlib.sha256(b"\0".join((owner, context, message))).digest():
        raise CertificateUntrusted(f"the signature does not fit this {context.decode()} document")


class InlinePool:
    """A ``ThreadPoolExecutor`` that works when it is asked to."""

    def __init__(self, *_: object, **__: object) -> None:
        """However many threads."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001  raised where it is asked for
            future.set_exception(error)
        return future

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to wait for."""

    def shutdown(self, wait: bool = True) -> None:
        """Nothing to end."""


class InlineWorker:
    """``hierfl.client.worker.Worker`` whose user code takes ``seconds()`` of the simulation's time."""

    def __init__(self, loop: SimLoop, seconds: Callable[[], float]) -> None:
        self._loop, self._seconds = loop, seconds

    async def run(self, function: Callable[[], Any], started: Callable[[], None] = lambda: None) -> Any:
        import asyncio

        started()
        await asyncio.sleep(self._seconds())
        return function()


@contextmanager
def simulated(loop: SimLoop, network: Network, kits: Kits, seed: int) -> Iterator[disks.Disks]:
    """While this lasts, the product lives in the simulation."""
    dice = random.Random(f"product {seed}")
    state = random.getstate()
    random.seed(seed)
    start_ns = int(kits.controller.certificate.not_valid_before_utc.timestamp()) * 1_000_000_000 + DAY_NS // 12
    ticks = iter(range(10**12))
    registered = {str(kit.path): kit for of in kits.clients.values() for kit in of}

    def server(interceptors: Any = (), options: Any = ()) -> SimServer:
        return SimServer(network, interceptors)

    def monotonic() -> float:
        return 1000.0 + loop.now_s

    def time_ns() -> int:
        return start_ns + int(loop.now_s * 1e9) + next(ticks)

    def uuid4() -> uuid.UUID:
        return uuid.UUID(int=dice.getrandbits(128))

    patches = [
        mock.patch("combiners.link.HEARTBEAT_S", HEARTBEAT_S),
        mock.patch.object(time, "monotonic", monotonic),
        mock.patch.object(time, "time_ns", time_ns),
        mock.patch.object(secrets, "token_hex", lambda n=8: f"{dice.getrandbits(8 * n):0{2 * n}x}"),
        mock.patch.object(secrets, "token_bytes", dice.randbytes),
        mock.patch.object(uuid, "uuid4", uuid4),
        mock.patch.object(grpc.aio, "server", server),
        mock.patch.object(tls, "open_channel", lambda kit, address, server: SimChannel(network, kit, address)),
        mock.patch.object(tls, "server_credentials", _nothing),
        mock.patch.object(tls, "bind", lambda server, address, credentials: server.bind(address)),
        mock.patch.object(kernels, "warm_up", _nothing),
        mock.patch.object(kernels_encodings, "warm_up", _nothing),
        mock.patch.object(Kit, "load", lambda path, now=None: registered[str(path)]),
        mock.patch.object(hierfl.client.work, "seed_generators", _nothing),
        mock.patch("controller.blobs.ThreadPoolExecutor", InlinePool),
        *(mock.patch(f"{module}.verify_leaf", _verified_leaf) for module in VERIFIERS),
        *(mock.patch(f"{module}.sign", _sign) for module in SIGNERS),
        *(mock.patch(f"{module}.verify", _verify) for module in CHECKERS),
        mock.patch("controller.leader.verify", _verify),
    ]
    patches += [
        mock.patch("hierfl.failpoints._folder", "simulated"),
        mock.patch("hierfl.failpoints._obey", lambda order: loop.on_failpoint(order.name)),
    ]
    if dice.random() < IN_THREADS:
        patches += [mock.patch("combiners.sums.INLINE_VALUES", 0), mock.patch("combiners.sums.INLINE_BYTES", 0)]
    logging.disable(logging.CRITICAL)
    try:
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield stack.enter_context(disks.on_simulated_disks())
    finally:
        logging.disable(logging.NOTSET)
        random.setstate(state)
