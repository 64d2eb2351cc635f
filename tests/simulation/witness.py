"""What a witness outside of the product has seen: every update made, every word told to a client, every release."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from combiners.sealed import Sealed
from combiners.uplink import Uplink
from hierfl.client.held import Held, HeldUpdates
from hierfl.client.link import Link
from hierfl.receipts import Receipt
from hierfl.types import AttemptKey, ClientRef
from tests.simulation.loop import current

__all__ = ["Made", "Sent", "Witness"]


@dataclass(frozen=True)
class Made:
    """One update, as its site holds it."""

    by: str
    values: np.ndarray
    """What it changes, shape ``(num_values,)``, float32."""
    weight: int


@dataclass(frozen=True)
class Sent:
    """Sealed bytes that a region began to send."""

    region: str
    key: AttemptKey
    digest: str
    base_model_hash: str
    task_hash: str


@dataclass
class Witness:
    made: dict[str, Made] = field(default_factory=dict)
    """By the update's digest."""
    told: set[Receipt] = field(default_factory=set)
    """Every receipt that reached a client."""
    sent: set[Sent] = field(default_factory=set)
    twins: set[ClientRef] = field(default_factory=set)
    """Clients of which there are two processes, with other data."""
    lies: list[str] = field(default_factory=list)
    """Words that were not on record at the moment at which they were heard."""
    look: Callable[[Receipt], str] = lambda told: ""
    """What is wrong with a word, by what is durable now; empty where nothing is."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(HeldUpdates, "save", self._save(HeldUpdates.save)))
            stack.enter_context(mock.patch.object(Link, "receipt", self._receipt(Link.receipt)))
            stack.enter_context(mock.patch.object(Uplink, "send", self._send(Uplink.send)))
            yield

    def _save(self, save: Any) -> Any:
        def saved(updates: HeldUpdates, held: Held, vectors: Mapping[str, np.ndarray], left_out: Any = None) -> None:
            self.made[held.digest] = Made(current().name, vectors["train"].copy(), held.head.weight)
            save(updates, held, vectors, left_out)

        return saved

    def _receipt(self, receipt: Any) -> Any:
        def received(link: Link, message: Any) -> Receipt:
            made: Receipt = receipt(link, message)
            if made not in self.told:
                self.told.add(made)
                if wrong := self.look(made):
                    self.lies.append(wrong)
            return made

        return received

    def _send(self, send: Any) -> Any:
        async def sent(uplink: Uplink, sealed: Sealed, key: AttemptKey, ledger_head: str) -> Any:
            head = sealed.head
            self.sent.add(Sent(head.region, key, sealed.digest, head.base_model_hash, head.task_hash))
            return await send(uplink, sealed, key, ledger_head)

        return sent
