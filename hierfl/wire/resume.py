"""Uploads that are on their way or were cut: who comes back in time with the same one goes on where it broke off.

A sender that can go on says so, by the digest of what it sends (``rpc.RESUME``). What a cut upload has brought, each
chunk checked, is kept for ``keep_s`` seconds under (who, digest). Of two streams of one transfer the newer wins: the
older is stopped, and has ended, before the newer takes over what it brought.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hierfl.errors import TransferIncomplete, WireError
from hierfl.wire import rpc
from hierfl.wire.transfer import Incoming

__all__ = ["KEEP_S", "Unfinished"]

K = TypeVar("K", bound=Hashable)

KEEP_S = 30.0
"""As long as a transfer may be silent: a link that is gone is noticed within that."""

Release = Callable[[], None]


@dataclass(eq=False)
class _Transfer:
    """One upload: its stream, or what is left of it since that was cut."""

    incoming: Incoming
    release: Release
    stream: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    """Runs while it is kept."""
    is_replaced: bool = False

    @property
    def num_bytes(self) -> int:
        return len(self.incoming.header.descriptor) + self.incoming.num_bytes

    def stop(self) -> None:
        """A newer stream takes its place."""
        self.is_replaced = True
        if self.timer is not None:
            self.timer.cancel()
        if self.stream is not None:
            self.stream.cancel()

    def let_go(self) -> None:
        """Release what it holds, once."""
        release, self.release = self.release, _nothing
        release()


class Unfinished(Generic[K]):
    """See the module. One event loop's; ``K`` says who sends what, such as an update's key."""

    def __init__(self, keep_s: float = KEEP_S, max_bytes: int = 2**30) -> None:
        """
        Args:
            keep_s: How long a cut upload is kept.
            max_bytes: Of all that are kept: the oldest go first; one that is larger than that is kept alone.
        """
        self._keep_s, self.max_bytes = keep_s, max_bytes
        self._transfers: dict[tuple[K, str], _Transfer] = {}
        self._is_closed = False

    def __len__(self) -> int:
        """Cut uploads that are kept."""
        return len(self._kept())

    async def receive(
        self,
        who: K,
        call: rpc.Frames,
        incoming: Incoming,
        frames: AsyncIterable[bytes] | None = None,
        *,
        silence_s: float = rpc.SILENCE_S,
        hold: Callable[[], Release] = lambda: _nothing,
        through: rpc.Receiver | None = None,
    ) -> None:
        """Receive the rest of an upload whose header ``incoming`` has; what there is of it already is taken over.

        Args:
            who: Whose upload of what it is.
            call: Where its frames come from.
            frames: The same frames, where somebody looks at them on their way.
            silence_s: Longest wait for the next frame.
            hold: Called for an upload that may go on later; what it returns, once nothing is kept of that.
            through: What is fed in the place of ``incoming``, and feeds it; it finds there what was taken over.
        Raises:
            TransferIncomplete: It was cut, or a newer stream has taken its place.
            WireError: As ``rpc.frames_of``; nothing is kept then.
        """
        stream = call if frames is None else frames
        if not call.resumes:
            await rpc.frames_of(stream, through or incoming, silence_s)
            return
        key = (who, call.resumes)
        earlier, mine = self._transfers.get(key), _Transfer(incoming, hold())
        self._transfers[key] = mine
        if earlier is not None:
            earlier.stop()
        mine.stream = asyncio.ensure_future(_go_on(call, stream, mine, earlier, silence_s, through or incoming))
        try:
            await mine.stream
        except WireError as error:
            self._end(key, mine, keep=isinstance(error, TransferIncomplete))
            raise
        except BaseException:
            self._end(key, mine, keep=True)
            if mine.is_replaced and mine.stream.cancelled() and not _is_cancelled():
                raise TransferIncomplete("transfer: a newer stream of it has taken over") from None
            raise
        else:
            self._end(key, mine, keep=False)
        finally:
            if earlier is not None:
                earlier.let_go()  # done already, but for a stream that ended before it began

    def drop(self, is_over: Callable[[K], bool]) -> None:
        """Keep nothing of these any more; a stream that is on its way may end."""
        for key, transfer in list(self._transfers.items()):
            if is_over(key[0]):
                self._forget(key, transfer)

    def close(self) -> None:
        """Keep nothing any more, of anybody."""
        self._is_closed = True
        self.drop(lambda _: True)

    def _end(self, key: tuple[K, str], transfer: _Transfer, *, keep: bool) -> None:
        """Its stream has ended. One that was replaced or dropped meanwhile is in other hands."""
        if self._transfers.get(key) is not transfer:
            return
        if not keep or self._is_closed or not transfer.incoming.num_taken:
            self._forget(key, transfer)
            return
        self._transfers[key] = self._transfers.pop(key)  # the newest last
        transfer.timer = asyncio.get_running_loop().call_later(self._keep_s, self._forget, key, transfer)
        self._make_room()

    def _kept(self) -> list[tuple[tuple[K, str], _Transfer]]:
        return [(key, transfer) for key, transfer in self._transfers.items() if transfer.timer is not None]

    def _make_room(self) -> None:
        kept = self._kept()
        num_bytes = sum(transfer.num_bytes for _, transfer in kept)
        for key, transfer in kept[:-1]:
            if num_bytes <= self.max_bytes:
                return
            num_bytes -= transfer.num_bytes
            self._forget(key, transfer)

    def _forget(self, key: tuple[K, str], transfer: _Transfer) -> None:
        if self._transfers.get(key) is transfer:
            del self._transfers[key]
            if transfer.timer is not None:
                transfer.timer.cancel()
            transfer.let_go()


async def _go_on(
    call: rpc.Frames,
    stream: AsyncIterable[bytes],
    mine: _Transfer,
    earlier: _Transfer | None,
    silence_s: float,
    receiver: rpc.Receiver,
) -> None:
    if earlier is not None:
        if earlier.stream is not None:
            await asyncio.wait({earlier.stream})
        call.go_on_from(mine.incoming.go_on_from(earlier.incoming))
        earlier.let_go()
    await rpc.frames_of(stream, receiver, silence_s)


def _is_cancelled() -> bool:
    """Whether it is this task that ends, and not one that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _nothing() -> None:
    """Nothing is held."""
