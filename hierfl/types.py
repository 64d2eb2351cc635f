"""The words of hierfl as types: names, keys, kinds.

Identities are made from certificates only (``hierfl/pki.py``); a name in a message proves nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

import numpy as np
import numpy.typing as npt

__all__ = [
    "NAME_PATTERN",
    "AttemptKey",
    "ClientId",
    "ClientRef",
    "Float32Array",
    "Float64Array",
    "Int64Array",
    "ModelHash",
    "Params",
    "RegionId",
    "RunId",
    "SiteId",
    "TaskKind",
    "UpdateKey",
]

RegionId = NewType("RegionId", str)
SiteId = NewType("SiteId", str)
ClientId = NewType("ClientId", str)
RunId = NewType("RunId", str)
ModelHash = NewType("ModelHash", str)
"""SHA-256 of a model, 64 lower-case hex digits (``hierfl/layout.py``)."""

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Params = Mapping[str, np.ndarray]
"""A model as named arrays, in the layout's order where order matters."""

NAME_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
"""Names of federations, regions, sites, clients and operators: one DNS label (RFC 1123), lower case."""


class TaskKind(StrEnum):
    """What a round asks of its clients."""

    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True, order=True)
class AttemptKey:
    """One attempt at one round of one run. ``round`` and ``attempt`` count from 1."""

    run: RunId
    task: TaskKind
    round: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.run}/{self.task}/{self.round}.{self.attempt}"

    def of_same_round(self, other: AttemptKey) -> bool:
        """Whether both are attempts at one round."""
        return (self.run, self.task, self.round) == (other.run, other.task, other.round)


@dataclass(frozen=True, order=True)
class ClientRef:
    """A client as its certificate names it. Never leaves its region."""

    region: RegionId
    site: SiteId
    client: ClientId

    def __str__(self) -> str:
        return f"{self.region}/{self.site}/{self.client}"


@dataclass(frozen=True, order=True)
class UpdateKey:
    """Identity of one update: whose, and for which attempt. The idempotency key of an upload."""

    attempt: AttemptKey
    client: ClientRef

    def __str__(self) -> str:
        return f"{self.attempt}@{self.client}"
