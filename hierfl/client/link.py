"""The connection to the combiner: the only place of the SDK that speaks gRPC. It dials out and never listens.

A link that breaks is dialled again, at the next address that ``hierfl/client/intakes.py`` has, with growing
pauses or when the combiner said, and for as long as the client runs; what it waits for is said in words. A
client that is not where it belongs moves there when it has nothing to do. The kit is read anew each time, so
that a renewed certificate needs no restart.
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

from hierfl.client.intakes import Intakes, Target
from hierfl.errors import (
    ComeBack,
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
from hierfl.wire.delta import Bases
from hierfl.wire.fetch import Fetched, Fetcher

__all__ = ["DIALS_AT_ONCE", "Link", "Waits", "checked", "probe", "receipts_at"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
DIALS_AT_ONCE = 8
"""By the clients of one process: hundreds that dial at the same moment would all wait for too long, and try again."""
DIAL_S = 10.0
"""In which an intake of the list has to answer; the kit's addresses have as long as any call."""
SPREAD_S = 2.0
"""Clients that move because of a new list do so within this time, not all at once."""
FIRST_HOMING_S, LONGEST_HOMING_S = 5.0, 600.0
"""Pauses between tries of the intake that the client belongs to, while another one serves it."""
MOST_AWAY_S = 1800.0
"""No server keeps a client away for longer."""
JITTER = 0.25
REMIND_S = 60.0
"""A wait is said again after so long, and whenever its reason changes."""

Say = Callable[[str], None]


