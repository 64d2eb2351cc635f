"""The tables of the controller's store: which rows they hold under which keys, and how they are read. No I/O.

A store finds the rows of a table whose keys begin alike (``Tables._rows``); everything that is asked of it is that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeVar

from controller.rows import AnswerRow, AttemptRow, ModelRow, RegionRow, RoundRow, Row, RunRow
from hierfl import documents
from hierfl.errors import StoreDamaged, WireError
from hierfl.types import AttemptKey, RunId, TaskKind

__all__ = ["TABLES", "WRITTEN_ONCE", "Tables", "decoded", "key_of", "key_path"]

R = TypeVar("R")
WRITTEN_ONCE = (AnswerRow, ModelRow, RoundRow)

TABLES: dict[type, str] = {
    RunRow: "runs",
    AttemptRow: "attempts",
    AnswerRow: "answers",
    ModelRow: "models",
    RoundRow: "rounds",
    RegionRow: "regions",
}


def key_of(row: Row) -> str:
    """Key of a row: its identity, so ordered that rows of one run, round or attempt stand together."""
    match row:
        case RunRow():
            return row.run
        case AttemptRow():
            return key_path(row.run, row.task, row.round, row.attempt)
        case AnswerRow():
            return key_path(row.run, row.task, row.round, row.attempt, row.region)
        case ModelRow():
            return key_path(row.run, row.version)
        case RoundRow():
            return key_path(row.run, row.task, row.round)
        case RegionRow():
            return row.region


def key_path(*parts: str | int) -> str:
    """Parts joined by ``/``, numbers padded so that their order as text is their order."""
    return "/".join(f"{part:010d}" if isinstance(part, int) else part for part in parts)


class Tables(ABC):
    """The reading half of a ``Store``, whose docstrings say what each method gives."""

    @abstractmethod
    def _rows(self, kind: type[R], prefix: str = "") -> list[R]:
        """The rows of a kind whose keys begin with ``prefix``, in the order of their keys."""

    def runs(self) -> list[RunRow]:
        return sorted(self._rows(RunRow), key=lambda row: (row.submitted_unix_ns, row.run))

    def attempts(self, run: RunId, task: TaskKind, round_number: int) -> list[AttemptRow]:
        return self._rows(AttemptRow, key_path(run, task, round_number, ""))

    def answers(self, key: AttemptKey) -> list[AnswerRow]:
        return self._rows(AnswerRow, key_path(key.run, key.task, key.round, key.attempt, ""))

    def rounds(self, run: RunId) -> list[RoundRow]:
        return sorted(self._rows(RoundRow, key_path(run, "")), key=lambda row: row.round)

    def models(self, run: RunId) -> list[ModelRow]:
        return self._rows(ModelRow, key_path(run, ""))

    def model(self, run: RunId, version: int) -> ModelRow | None:
        return next(iter(self._rows(ModelRow, key_path(run, version))), None)

    def regions(self) -> list[RegionRow]:
        return self._rows(RegionRow)


def decoded(stored: Iterable[bytes], kind: type[R], where: object) -> list[R]:
    """Rows of a table as they are stored.

    Args:
        where: The store, as errors name it.
    Raises:
        StoreDamaged: One of them is no such row.
    """
    try:
        return [documents.decode(document, kind, TABLES[kind]) for document in stored]
    except WireError as error:
        raise StoreDamaged(f"{where}: {error}") from None
