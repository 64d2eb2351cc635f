"""The region's one way out: gRPC client of the controller. Dials, keeps dialling, and says what it waits for.

A partial leaves only as ``Sealed`` bytes, which are made from a ``Release``; every message that goes out is
counted for the border ledger. Retries go under one key until the controller has answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import grpc

from combiners.sealed import Sealed
from hierfl.border import LEDGER_HEAD_METADATA, Control
from hierfl.errors import (
    HierFLError,
    Interrupted,
    NotTheLeader,
    RegionUnreachable,
    StorageError,
    TransferIncomplete,
    Unreachable,
    VersionMismatch,
)
from hierfl.identity import Identity, RoleName
from hierfl.pki import Kit
from hierfl.receipts import Reason
from hierfl.types import AttemptKey, ModelHash
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc, tls
from hierfl.wire.convert import key_to_proto
from hierfl.wire.delta import Bases
from hierfl.wire.fetch import Fetched, Fetcher
from hierfl.wire.transfer import Expect

__all__ = ["Uplink", "UplinkEvents"]

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
STANDBY_PAUSE_S = 1.0
"""Longest pause where a controller says that it stands by: one of them leads, or will within seconds."""
HELLO_S = 5.0
"""Longest wait for a controller's first answer: one that is frozen takes connections, and says nothing."""
REMIND_S = 60.0
COALESCE_S = 0.1
"""Progress is reported at most so often."""
WHO = "the controller"

TRY_AGAIN = (Unreachable, VersionMismatch, TransferIncomplete)
"""What a better moment, or an upgrade, may mend."""


class UplinkEvents(Protocol):
    """Whoever decides what the controller's words mean."""

    def attach_request(self) -> Awaitable[pb.AttachRequest]: ...
    def report_request(self) -> pb.ReportRequest: ...
    async def attached(self, leader_epoch: int) -> None: ...
    async def offered(self, offer: pb.Offer) -> None: ...
    async def judged(self, verdict: pb.Verdict) -> None: ...
    async def withdrawn(self, withdrawal: pb.Withdrawal) -> None: ...
    async def detached(self, control: Control) -> None: ...


