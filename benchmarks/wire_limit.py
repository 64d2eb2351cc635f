"""The limit that a round is held against: the same bytes through OpenSSL alone, on the same machine, in the same run.

As many processes as the round has: a controller, regions, clients, each connection TLS 1.3 with certificates on both
sides and the cipher that gRPC negotiates, written and read 1 MiB at a time. A model goes down to each region and from
there to each client, an update comes up from each client, a partial from each region. Each receiver passes once over
what it got to make a digest, a region once more to fold each update. Nothing is checked, claimed, sealed, applied or
written to a disk.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import blake3
import numpy as np

from hierfl import kernels

__all__ = ["CIPHER", "Limit", "Shape", "running"]

CIPHER = "TLS_AES_128_GCM_SHA256"
PIECE = 2**20
PATIENCE_S = 300.0

_OPENSSL = f"""openssl_conf = here
[here]
ssl_conf = ssl_here
[ssl_here]
system_default = defaults
[defaults]
Ciphersuites = {CIPHER}
"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is moved, and between whom."""

    clients: tuple[int, ...]
    """Of each region."""
    client_processes: int
    """Of each region."""
    model_bytes: int
    update_bytes: int
    partial_bytes: int
    kits: Path
    """The folder of kits of a provisioned federation, whose certificates are used."""
    regions: tuple[str, ...]
    client_kits: tuple[Path, ...]
    """One for each region."""


class Limit:
    """The running processes; ``round_s`` moves everything once."""

    def __init__(self, controller: Connection) -> None:
        self._controller = controller

    def round_s(self) -> float:
        """Seconds from the first byte of the model to the last byte of the last partial."""
        self._controller.send("go")
        return float(_receive(self._controller))


