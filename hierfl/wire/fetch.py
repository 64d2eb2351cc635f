"""Models by their hash: both ends of ``FetchModel``, which goes on where it broke off.

A caller that was cut says how many chunks it has, and of which descriptor. A server whose transfer has the same
descriptor sends its header, says from which chunk it goes on, and leaves those before it out; any other sends all.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable
from itertools import chain, islice
from typing import Any

import grpc

from hierfl.errors import TransferIncomplete, WireError
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc
from hierfl.wire.header import continues, join_header, read_descriptor, read_header
from hierfl.wire.models import check_model
from hierfl.wire.transfer import Expect, Incoming

__all__ = ["Fetcher", "fetch_model", "model_frames"]


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

    async def fetch(self, stub: rpc.Stub, model_hash: str, expect: Expect) -> Incoming:
        """The model, checked to be this one. Called again after a cut, it asks for the rest.

        Args:
            stub: Of a service with ``FetchModel``.
            model_hash: 64 hex digits.
            expect: What to take; kind "model".
        Raises:
            WireError: What came does not fit, or is another model.
            HierFLError: What ``from_rpc_error`` makes of a call that failed.
        """
        call = stub.FetchModel(_request(model_hash, self._cut))
        try:
            incoming = await self._receive(call, expect)
        except grpc.RpcError as error:
            raise stub.error(error) from None
        except TransferIncomplete:
            raise
        except WireError:
            self._cut = None  # what is here may be what is wrong
            raise
        finally:
            call.cancel()  # harmless once it has ended
        self._cut = None
        if incoming.digest != expect.vouched:
            await asyncio.to_thread(check_model, incoming, model_hash)
        return incoming

    async def _receive(self, call: Any, expect: Expect) -> Incoming:
        incoming, cut = Incoming(expect, keeps_frames=self._keeps_frames), self._cut
        incoming.feed(await rpc.first_frame(call, self._silence_s))
        there = rpc.chunks_there(await call.initial_metadata())
        if there and (cut is None or incoming.go_on_from(cut) != there):
            raise WireError(f"transfer: the server goes on from chunk {there}, which is not where it broke off")
        self._cut = incoming
        await rpc.frames_of(call, incoming, self._silence_s)
        return incoming


def _request(model_hash: str, cut: Incoming | None) -> pb.FetchModelRequest:
    if cut is None or not cut.num_taken:
        return pb.FetchModelRequest(model_hash=model_hash)
    return pb.FetchModelRequest(
        model_hash=model_hash,
        from_chunk=cut.num_taken,
        descriptor_digest=_digest_of(cut.header.descriptor),
    )


async def fetch_model(
    stub: rpc.Stub, model_hash: str, expect: Expect, silence_s: float = rpc.SILENCE_S, *, keeps_frames: bool = True
) -> Incoming:
    """Fetch a model in one call; see ``Fetcher``."""
    return await Fetcher(silence_s, keeps_frames=keeps_frames).fetch(stub, model_hash, expect)


async def model_frames(frames: Iterable[bytes], request: pb.FetchModelRequest, context: Any) -> AsyncIterator[bytes]:
    """The frames of a model's transfer as ``FetchModel`` yields them: without the chunks that the caller has."""
    rest = iter(frames)
    head = list(_header_of(rest))
    there = await asyncio.to_thread(_chunks_there, head, request) if request.from_chunk else 0
    if there:
        await context.send_initial_metadata(((rpc.FROM_CHUNK, str(there)),))
    for frame in chain(head, islice(rest, there, None)):
        yield frame


def _header_of(frames: Iterable[bytes]) -> Iterable[bytes]:
    for frame in frames:
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
