"""The controller's store in memory, for several controllers at once: what a store on another machine looks like.

The same protocol as ``SqliteStore``, and the same answers (a property test holds both against each other).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from controller.rows import Row
from controller.tables import WRITTEN_ONCE, Tables, key_of
from hierfl.errors import StaleEpoch, StoreDamaged
from tests.simulation.loop import NODE

__all__ = ["Memory", "MemoryStore"]


@dataclass
class Memory:
    """What is stored; outlives every controller."""

    store_id: str = "memory"
    leader_epoch: int = 0
    rows: dict[type, dict[str, Row]] = field(default_factory=dict)


class MemoryStore(Tables):
    """One controller's way to it. A lead holds until another one takes it: frozen leaders are replaced by force."""

    lease_s = None

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.store_id = memory.store_id

    def lead(self, at_least: int = 0, *, name: str = "", under: int | None = None) -> int:
        _touch()
        if under is not None and under != self._memory.leader_epoch:
            raise StaleEpoch(f"epoch {self._memory.leader_epoch} has come after {under}")
        self._memory.leader_epoch = max(self._memory.leader_epoch, at_least) + 1
        _touch()
        return self._memory.leader_epoch

    def renew(self, epoch: int) -> None:
        if epoch != self._memory.leader_epoch:
            raise StaleEpoch(f"epoch {self._memory.leader_epoch} has come after {epoch}")

    def write(self, epoch: int, *rows: Row) -> None:
        _touch()
        memory = self._memory
        if memory.leader_epoch != epoch:
            raise StaleEpoch(f"this controller leads under epoch {epoch}, the store is under {memory.leader_epoch}")
        after = {kind: dict(of) for kind, of in memory.rows.items()}
        for row in rows:
            table, key = after.setdefault(type(row), {}), key_of(row)
            if isinstance(row, WRITTEN_ONCE) and table.get(key, row) != row:
                raise StoreDamaged(f"{key} is there already, with other contents")
            table[key] = row
        memory.rows = after
        _touch()

    def _rows(self, kind: type, prefix: str = "") -> list:
        rows = self._memory.rows.get(kind, {})
        return [rows[key] for key in sorted(rows) if key.startswith(prefix)]

    def close(self) -> None:
        """Nothing is open."""


def _touch() -> None:
    node = NODE.get(None)
    if node is not None:
        node.touch_disk()
