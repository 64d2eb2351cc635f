"""The connection to the combiner: the only place of the SDK that speaks gRPC. It dials out and never listens.

A link that breaks is dialled again, at the next of the kit's addresses, with growing pauses and for as
long as the client runs; what it waits for is said in words. The kit is read anew each time, so that a
renewed certificate needs no restart.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc

from hierfl.errors import ConfigError, HierFLError, IdentityError, Unreachable
from hierfl.identity import Identity, RoleName
from hierfl.pki import Kit
from hierfl.receipts import Receipt
from hierfl.types import AttemptKey, ClientRef
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc, tls, transfer
from hierfl.wire.convert import key_to_proto, receipt_from_proto

__all__ = ["Link", "probe"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
REMIND_S = 60.0
"""A wait is said again after so long, and whenever its reason changes."""

Say = Callable[[str], None]


class Link:
    """One client's connection. Calls made while it is down wait until it is up again."""

    def __init__(self, kit: Kit, apps: Sequence[tuple[str, str]], say: Say) -> None:
        """
        Args:
            kit: Of a client, with the combiner's addresses.
            apps: (name, version) of what runs here.
            say: Takes a sentence for the site's administrator.
        Raises:
            ConfigError: The kit is not a client's, or names no address.
        """
        if kit.identity.role is not RoleName.CLIENT:
            raise ConfigError("--kit", str(kit.path), f"must be a client's kit, it is that of {kit.identity}")
        if not kit.addresses:
            raise ConfigError("addresses", None, "must name the combiner, host:port", str(kit.path / "kit.toml"))
        self.kit = kit
        self.client: ClientRef = kit.identity.client_ref
        self._apps = [pb.App(name=name, version=version) for name, version in apps]
        self._say = say
        self._up = asyncio.Event()
        self._stub: Any = None
        self._waits = _Waits(say)

    async def events(self) -> AsyncIterator[pb.FollowResponse]:
        """What the combiner sends, over as many connections as it takes. Each begins with a ``welcome``."""
        turn = 0
        while True:
            address = self.kit.addresses[turn % len(self.kit.addresses)]
            try:
                self._reload_kit()
                async with connected(self.kit, address) as stub:
                    async for event in self._follow(stub, address):
                        yield event
                reason = f"the combiner at {address} closed the connection"
            except HierFLError as error:
                reason = str(error)
            finally:
                self._up.clear()
            turn += 1
            await asyncio.sleep(self._waits.next_pause_s(reason, every=len(self.kit.addresses)))

    async def _follow(self, stub: Any, address: str) -> AsyncIterator[pb.FollowResponse]:
        stream = stub.Follow(pb.FollowRequest(apps=self._apps))
        try:
            async for event in stream:
                if event.WhichOneof("event") == "welcome":
                    self._stub = stub
                    self._up.set()
                    self._waits.over()
                    self._say(f"connected to the combiner of {self.client.region} at {address}; waiting for a round")
                yield event
        except grpc.RpcError as error:
            raise stub.error(error) from None
        finally:
            stream.cancel()

    def _reload_kit(self) -> None:
        """Take up a renewed certificate; a kit that is being replaced is not there for a moment."""
        try:
            self.kit = Kit.load(self.kit.path)
        except (IdentityError, ConfigError) as error:
            raise Unreachable(f"no connection: {error}") from None

    async def _ready(self) -> Any:
        await self._up.wait()
        return self._stub

    async def fetch_model(self, model_hash: str, expect: transfer.Expect) -> transfer.Incoming:
        """A model, checked against its hash."""
        stub = await self._ready()
        with _dropped_is_unreachable():
            return await rpc.fetch_model(stub, model_hash, expect)

    async def admit(
        self, key: AttemptKey, outgoing: transfer.Outgoing, weight: int, signature: bytes
    ) -> pb.AdmitResponse:
        """Ask to be let in; waits in line for as long as the connection lives."""
        request = pb.AdmitRequest(
            key=key_to_proto(key),
            digest=outgoing.digest,
            length_bytes=outgoing.length_bytes,
            weight=weight,
            signature=signature,
        )
        return await self._call("Admit", request)

    async def upload(self, key: AttemptKey, outgoing: transfer.Outgoing, ticket: bytes) -> Receipt:
        """Send an update that was let in."""
        stub = await self._ready()
        with _dropped_is_unreachable():
            response = await rpc.upload_frames(stub.Upload, outgoing, key, ticket)
        return self.receipt(response.receipt)

    async def decline(self, key: AttemptKey, code: str) -> None:
        await self._call("Decline", pb.DeclineRequest(key=key_to_proto(key), code=code))

    async def receipts(self, keys: Sequence[AttemptKey]) -> list[Receipt]:
        """What became of this client's updates under these keys."""
        response = await self._call("GetReceipts", pb.GetReceiptsRequest(keys=[key_to_proto(key) for key in keys]))
        return [self.receipt(message) for message in response.receipts]

    def receipt(self, message: pb.Receipt) -> Receipt:
        return receipt_from_proto(message, self.client)

    async def _call(self, method: str, request: Any) -> Any:
        stub = await self._ready()
        try:
            with _dropped_is_unreachable():
                return await getattr(stub, method)(request)
        except grpc.RpcError as error:
            raise stub.error(error) from None


@contextmanager
def _dropped_is_unreachable() -> Iterator[None]:
    """gRPC cancels the calls of a channel that is closed under them: that is no cancelling of this task."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unreachable("the connection to the combiner closed in the middle of a call") from None


@asynccontextmanager
async def connected(kit: Kit, address: str) -> AsyncIterator[Any]:
    """A stub of the combiner at ``address`` after its hello; the channel is closed at the end.

    Raises:
        Unreachable, VersionMismatch, IdentityError: No combiner of the kit's region answers there.
    """
    server = Identity(federation=kit.identity.federation, role=RoleName.COMBINER, region=kit.identity.region)
    channel = tls.open_channel(kit, address, server)
    try:
        stub = rpc.stub(channel, "CombinerService")
        await rpc.hello(stub, f"the combiner of {kit.identity.region}", address)
        yield stub
    finally:
        await channel.close()


async def probe(kit: Kit) -> tuple[str, str]:
    """Connect once: the address that answered, or an empty one, and what was found in words."""
    said = ["the kit names no address"]
    for address in kit.addresses:
        try:
            async with connected(kit, address):
                return address, f"the combiner of {kit.identity.region} answers at {address}"
        except HierFLError as error:
            said.append(str(error))
    return "", "; ".join(said[1:] or said)


class _Waits:
    """Pauses between tries, with jitter, and what is said of them."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._tries = 0
        self._reason, self._said_at_s = "", 0.0

    def over(self) -> None:
        self._tries, self._reason = 0, ""

    def next_pause_s(self, reason: str, every: int) -> float:
        """Seconds until the next try; it grows once ``every`` address has had its turn."""
        self._tries += 1
        steps = min((self._tries - 1) // every, 10)
        pause_s: float = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**steps) * random.uniform(0.5, 1.0)  # noqa: S311  spread, not secrecy
        now_s = time.monotonic()
        if reason != self._reason or now_s - self._said_at_s > REMIND_S:
            self._say(f"{reason}; trying again, every {LONGEST_PAUSE_S:.0f} s at least")
            self._reason, self._said_at_s = reason, now_s
        return pause_s
