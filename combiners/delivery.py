"""Receipts on their way from an intake to its clients: at once, or along with the next offer where that is near."""

from __future__ import annotations

import time
from collections.abc import Iterable

from combiners.folding import Folding
from combiners.followers import Followers, Session
from combiners.postbox import Postbox
from hierfl.receipts import Receipt
from hierfl.types import ClientRef
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.convert import receipt_to_proto

__all__ = ["Delivery"]

SHORT_ROUND_S = 2.0
"""After a round of at most so long receipts wait for the next offer, to go along with it, ..."""
OFFER_COMES_WITHIN = 1.25
"""... for so many times as long as it took."""


class Delivery:
    """See the module."""

    def __init__(self, followers: Followers) -> None:
        self._followers = followers
        self._postbox = Postbox(self._collect)
        self._wait_s = 0.0

    def attempt_over(self, attempt: Folding) -> None:
        """Settles how long receipts may wait for the next offer, after a round like this one: not at all after a long
        one, or where clients need the last word for their next update.
        """
        seconds = time.monotonic() - attempt.opened_s
        is_near = seconds <= SHORT_ROUND_S and not attempt.plan.task.update_encoding.feedback
        self._wait_s = OFFER_COMES_WITHIN * seconds if is_near else 0.0

    def deliver(self, receipts: Iterable[Receipt]) -> None:
        for receipt in receipts:
            client = receipt.key.client
            if self._wait_s and self._may_wait(client):
                self._postbox.put(receipt, self._wait_s)
            else:
                self._followers.send(client, pb.FollowResponse(receipt=receipt_to_proto(receipt)))

    def complete(self, session: Session, event: pb.FollowResponse) -> pb.FollowResponse | None:
        """An event that is about to be sent, and what waits to go along; none where that makes nothing."""
        receipts = self._postbox.take(session.client) if self._may_wait(session.client) else []
        if not receipts:
            return event if event.HasField("event") else None
        whole = pb.FollowResponse(receipts=receipts)
        whole.MergeFrom(event)
        return whole

    def clear(self) -> None:
        """Keep nothing: clients ask when they are back."""
        self._postbox.clear()

    def _may_wait(self, client: ClientRef) -> bool:
        """Of several streams of one client one is broken, perhaps, and nobody has noticed: all are told, at once."""
        sessions = self._followers.of(client)
        return len(sessions) == 1 and sessions[0].takes_along

    def _collect(self, client: ClientRef) -> None:
        """Nothing came along for what waits: it goes alone; who has left asks when it is back."""
        if self._may_wait(client):
            self._followers.send(client, pb.FollowResponse())
        else:
            for receipt in self._postbox.take(client):
                self._followers.send(client, pb.FollowResponse(receipt=receipt))
