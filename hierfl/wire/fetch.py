"""Models by their hash: both ends of ``FetchModel``, which goes on where it broke off.

A caller that was cut says how many chunks it has, and of which descriptor. A server whose transfer has the same
descriptor sends its header, says from which chunk it goes on, and leaves those before it out; any other sends all.

A caller names the models that it has; the answer may then be a difference to one of them (``delta.py``), as its header
says. What that makes has to be the model that was asked for, else it is fetched whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import grpc
import numpy as np

from hierfl.errors import TransferIncomplete, WireError
from hierfl.layout import Layout
from hierfl.types import Float32Array
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc
from hierfl.wire.delta import DELTA, Bases, Difference
from hierfl.wire.header import continues, join_header, read_descriptor, read_header
from hierfl.wire.models import check_model, layout_of
from hierfl.wire.transfer import Expect, Frame, Incoming, Outgoing

__all__ = ["MAX_BASES", "Fetched", "Fetcher", "fetch_model", "model_frames"]

logger = logging.getLogger(__name__)

MAX_BASES = 4
"""More are not looked at."""


@dataclass(frozen=True)
class Fetched:
    """A model that came, and was checked. ``base``, ``made`` and ``whole`` where it came as a difference."""

    incoming: Incoming
    """As it came."""
    base: str = ""
    made: Mapping[str, np.ndarray] | None = None
    whole: Outgoing | None = None

    @property
    def layout(self) -> Layout:
        if self.whole is not None:
            return Layout.from_bytes(self.whole.descriptor.meta.encode())
        return layout_of(self.incoming)

    def vectors(self) -> dict[str, Float32Array]:
        """The whole vectors, each of shape ``(num_values,)``; copies where it came whole and its frames are kept."""
        return self.incoming.vectors() if self.made is None else dict(self.made)

    def frames(self) -> Iterator[bytes]:
        """The frames of its whole transfer, to pass it on."""
        return (self.whole or Outgoing.of(self.incoming)).frames()


class Fetcher:
    """Fetches a model, over as many calls as it takes; holds what has come of it meanwhile."""

    def __init__(self, silence_s: float = rpc.SILENCE_S, *, keeps_frames: bool = True) -> None:
        """
        Args:
            silence_s: Longest wait for the next frame.
            keeps_frames: Whether to keep them, to pass the model on (``Incoming``).
        """
        self._silence_s, self._keeps_frames = silence_s, keeps_frames
        self._cut: Incoming | None = None
        self._takes_difference = True

    async def fetch(self, stub: rpc.Stub, model_hash: str, expect: Expect, bases: Bases | None = None) -> Fetched:
        """The model, checked to be this one. Called again after a cut, it asks for the rest.

        Args:
            stub: Of a service with ``FetchModel``.
            model_hash: 64 hex digits.
            expect: What to take; kind "model".
            bases: Models that are here: a difference to one of them is taken too. One that turns out wrong is logged,
                and the model fetched whole.
        Raises:
            WireError: What came does not fit, or is another model.
            HierFLError: What ``from_rpc_error`` makes of a call that failed.
        """
        arriving = _Arriving(expect, bases if bases and self._takes_difference else {}, self._keeps_frames)
        call = stub.FetchModel(_request(model_hash, self._cut, arriving.bases))
        try:
            await self._receive(call, arriving)
            fetched = await arriving.checked(model_hash)
            self._cut = None
            return fetched
        except grpc.RpcError as error:
            raise stub.error(error) from None
        except TransferIncomplete:
            raise
        except WireError as error:
            self._cut = None  # what is here may be what is wrong
            if not arriving.is_difference:
                raise
            logger.warning("a model came as a difference and is fetched whole: %s", error)
            self._takes_difference = False
        finally:
            call.cancel()  # harmless once it has ended
        return await self.fetch(stub, model_hash, expect)

    async def _receive(self, call: Any, arriving: _Arriving) -> None:
        cut = self._cut
        incoming = arriving.begin(await rpc.first_frame(call, self._silence_s))
        there = rpc.chunks_there(await call.initial_metadata())
        if there and (cut is None or incoming.go_on_from(cut) != there):
            raise WireError(f"transfer: the server goes on from chunk {there}, which is not where it broke off")
        self._cut = incoming
        await rpc.frames_of(call, incoming, self._silence_s)


class _Arriving:
    """One answer: a whole model, or a difference; its header says which."""

    def __init__(self, expect: Expect, bases: Bases, keeps_frames: bool) -> None:
        self.bases = dict(islice(bases.items(), MAX_BASES))
        self.is_difference = False
        self._difference: Difference | None = None
        self._expect, self._keeps_frames = expect, keeps_frames

    def begin(self, header: bytes) -> Incoming:
        """Take the header. Raises ``WireError`` where it does not fit."""
        expect, keeps_frames = self._expect, self._keeps_frames
        if self.bases:
            descriptor = read_descriptor(read_header(header).descriptor)
            if descriptor.encoding == DELTA:
                self.is_difference = keeps_frames = True
                self._difference = Difference(descriptor, self.bases)
                expect = self._difference.expect(expect)
        self.incoming = Incoming(expect, keeps_frames=keeps_frames)
        self.incoming.feed(header)
        return self.incoming

    async def checked(self, model_hash: str) -> Fetched:
        """The model, once all is there. Raises ``WireError`` where it is another."""
        incoming, vouched = self.incoming, self._expect.vouched
        if self._difference is None:
            if incoming.digest != vouched:
                await asyncio.to_thread(check_model, incoming, model_hash)
            return Fetched(incoming)
        vectors, whole = await asyncio.to_thread(self._difference.model, incoming, model_hash, vouched)
        return Fetched(incoming, self._difference.base_hash, vectors, whole)


def _request(model_hash: str, cut: Incoming | None, bases: Iterable[str]) -> pb.FetchModelRequest:
    request = pb.FetchModelRequest(model_hash=model_hash, bases=bases)
    if cut is not None and cut.num_taken:
        request.from_chunk, request.descriptor_digest = cut.num_taken, _digest_of(cut.header.descriptor)
    return request


async def fetch_model(
    stub: rpc.Stub, model_hash: str, expect: Expect, silence_s: float = rpc.SILENCE_S, *, keeps_frames: bool = True
) -> Incoming:
    """Fetch a model whole, in one call; see ``Fetcher``."""
    return (await Fetcher(silence_s, keeps_frames=keeps_frames).fetch(stub, model_hash, expect)).incoming


async def model_frames(
    frames: Iterable[Frame], request: pb.FetchModelRequest, context: Any, *, beside: bool = False
) -> AsyncIterator[bytes]:
    """The frames of a model's transfer as ``FetchModel`` yields them: without the chunks that the caller has.

    ``beside``: make each in a thread, where that may have to read from a disk.
    """
    rest = iter(frames)
    head = list(_header_of(rest))
    there = await asyncio.to_thread(_chunks_there, head, request) if request.from_chunk else 0
    if there:
        await context.send_initial_metadata(((rpc.FROM_CHUNK, str(there)),))
    for frame in head:
        yield frame
    rest = islice(rest, there, None)
    while (following := await asyncio.to_thread(next, rest, None) if beside else next(rest, None)) is not None:
        yield bytes(following)


def _header_of(frames: Iterable[Frame]) -> Iterable[bytes]:
    for frame in map(bytes, frames):
        yield frame
        if not continues(frame):
            return


def _chunks_there(head: list[bytes], request: pb.FetchModelRequest) -> int:
    """How many of a transfer's chunks the caller has: none of another transfer's."""
    header = b""
    for frame in head:
        header = join_header(header, frame)
    text = read_header(header).descriptor
    if _digest_of(text) != request.descriptor_digest:
        return 0
    wanted: int = request.from_chunk
    return wanted if wanted <= read_descriptor(text).num_chunks else 0


def _digest_of(descriptor: str) -> str:
    return f"sha256:{hashlib.sha256(descriptor.encode()).hexdigest()}"