class Link:
    """One client's connection. A call made while it is down raises ``Unreachable``."""

    def __init__(
        self,
        kit: Kit,
        apps: Sequence[tuple[str, str]],
        intakes: Intakes,
        say: Say,
        *,
        dialling: asyncio.Semaphore | None = None,
        takes_models_along: bool = False,
    ) -> None:
        """
        Args:
            kit: Of a client, with the combiner's addresses.
            apps: (name, version) of what runs here.
            intakes: What the client knows of its region's intakes.
            say: Takes a sentence for the site's administrator.
            dialling: Held while it dials; shared by the clients of a process.
            takes_models_along: Whether small models are to come along with offers, for no other client fetches them.
        Raises:
            ConfigError: The kit is not a client's, or names no address.
        """
        self.kit = checked(kit)
        self.client: ClientRef = kit.identity.client_ref
        self.is_idle = asyncio.Event()
        """Set by the client while it has nothing to do: the only time at which it moves to another intake."""
        self.is_idle.set()
        self._takes_models_along = takes_models_along
        self._apps = [pb.App(name=name, version=version) for name, version in apps]
        self._intakes, self._listed = intakes, asyncio.Event()
        self._is_moving = False
        self._dialling = dialling or asyncio.Semaphore()
        self._say = say
        self._up = asyncio.Event()
        self._stub: Any = None
        self._waits = Waits(say)

    async def events(self) -> AsyncIterator[pb.FollowResponse]:
        """What the combiner sends, over as many connections as it takes. Each begins with a ``welcome``."""
        while True:
            target, after_s = None, 0.0
            try:
                self._reload_kit()
                target = self._intakes.targets(self.kit.addresses)[0]
                patience_s = DIAL_S if target.name else None
                async with connected(self.kit, target.address, patience_s, self._dialling) as stub:
                    async for event in self._follow(stub, target):
                        yield event
                reason = f"the combiner at {target.address} closed the connection"
            except ComeBack as error:
                reason = str(error)
                first = self._intakes.targets(self.kit.addresses)[0]
                belongs_here = target is not None and target.address == first.address  # the kit's has no name
                after_s = error.after_s if belongs_here else 0.0  # there may be room where it belongs
            except HierFLError as error:
                reason = str(error)
                if target is not None and not self._up.is_set():
                    self._intakes.failed(target)
            finally:
                self._up.clear()
            if self._is_moving:
                self._is_moving = False
                continue
            every = len(self._intakes.targets(self.kit.addresses))
            await asyncio.sleep(self._waits.next_pause_s(reason, every, after_s))

    async def _follow(self, stub: Any, target: Target) -> AsyncIterator[pb.FollowResponse]:
        epoch, version = self._intakes.age
        request = pb.FollowRequest(
            apps=self._apps,
            endpoints_epoch=epoch,
            endpoints_version=version,
            takes_receipts_along=True,
            takes_models_along=self._takes_models_along,
        )
        stream = stub.Follow(request)
        homing: asyncio.Task[None] | None = None
        try:
            async for event in stream:
                kind = event.WhichOneof("event")
                if kind == "endpoints":
                    self._take_list(event.endpoints)
                if kind == "welcome":
                    self._welcomed(stub, target, event.welcome)
                    homing = homing or asyncio.create_task(self._homing(stream, event.welcome.intake or target.name))
                yield event
        except grpc.RpcError as error:
            raise stub.error(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_moving or (task is not None and task.cancelling()):
                raise
        finally:
            if homing is not None:
                homing.cancel()
            stream.cancel()

    def _welcomed(self, stub: Any, target: Target, welcome: pb.Welcome) -> None:
        if welcome.HasField("endpoints"):
            self._take_list(welcome.endpoints)
        self._stub = stub
        self._up.set()
        self._waits.over()
        self._intakes.answered(target)
        self._say(f"connected to the combiner of {self.client.region} at {target.address}; waiting for a round")

    def _take_list(self, message: pb.Endpoints) -> None:
        self._intakes.take(message, self.kit)
        self._listed.set()

    async def _homing(self, stream: Any, at: str) -> None:
        """Where another intake is the client's own: end this stream once that one answers and nothing is going on."""
        pause_s = 0.0
        self._listed.clear()
        while True:
            home = self._intakes.home
            is_home = home is None or home.name == at
            if await self._is_listed_anew(None if is_home else pause_s):
                pause_s = random.uniform(0, SPREAD_S)  # noqa: S311  as in Waits
                continue
            assert home is not None, "without a list there is nothing but a new one to wait for"
            await self.is_idle.wait()
            if await self._answers(home) and self.is_idle.is_set() and home == self._intakes.home:
                self._say(f"moving to {home.name} at {home.address}, which the region's list has for this client")
                self._is_moving = True
                stream.cancel()
                return
            longer_s = min(max(2 * pause_s, FIRST_HOMING_S), LONGEST_HOMING_S)
            pause_s = longer_s if self.is_idle.is_set() else pause_s

    async def _is_listed_anew(self, within_s: float | None) -> bool:
        """Whether another list came within so many seconds."""
        try:
            async with asyncio.timeout(within_s):
                await self._listed.wait()
        except TimeoutError:
            return False
        self._listed.clear()
        return True

    async def _answers(self, home: Target) -> bool:
        try:
            async with connected(self.kit, home.address, DIAL_S):
                self._intakes.answered(home)
                return True
        except HierFLError:
            self._intakes.failed(home)
            return False

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

    async def fetch_model(self, model_hash: str, expect: transfer.Expect, bases: Bases, fetcher: Fetcher) -> Fetched:
        """A model, checked against its hash. ``fetcher`` has what came of it before the connection broke; ``bases``
        are here.
        """
        stub = self._ready()
        with _errors_of(stub):
            return await fetcher.fetch(stub, model_hash, expect, bases)

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
            update=outgoing.small_frames(key),
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
async def connected(
    kit: Kit, address: str, patience_s: float | None = None, dialling: asyncio.Semaphore | None = None
) -> AsyncIterator[Any]:
    """A stub of the combiner at ``address`` after its hello; the channel is closed at the end.

    Args:
        patience_s: Seconds in which it has to answer; as any call where not given.
        dialling: Held until it has answered.
    Raises:
        Unreachable, VersionMismatch, IdentityError: No combiner of the kit's region answers there.
    """
    server = Identity(federation=kit.identity.federation, role=RoleName.COMBINER, region=kit.identity.region)
    channel = tls.open_channel(kit, address, server)
    try:
        stub = rpc.stub(channel, "CombinerService")
        try:
            async with dialling or asyncio.Semaphore(), asyncio.timeout(patience_s):
                await rpc.hello(stub, f"the combiner of {kit.identity.region}", address)
        except TimeoutError:
            raise Unreachable(f"the combiner at {address} did not answer within {patience_s:g} s") from None
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


async def receipts_at(kit: Kit, address: str, keys: Sequence[AttemptKey]) -> list[Receipt]:
    """Connect once and ask what became of a client's updates under these keys.

    Raises:
        Unreachable, VersionMismatch, IdentityError: No combiner of the kit's region answers there.
    """
    async with connected(kit, address, DIAL_S) as stub:
        with _errors_of(stub):
            request = pb.GetReceiptsRequest(keys=[key_to_proto(key) for key in keys])
            response = await stub.GetReceipts(request)
        return [receipt_from_proto(message, kit.identity.client_ref) for message in response.receipts]


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

    def next_pause_s(self, reason: str, every: int = 1, after_s: float = 0.0) -> float:
        """Seconds until the next try.

        Args:
            reason: Why there has to be another, in words.
            every: They grow after so many tries, one for each address.
            after_s: What the other side said; then it is that, and a little more.
        """
        self._speak(reason)
        if after_s > 0:
            return min(after_s, MOST_AWAY_S) * random.uniform(1.0, 1.0 + JITTER)  # noqa: S311  as below
        steps = min(self._tries // every, 10)
        self._tries += 1
        spread = random.uniform(0.5, 1.0)  # noqa: S311  so that many clients do not come at once; no secret
        return min(self._longest_s, FIRST_PAUSE_S * 2.0**steps) * spread

    def _speak(self, reason: str) -> None:
        now_s = time.monotonic()
        if reason != self._reason or now_s - self._said_at_s > REMIND_S:
            self._say(f"{reason}; trying again until it does")
            self._reason, self._said_at_s = reason, now_s
