"""A plan: what the controller asks of one region in one attempt at a round, signed over its exact bytes.

The region and its clients obey what they can check: the signature, the base model's hash, the layout's
hash, the task's hash, the caps. They add their own rules (``k``, policy) and never take some away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hierfl import documents, encodings, rounding
from hierfl.aggregation import ColumnGroup
from hierfl.encodings import Encoding, EncodingSpec
from hierfl.errors import ConfigError, RequirementUnknown, WireError
from hierfl.metrics import MetricSpec
from hierfl.types import AttemptKey, ClientRef, ModelHash, RegionId, RunId, TaskKind

__all__ = [
    "DECLINE_CODES",
    "PLAN_CONTEXT",
    "SUPPORTED_REQUIREMENTS",
    "Caps",
    "ModelRef",
    "Plan",
    "TaskSpec",
    "plan_statement",
    "task_seed",
]

PLAN_CONTEXT = b"hierfl.plan/1"
"""Domain of a plan's signature (``pki.sign``)."""

SUPPORTED_REQUIREMENTS: frozenset[str] = frozenset()
"""What a plan may require beyond this file. Empty in protocol version 1."""

DECLINE_CODES = frozenset(
    {
        "declined",
        "policy",
        "train_error",
        "evaluate_error",
        "out_of_memory",
        "layout_mismatch",
        "out_of_range",
        "app_unknown",
        "requirement_unknown",
        "storage",
        "stopping",
    }
)
"""All that a site says about why it did not answer; text and traceback stay there."""


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """The model a round starts from."""

    version: int
    model_hash: ModelHash
    layout_hash: str
    size_bytes: int
    digest: str = ""
    """Of the transfer that the controller makes of it, where it is known: what comes with it needs no other check."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What is asked, without run, seed, round or attempt: equal tasks on equal bases are one release."""

    kind: TaskKind
    app: str
    app_version: str
    config: Mapping[str, Any]
    client_part: Mapping[str, float]
    """The strategy's part at the client, such as ``proximal_mu``."""
    groups: tuple[ColumnGroup, ...]
    """Vectors of an update, in order; empty for an evaluation."""
    metrics: tuple[MetricSpec, ...]
    evaluate: bool
    """Whether clients that can also evaluate the base model and send the sums along."""
    encoding: EncodingSpec = field(default_factory=EncodingSpec)
    """How updates travel. Part of the task: encoded otherwise, the same updates have another sum."""

    @cached_property
    def update_encoding(self) -> Encoding:
        """The encoding itself.

        Raises:
            RequirementUnknown: It is not known here, or an option of it is not, or not so.
        """
        try:
            return encodings.get(self.encoding.name, self.encoding.options)
        except ConfigError as error:
            wanted = f"the plan wants updates encoded as {self.encoding.name[:40]}"
            raise RequirementUnknown(f"{wanted}, unknown to this release; upgrade hierfl ({error})") from None

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the canonical document, ``sha256:hex``."""
        return documents.digest(documents.encode(self))


@dataclass(frozen=True, kw_only=True)
class Caps:
    """Limits on what one update, and one region, may add."""

    max_weight: int
    """Per update, in the plan's units."""
    region_weight: int
    """This region's share of the round's total weight."""
    max_upload_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """See the module. ``round`` r of task ``train`` makes model version r."""

    federation: str
    region: RegionId
    run: RunId
    round: int
    attempt: int
    seed: int
    task: TaskSpec
    base: ModelRef
    caps: Caps
    k: int
    min_clients: int
    report_timeout_s: float
    hold_s: float
    partial_encoding: str = "packed"
    """How the region's sum crosses the border (``hierfl/rounding.py``). No part of the task: clients are asked the same
    whatever it is, and one sum over a base and a task may leave, in one form. A region that does not know this one, or
    sealed in another, abstains."""
    requires: tuple[str, ...] = ()

    @property
    def key(self) -> AttemptKey:
        return AttemptKey(self.run, self.task.kind, self.round, self.attempt)

    @property
    def drop_bits(self) -> int:
        """How far the region rounds its sums; 0: not at all.

        Raises:
            RequirementUnknown: They are to be in a form that is not known here.
        """
        return rounding.drop_bits_of(self.partial_encoding)

    def to_bytes(self) -> bytes:
        return documents.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """Read a plan and refuse what this release cannot obey.

        Raises:
            WireError: The bytes are no plan.
            RequirementUnknown: ``requires``, or the encoding of updates, names something unknown.
        """
        plan = documents.decode(data, cls, "plan")
        unknown = sorted(set(plan.requires) - SUPPORTED_REQUIREMENTS)
        if unknown:
            raise RequirementUnknown(f"the plan requires {', '.join(unknown)}, unknown to this release; upgrade hierfl")
        if plan.k < 2 or plan.min_clients < 1 or plan.round < 1 or plan.attempt < 1:
            raise WireError("plan: k, min_clients, round or attempt is below its least value")
        _ = plan.task.update_encoding
        return plan


def plan_statement(leader_epoch: int, plan: bytes) -> bytes:
    """The bytes that a plan's signature covers: 8 bytes of leader epoch, big-endian, then the plan."""
    return leader_epoch.to_bytes(8, "big") + plan


def task_seed(run_seed: int, round_number: int, client: ClientRef) -> int:
    """Seed of one client's work in one round, 0 to 2**63 - 1.

    A hash of (run seed, round, site and client names): not of attempt, region or clock, so a client's
    work is the same wherever its site is attached, and when it is asked again.
    """
    text = f"hierfl.seed/1\0{run_seed}\0{round_number}\0{client.site}\0{client.client}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
