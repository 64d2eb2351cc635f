"""The sum over the partials of one attempt, made while others still arrive.

What it counts is what a caller says in the end: a partial that was added and is not to be counted makes it begin
again from the blobs, and so does whatever failed. Integers: the bits are the same either way.

Where the regions rounded their sums, they are added as they came, and brought back to the units of exact ones at the
end: all partials of an attempt are rounded alike.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence

from controller.rows import AnswerRow
from hierfl.aggregation import Accumulator, ColumnGroup, PartialAggregate
from hierfl.errors import StoreDamaged
from hierfl.feedback import restored
from hierfl.packing import PackedSums

__all__ = ["RunningSum"]

logger = logging.getLogger(__name__)

Read = Callable[[str, tuple[ColumnGroup, ...]], PackedSums]
"""A stored partial by its blob's name and its groups."""


class RunningSum:
    """See the module. Safe between threads."""

    def __init__(self, groups: tuple[ColumnGroup, ...]) -> None:
        self._groups = groups
        self._working = threading.Lock()
        self._waiting: list[tuple[AnswerRow, PackedSums]] = []
        self._total: Accumulator | None = None
        self._added: dict[str, int] = {}
        """Sites by digest of what is in the total."""

    def begin(self, answer: AnswerRow, packed: PackedSums) -> None:
        """Add a partial that is durable, in a thread of the running loop's; ``packed`` is its blob's contents."""
        self._waiting.append((answer, packed))
        asyncio.get_running_loop().run_in_executor(None, self._work)

    def _work(self) -> None:
        with self._working:
            try:
                self._add_waiting()
            except Exception:
                logger.exception("a partial could not be added before its time; it is read again at the end")
                self._forget()

    def total(self, answers: Sequence[AnswerRow], read: Read) -> PartialAggregate:
        """The sum over exactly these; afterwards this one is as new.

        Raises:
            StoreDamaged: One of them has no partial, or ``read`` raised it.
            ValueOutOfRange: A total that could overflow.
        """
        with self._working:
            try:
                self._add_waiting()
                if set(self._added) - {answer.digest for answer in answers}:
                    self._forget()
                for answer in answers:
                    if answer.digest not in self._added:
                        self._add(answer, read(_partial(answer).blob, self._groups))
                total = self._open().partial(sum(self._added.values()))
                return restored(total, _drop_bits(answers), len(answers))
            finally:
                self._forget()

    def _add_waiting(self) -> None:
        while self._waiting:
            self._add(*self._waiting.pop(0))

    def _add(self, answer: AnswerRow, packed: PackedSums) -> None:
        head = _partial(answer).head
        assert head is not None, "it is a partial"
        self._open().add_packed(packed, head.weight, head.num_updates, head.metrics)
        self._added[answer.digest] = head.num_sites

    def _open(self) -> Accumulator:
        if self._total is None:
            self._total = Accumulator(self._groups)
        return self._total

    def _forget(self) -> None:
        self._waiting.clear()
        self._total, self._added = None, {}


def _drop_bits(answers: Sequence[AnswerRow]) -> int:
    return next((answer.head.drop_bits for answer in answers if answer.head is not None), 0)


def _partial(answer: AnswerRow) -> AnswerRow:
    if answer.head is None:
        raise StoreDamaged(f"region {answer.region} has no partial in {answer.key}")
    return answer
