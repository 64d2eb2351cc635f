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

from hierfl.wire import tls  # before gRPC, which it silences: errors are ours to word

# isort: split
import grpc

from hierfl.errors import (
    ConfigError,
    HierFLError,
    IdentityError,
    Interrupted,
    RegionError,
    StorageError,
    Unreachable,
)
from hierfl.identity import Identity, RoleName
from hierfl.pki import Kit
from hierfl.receipts import Receipt
from hierfl.types import AttemptKey, ClientRef
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc, transfer
from hierfl.wire.convert import key_to_proto, receipt_from_proto
from hierfl.wire.fetch import Fetcher

__all__ = ["Link", "Waits", "checked", "probe"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
SMALL_UPDATE_BYTES = 65_536
"""Of values: what is not larger is handed in with the request, which saves a stream."""
REMIND_S = 60.0
"""A wait is said again after so long, and whenever its reason changes."""

Say = Callable[[str], None]


class Link:
    """One client's connection. A call made while it is down raises ``Unreachable``."""

    def __init__(self, kit: Kit, apps: Sequence[tuple[str, str]], say: Say) -> None:
        """
        Args:
            kit: Of a client, with the combiner's addresses.
            apps: (name, version) of what runs here.
            say: Takes a sentence for the site's administrator.
        Raises:
            ConfigError: The kit is not a client's, or names no address.
        """
        self.kit = checked(kit)
        self.client: ClientRef = kit.identity.client_ref
        self._apps = [pb.App(name=name, version=version) for name, version in apps]
        self._say = say
        self._up = asyncio.Event()
        self._stub: Any = None
        self._waits = Waits(say)

    async def events(self) -> AsyncIterator[pb.FollowResponse]:
        """What the combiner sends, over as many connections as it takes. Each begins with a ``welcome``."""
        turn = 0
        while True:
            try:
                self._reload_kit()
                address = self.kit.addresses[turn % len(self.kit.addresses)]
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
        """Take up a renewed certificate, or new addresses. A kit that is being replaced is not there for a moment."""
        try:
            self.kit = checked(Kit.load(self.kit.path))
        except (IdentityError, ConfigError) as error:
            raise Unreachable(f"the kit cannot be used now: {error}") from None

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    async def wait_until_up(self) -> None:
        """Return once the combiner has welcomed this client."""
        await self._up.wait()

    def _ready(self) -> Any:
        if not self._up.is_set():
            raise Unreachable("there is no connection to the combiner now")
        return self._stub

    async def fetch_model(self, model_hash: str, expect: transfer.Expect, fetcher: Fetcher) -> transfer.Incoming:
        """A model, checked against its hash. ``fetcher`` has what came of it before the connection broke."""
        stub = self._ready()
        with _errors_of(stub):
            return await fetcher.fetch(stub, model_hash, expect)

    async def admit(
        self, key: AttemptKey, outgoing: transfer.Outgoing, weight: int, signature: bytes
    ) -> pb.AdmitResponse:
        """Ask to be let in; waits in line for as long as the connection lives. A small update goes along."""
        request = pb.AdmitRequest(
            key=key_to_proto(key),
            digest=outgoing.digest,
            length_bytes=outgoing.length_bytes,
            weight=weight,
            signature=signature,
            update=outgoing.frames(key) if outgoing.length_bytes <= SMALL_UPDATE_BYTES else (),
        )
        response: pb.AdmitResponse = await self._call("Admit", request)
        return response

    async def upload(self, key: AttemptKey, outgoing: transfer.Outgoing, ticket: bytes) -> Receipt:
        """Send an update that was let in."""
        stub = self._ready()
        with _errors_of(stub):
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
        stub = self._ready()
        with _errors_of(stub):
            return await getattr(stub, method)(request)


@contextmanager
def _errors_of(stub: Any) -> Iterator[None]:
    """What a failed call means here. Trouble on the combiner's own side is a reason to try again later.

    gRPC cancels the calls of a channel that is closed under them: that is no cancelling of this task.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unreachable("the connection to the combiner closed in the middle of a call") from None
    except grpc.RpcError as error:
        raise _seen_from_here(stub.error(error)) from None
    except HierFLError as error:
        raise _seen_from_here(error) from None


def _seen_from_here(error: HierFLError) -> HierFLError:
    its_own = isinstance(error, StorageError | Interrupted | RegionError) or type(error) is HierFLError
    return Unreachable(str(error)) if its_own else error


def checked(kit: Kit) -> Kit:
    """A client's kit that names its combiner.

    Raises:
        ConfigError: It is another's, or names no address.
    """
    if kit.identity.role is not RoleName.CLIENT:
        raise ConfigError("--kit", str(kit.path), f"must be a client's kit, it is that of {kit.identity}")
    if not kit.addresses:
        raise ConfigError("addresses", None, "must name the combiner, host:port", str(kit.path / "kit.toml"))
    return kit


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


class Waits:
    """Pauses between tries, growing, with jitter; and what is said of them: each reason once a while."""

    def __init__(self, say: Say, longest_s: float = LONGEST_PAUSE_S) -> None:
        self._say = say
        self._longest_s = longest_s
        self._tries = 0
        self._reason, self._said_at_s = "", 0.0

    def over(self) -> None:
        """It went well: the next pause is the first again."""
        self._tries, self._reason = 0, ""

    def next_pause_s(self, reason: str, every: int = 1) -> float:
        """Seconds until the next try; they grow after ``every`` tries, one for each address."""
        steps = min(self._tries // every, 10)
        self._tries += 1
        now_s = time.monotonic()
        if reason != self._reason or now_s - self._said_at_s > REMIND_S:
            self._say(f"{reason}; trying again until it does")
            self._reason, self._said_at_s = reason, now_s
        spread = random.uniform(0.5, 1.0)  # noqa: S311  so that many clients do not come at once; no secret
        return min(self._longest_s, FIRST_PAUSE_S * 2.0**steps) * spread
