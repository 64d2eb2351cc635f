"""What is sealed, committed and signed: the documents behind promises 1 to 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hierfl import documents
from hierfl.aggregation import ColumnGroup
from hierfl.types import ModelHash, RegionId, RunId, UpdateKey

__all__ = [
    "COMMIT_CONTEXT",
    "LEDGER_HEAD_CONTEXT",
    "UPDATE_CONTEXT",
    "CommitRecord",
    "CountedPartial",
    "PartialHead",
    "UpdateHead",
    "update_leaf",
    "update_statement",
]

UPDATE_CONTEXT = b"hierfl.update/1"
COMMIT_CONTEXT = b"hierfl.commit/1"
LEDGER_HEAD_CONTEXT = b"hierfl.ledger-head/1"


@dataclass(frozen=True, kw_only=True)
class UpdateHead:
    """Travels in the descriptor of an update's transfer, so its digest covers it."""

    weight: int
    """Aggregation weight in the plan's units, from 1 to the plan's cap."""
    metrics: Mapping[str, int]
    """Quantised sums by the plan's metric names (``hierfl/metrics.py``)."""
    base_model_hash: ModelHash
    task_hash: str


@dataclass(frozen=True, kw_only=True)
class PartialHead:
    """Travels in the descriptor of a partial's transfer. Says nothing of any single site.

    It carries no attempt: the same sealed bytes may be re-addressed to a later attempt, or to another run.
    """

    region: RegionId
    run: RunId
    """The run whose updates these are: their receipts name it, also where another run counts the sum."""
    base_model_hash: ModelHash
    task_hash: str
    groups: tuple[ColumnGroup, ...]
    weight: int
    num_sites: int
    num_updates: int
    metrics: Mapping[str, int]
    """Exact sums of the quantised metrics."""
    region_epoch: int
    seal_id: str
    drop_bits: int = 0
    """How far its sums are rounded (``hierfl/rounding.py``); 0: exact."""
    carried: str = ""
    """Digest of what rounding in earlier rounds left over, which is in these sums; empty where nothing is."""
    left_over: str = ""
    """Digest of what rounding leaves over this time; both stay in the region. Empty where nothing is kept of it."""


@dataclass(frozen=True, kw_only=True)
class CountedPartial:
    """One region's part of a committed model."""

    region: RegionId
    digest: str
    """Of the partial's transfer, ``alg:hex``."""
    weight: int
    num_sites: int
    num_updates: int


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """One committed model version: signed, created exclusively, never changed."""

    federation: str
    run: RunId
    round: int
    attempt: int
    version: int
    model_hash: ModelHash
    layout_hash: str
    previous_hash: ModelHash
    """Model hash of the version before: the chain."""
    leader_epoch: int
    strategy: str
    exact_in_two_tiers: bool
    """Whether its bits do not depend on the grouping into regions; else it is approximate across regions."""
    partials: tuple[CountedPartial, ...]
    weight: int
    metrics: Mapping[str, int]
    state_digest: str
    """Of the strategy's state blob, ``sha256:hex``; empty where it keeps none."""
    committed_unix_ns: int
    updates: str = "float32"
    """How they travelled: the name of their encoding."""
    model_digest: str = ""
    """Of the transfer that the controller makes of the model."""
    partial_encoding: str = "packed"
    """How the regions' sums travelled: ``rounded-20`` says that each was rounded to a multiple of 2**20."""


def update_statement(key: UpdateKey, digest: str, weight: int) -> bytes:
    """What a client signs (context ``UPDATE_CONTEXT``) when it hands an update in, and an auditor checks.

    JSON: ``{"digest":...,"key":{"attempt":{"attempt","round","run","task"},"client":{"client","region","site"}},
    "weight":...}``.
    """
    return documents.encode({"digest": digest, "key": key, "weight": weight})


def update_leaf(key: UpdateKey, digest: str, weight: int, signature: bytes) -> bytes:
    """An update in the Merkle tree of its seal: what its client signed, then the signature."""
    return update_statement(key, digest, weight) + signature