class Uplink:
    """One session with the controller at a time, over as many connections as it takes."""

    def __init__(self, kit: Kit, addresses: tuple[str, ...], events: UplinkEvents) -> None:
        self._kit, self._addresses, self._events = kit, addresses, events
        self._server = Identity(federation=kit.identity.federation, role=RoleName.CONTROLLER)
        self._stub: rpc.Stub | None = None
        self._up = asyncio.Event()
        self._progressed = asyncio.Event()
        self._sent: Counter[str] = Counter()
        self._bytes_out = 0
        self._report_every_s = 2.0

    # ------------------------------------------------------------ the session

    async def run(self) -> None:
        """Attach, and again whenever the session ends; never returns."""
        tries, at, said_at_s = 0, 0, 0.0
        said: dict[str, str] = {}
        while True:
            address = self._addresses[at]
            began_s, longest_s = time.monotonic(), LONGEST_PAUSE_S
            try:
                await self._session(address)
                reason = f"{WHO} at {address} ended the session"
            except StorageError:
                raise
            except HierFLError as error:
                reason = str(error)
                longest_s = STANDBY_PAUSE_S if isinstance(error, NotTheLeader) else LONGEST_PAUSE_S
            finally:
                was_up = self._up.is_set()
                self._up.clear()
                await self._events.detached(self._take_counts(time.monotonic() - began_s))
            tries = 0 if was_up and time.monotonic() - began_s > LONGEST_PAUSE_S else tries + 1
            at = (at + 1) % len(self._addresses)
            if reason != said.get(address) or time.monotonic() - said_at_s > REMIND_S:
                logger.warning("%s; trying again, every %g s at least", reason, LONGEST_PAUSE_S)
                said[address], said_at_s = reason, time.monotonic()
            rounds = tries // len(self._addresses)  # through all of them
            await asyncio.sleep(min(pause_s(rounds), longest_s))

    async def _session(self, address: str) -> None:
        channel = tls.open_channel(self._kit, address, self._server)
        try:
            stub = rpc.stub(channel, "ControllerService")
            await _hello(stub, address)
            async with asyncio.TaskGroup() as group:
                reports = group.create_task(self._report(stub))
                await self._listen(stub)
                reports.cancel()
        except* grpc.RpcError as errors:
            raise _seen_from_here(stub.error(_first(errors))) from None
        except* HierFLError as errors:
            raise _first(errors) from None
        finally:
            await channel.close()

    async def _listen(self, stub: rpc.Stub) -> None:
        request = await self._events.attach_request()
        stream = stub.Attach(request)
        self._count("Attach", request.ByteSize())
        try:
            async for response in stream:
                await self._take(stub, response)
        finally:
            stream.cancel()

    async def _take(self, stub: rpc.Stub, response: pb.AttachResponse) -> None:
        match response.WhichOneof("event"):
            case "attached":
                await self._events.attached(response.attached.leader_epoch)
                self._report_every_s = response.attached.report_every_s or self._report_every_s
                self._stub = stub
                if not self._up.is_set():
                    logger.info("attached to %s at %s", WHO, stub.address)
                self._up.set()
            case "offer":
                await self._events.offered(response.offer)
            case "verdict":
                await self._events.judged(response.verdict)
            case "withdrawal":
                await self._events.withdrawn(response.withdrawal)

    async def _report(self, stub: rpc.Stub) -> None:
        await self._up.wait()
        while True:
            self._progressed.clear()
            request = self._events.report_request()
            self._count("Report", request.ByteSize())
            await stub.Report(request, timeout=self._report_every_s + 5.0)
            await asyncio.sleep(COALESCE_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._report_every_s):
                    await self._progressed.wait()

    def progressed(self) -> None:
        """An attempt has come to another phase."""
        self._progressed.set()

    # ------------------------------------------------------------ calls

    async def fetch_model(self, model_hash: ModelHash, expect: Expect, bases: Bases) -> Fetched:
        """A model by its hash, checked; whole, or as a difference to one of ``bases``. Tried until it comes, or is
        refused.

        Raises:
            HierFLError: What the controller answered, or the model is another.
        """

        fetcher = Fetcher()

        async def fetch(stub: rpc.Stub) -> Fetched:
            self._count("FetchModel", 0)
            return await fetcher.fetch(stub, model_hash, expect, bases)

        fetched: Fetched = await self._until_answered(fetch)
        return fetched

    async def abstain(self, key: AttemptKey, region_epoch: int, reason: Reason) -> None:
        """Tell that the region takes no part in an attempt."""
        request = pb.AbstainRequest(key=key_to_proto(key), region_epoch=region_epoch, code=reason)

        async def abstain(stub: rpc.Stub) -> None:
            self._count("Abstain", request.ByteSize())
            await stub.Abstain(request)

        await self._until_answered(abstain)

    async def send(self, sealed: Sealed, key: AttemptKey, ledger_head: str) -> pb.UplinkResponse:
        """Send sealed bytes under ``key`` until the controller has them durably.

        Raises:
            RoundClosed: The attempt is over; its verdict says more.
            HierFLError: The controller refuses the partial.
        """
        metadata = ((LEDGER_HEAD_METADATA, ledger_head),)

        async def send(stub: rpc.Stub) -> pb.UplinkResponse:
            self._count("Uplink", sealed.outgoing.length_bytes)
            response: pb.UplinkResponse = await rpc.upload_frames(stub.Uplink, sealed.outgoing, key, metadata=metadata)
            return response

        answered: pb.UplinkResponse = await self._until_answered(send)
        return answered

    async def _until_answered(self, call: Callable[[rpc.Stub], Awaitable[Any]]) -> Any:
        tries = 0
        while True:
            await self._up.wait()
            assert self._stub is not None
            try:
                return await _answer(call, self._stub)
            except TRY_AGAIN as error:
                logger.debug("a call of %s is made again: %s", WHO, error)
            tries += 1
            await asyncio.sleep(pause_s(tries))

    # ------------------------------------------------------------ the ledger's counts

    def _count(self, kind: str, num_bytes: int) -> None:
        self._sent[kind] += 1
        self._bytes_out += num_bytes

    def _take_counts(self, seconds: float) -> Control:
        control = Control(counts=dict(sorted(self._sent.items())), bytes_out=self._bytes_out, seconds=round(seconds, 3))
        self._sent, self._bytes_out = Counter(), 0
        return control


async def _hello(stub: rpc.Stub, address: str) -> None:
    try:
        async with asyncio.timeout(HELLO_S):
            await rpc.hello(stub, WHO, address)
    except TimeoutError:
        raise Unreachable(f"{WHO} at {address} gave no answer in {HELLO_S:g} s") from None


async def _answer(call: Callable[[rpc.Stub], Awaitable[Any]], stub: rpc.Stub) -> Any:
    """What a call comes to. A channel that closes under it cancels it: that is no cancelling of this task."""
    try:
        return await call(stub)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unreachable(f"the session with {WHO} ended in the middle of a call") from None
    except grpc.aio.UsageError as error:  # the channel was closed already
        raise Unreachable(str(error)) from None
    except grpc.RpcError as error:
        raise _seen_from_here(stub.error(error)) from None
    except HierFLError as error:
        raise _seen_from_here(error) from None


def _seen_from_here(error: HierFLError) -> HierFLError:
    """Trouble on the controller's own side, its disk or a bug, is a reason to try again later, and not ours."""
    its_own = isinstance(error, StorageError | Interrupted | RegionUnreachable) or type(error) is HierFLError
    return Unreachable(str(error)) if its_own else error


def pause_s(tries: int) -> float:
    """Seconds before the next try: doubling, with jitter."""
    longest: float = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(tries, 10))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spread, not secrecy


def _first(errors: BaseExceptionGroup[Any]) -> Any:
    """One error stands for the group: the session ends with the first."""
    found: BaseException = errors
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
