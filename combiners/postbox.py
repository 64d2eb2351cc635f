"""Receipts that wait at an intake to go along with their client's next event.

A message of its own costs as much as all else that a small round costs a client; the next round's offer is near
where rounds are short. A later receipt of the same update takes the place of one that still waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hierfl.receipts import Receipt
from hierfl.types import AttemptKey, ClientRef
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.convert import receipt_to_proto

__all__ = ["Postbox"]

LAST_WORDS = (pb.RECEIPT_STATE_COMMITTED, pb.RECEIPT_STATE_NOT_COUNTED)


class Postbox:
    """See the module. What nothing came along for is collected by ``collect``, for each client."""

    def __init__(self, collect: Callable[[ClientRef], None]) -> None:
        self._collect = collect
        self._waiting: dict[ClientRef, dict[AttemptKey, pb.Receipt]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def put(self, receipt: Receipt, within_s: float) -> None:
        """Keep a receipt for ``take``; it is collected in at most about so many seconds."""
        key, waiting = receipt.key, self._waiting.setdefault(receipt.key.client, {})
        earlier = waiting.get(key.attempt)
        if earlier is None or earlier.state not in LAST_WORDS:  # a late copy of an acknowledgement takes nothing away
            waiting[key.attempt] = receipt_to_proto(receipt)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(within_s, self._empty)

    def take(self, client: ClientRef) -> list[pb.Receipt]:
        """What waits for this client, in the order of its attempts; it waits no more."""
        return list(self._waiting.pop(client, {}).values())

    def clear(self) -> None:
        """Keep nothing: clients ask when they are back."""
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _empty(self) -> None:
        self._timer = None
        for client in list(self._waiting):
            self._collect(client)
