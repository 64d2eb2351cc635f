"""What a client tells its combiner, said until it is heard: a link that is down is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from hierfl import observe
from hierfl.client.held import Held
from hierfl.client.link import Link, Waits
from hierfl.errors import DigestMismatch, RoundClosed, TransferIncomplete, Unreachable
from hierfl.failpoints import reach
from hierfl.receipts import Receipt, ReceiptState
from hierfl.records import UPDATE_CONTEXT, update_statement
from hierfl.types import AttemptKey, UpdateKey
from hierfl.wire import transfer

__all__ = ["TRY_AGAIN", "Courier"]

T = TypeVar("T")

LONGEST_PAUSE_S = 10.0
"""Between two tries of a call while the link is up."""

LATE_TICKET_PAUSE_S = 0.25

TRY_AGAIN = (Unreachable, TransferIncomplete, DigestMismatch)
"""What a better moment may mend."""


class Courier:
    """Calls of one client over its link, each repeated until it is answered or refused for good."""

    def __init__(self, link: Link, say: Callable[[str], None]) -> None:
        self._link = link
        self._say = say

    async def patiently(self, call: Callable[[], Coroutine[Any, Any, T]], what: str) -> T:
        """Call until it succeeds. ``what`` begins the sentence that says why it is tried again.

        Raises:
            HierFLError: It is refused, and trying again would not change that.
        """
        waits = Waits(lambda reason: self._say(f"{what}: {reason}"), LONGEST_PAUSE_S)
        while True:
            await self._link.wait_until_up()
            try:
                return await call()
            except TRY_AGAIN as error:
                await asyncio.sleep(waits.next_pause_s(str(error)))

    async def hand_in(self, held: Held, outgoing: transfer.Outgoing, what: str) -> Receipt:
        """Hand an update in, or learn what became of it."""
        key = UpdateKey(held.key, self._link.client)
        statement = update_statement(key, held.digest, held.head.weight)

        async def send() -> Receipt:
            with observe.span(
                observe.SPAN_UPLOAD,
                run=held.work.run,
                round=held.work.round,
                site=key.client.site,
                client=key.client.client,
                bytes=outgoing.length_bytes,
            ):
                reach("client.send")
                signature = self._link.kit.sign(statement, UPDATE_CONTEXT)  # with the key of this connection
                return await self._send(held, outgoing, signature)

        return await self.patiently(send, f"{what}: the update is not with the combiner yet")

    async def _send(self, held: Held, outgoing: transfer.Outgoing, signature: bytes) -> Receipt:
        while True:
            answer = await self._link.admit(held.key, outgoing, held.head.weight, signature)
            reach("client.answered")
            kind = answer.WhichOneof("answer")
            if kind == "receipt":
                return self._link.receipt(answer.receipt)
            if kind == "ticket":
                try:
                    receipt = await self._link.upload(held.key, outgoing, answer.ticket)
                    reach("client.answered")
                    return receipt
                except RoundClosed:
                    await asyncio.sleep(LATE_TICKET_PAUSE_S)  # or its ticket was too old: asking again tells which
            else:
                await asyncio.sleep(answer.retry_after_ms / 1000)

    async def known(self, key: AttemptKey, what: str) -> Receipt | None:
        """What the combiner has under this key, if anything."""
        receipts = await self.patiently(lambda: self._link.receipts([key]), f"{what}: not begun")
        return next((receipt for receipt in receipts if receipt.state is not ReceiptState.OFFERED), None)

    async def decline(self, key: AttemptKey, code: str, what: str) -> None:
        """Say no with a code, never a text."""
        await self.patiently(lambda: self._link.decline(key, code), f"{what}: not declined yet")