@contextmanager
def running(shape: Shape) -> Iterator[Limit]:
    """Start all processes and connections; nothing of them is left at the end."""
    context = multiprocessing.get_context("spawn")
    processes: list[Any] = []

    def start(target: Callable[..., None], *arguments: object) -> Connection:
        ours, theirs = context.Pipe()
        process = context.Process(target=_guarded, args=(target, theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        return ours

    with tempfile.TemporaryDirectory(prefix="hierfl-limit-") as folder:
        settings = Path(folder) / "openssl.cnf"
        settings.write_text(_OPENSSL)
        before = os.environ.get("OPENSSL_CONF")
        os.environ["OPENSSL_CONF"] = str(settings)  # read once by each process, when it loads OpenSSL
        try:
            controller = start(_controller, shape)
            port = _receive(controller)
            regions = [start(_region, shape, number, port) for number in range(len(shape.regions))]
            ports = [_receive(region) for region in regions]
            clients = [
                start(_clients, shape, number, ports[number], len(range(part, count, shape.client_processes)))
                for number, count in enumerate(shape.clients)
                for part in range(shape.client_processes)
            ]
            for one in (controller, *regions, *clients):
                _expect(_receive(one), "connected")
            yield Limit(controller)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            if before is None:
                del os.environ["OPENSSL_CONF"]
            else:
                os.environ["OPENSSL_CONF"] = before


def _receive(connection: Connection) -> Any:
    if not connection.poll(PATIENCE_S):
        raise TimeoutError("a process of the limit said nothing")
    said = connection.recv()
    if isinstance(said, Exception):
        raise RuntimeError(f"a process of the limit failed: {said}") from said
    return said


def _expect(said: object, wanted: str) -> None:
    if said != wanted:
        raise RuntimeError(f"a process of the limit said {said!r}, not {wanted!r}")


def _guarded(target: Callable[..., None], pipe: Connection, *arguments: object) -> None:
    try:
        target(pipe, *arguments)
    except Exception as error:  # noqa: BLE001  - it is raised where the process was started
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


# ---------------------------------------------------------------- the processes


def _controller(pipe: Connection, shape: Shape) -> None:
    server = _listen()
    pipe.send(server.getsockname()[1])
    trusted = [shape.kits / "controller" / "trust" / "regions" / f"{region}.pem" for region in shape.regions]
    context = _context(ssl.PROTOCOL_TLS_SERVER, shape.kits / "controller", trusted)
    peers = [_accept(server, context) for _ in shape.regions]
    pipe.send("connected")
    model, buffers = os.urandom(shape.model_bytes), [bytearray(PIECE) for _ in peers]

    def serve(peer: ssl.SSLSocket, buffer: bytearray) -> None:
        _send(peer, model)
        _take(peer, shape.partial_bytes, buffer)

    while pipe.recv() == "go":
        start = time.perf_counter()
        _all([lambda p=p, b=b: serve(p, b) for p, b in zip(peers, buffers, strict=True)])  # type: ignore[misc]
        pipe.send(time.perf_counter() - start)


def _region(pipe: Connection, shape: Shape, number: int, port: int) -> None:
    kernels.warm_up()
    region = shape.regions[number]
    kit = shape.kits / "regions" / region / "combiner"
    server = _listen()
    pipe.send(server.getsockname()[1])
    controller = _connect(port, _context(ssl.PROTOCOL_TLS_CLIENT, kit, [kit / "trust" / "controller.pem"]))
    context = _context(ssl.PROTOCOL_TLS_SERVER, kit, [kit / "trust" / "regions" / f"{region}.pem"])
    peers = [_accept(server, context) for _ in range(shape.clients[number])]
    pipe.send("connected")
    sums = np.full(max(1, shape.model_bytes // 4), 0, np.int64)
    update = np.full(PIECE // 4, np.float32(1e-3))
    model, partial = bytearray(shape.model_bytes), os.urandom(shape.partial_bytes)
    folding, buffers = threading.Lock(), [bytearray(PIECE) for _ in peers]

    def serve(peer: ssl.SSLSocket, buffer: bytearray) -> None:
        _send(peer, model)
        _take(peer, shape.update_bytes, buffer)
        with folding:
            _fold(sums, update)

    while True:
        _take(controller, shape.model_bytes, model, whole=True)
        _all([lambda p=p, b=b: serve(p, b) for p, b in zip(peers, buffers, strict=True)])  # type: ignore[misc]
        sums.fill(0)
        _send(controller, partial)


def _clients(pipe: Connection, shape: Shape, number: int, port: int, count: int) -> None:
    kit = shape.client_kits[number]
    trusted = [kit / "trust" / "regions" / f"{shape.regions[number]}.pem"]
    context = _context(ssl.PROTOCOL_TLS_CLIENT, kit, trusted)
    peers = [_connect(port, context) for _ in range(count)]
    pipe.send("connected")
    update, buffers = os.urandom(shape.update_bytes), [bytearray(PIECE) for _ in peers]

    def serve(peer: ssl.SSLSocket, buffer: bytearray) -> None:
        while True:
            _take(peer, shape.model_bytes, buffer)
            _send(peer, update)

    _all([lambda p=p, b=b: serve(p, b) for p, b in zip(peers, buffers, strict=True)])  # type: ignore[misc]


# ---------------------------------------------------------------- bytes


def _context(protocol: int, kit: Path, trusted: list[Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(kit / "identity.pem", kit / "key.pem")
    for path in trusted:
        context.load_verify_locations(path)
    return context


def _listen() -> socket.socket:
    server = socket.create_server(("127.0.0.1", 0), backlog=4096)
    server.settimeout(PATIENCE_S)
    return server


def _accept(server: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _checked(context.wrap_socket(connection, server_side=True))


def _connect(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _checked(context.wrap_socket(connection))


def _checked(connection: ssl.SSLSocket) -> ssl.SSLSocket:
    cipher = connection.cipher()
    if cipher is None or cipher[0] != CIPHER:
        raise RuntimeError(f"the limit speaks {cipher}, gRPC {CIPHER}: they cannot be compared")
    connection.settimeout(None)
    return connection


def _send(peer: ssl.SSLSocket, data: bytes | bytearray) -> None:
    view = memoryview(data)
    for start in range(0, len(view), PIECE):
        peer.sendall(view[start : start + PIECE])


def _take(peer: ssl.SSLSocket, num_bytes: int, buffer: bytearray, *, whole: bool = False) -> None:
    """Receive and digest; into one piece's buffer over and over, or the whole into ``buffer``."""
    state, view, done = blake3.blake3(), memoryview(buffer), 0
    while done < num_bytes:
        start, length = done if whole else 0, min(PIECE, num_bytes - done)
        got = 0
        while got < length:
            received = peer.recv_into(view[start + got : start + length])
            if not received:
                raise ConnectionError("a peer of the limit is gone")
            got += received
        state.update(view[start : start + length])
        done += length
    state.digest()


def _fold(sums: np.ndarray, update: np.ndarray) -> None:
    for start in range(0, sums.size, update.size):
        part = sums[start : start + update.size]
        kernels.active().fold_fixed(part, update[: part.size], np.float32(8), 2.0**32, 3)


def _all(actions: list[Callable[[], None]]) -> None:
    """Run all at once, each in a thread; an error of one is raised here."""
    errors: list[BaseException] = []

    def guarded(action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
