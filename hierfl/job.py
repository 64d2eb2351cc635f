"""A job: what an operator asks for, as data. Code never travels.

Made from ``job.toml`` by ``hierfl/config.py``, sent to the controller as a document, kept with the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hierfl.errors import ConfigError

__all__ = [
    "MAX_DROP_BITS",
    "Arithmetic",
    "Job",
    "JobHead",
    "ModelChoice",
    "PartialChoice",
    "RoundRules",
    "StrategyChoice",
    "UpdateChoice",
]

MAX_DROP_BITS = 32
"""With the usual 32 fraction bits: to whole units of a value times its weight."""


def _require(key: str, value: float, ok: bool, rule: str) -> None:
    if not ok:
        raise ConfigError(key, value, rule)


@dataclass(frozen=True, kw_only=True)
class JobHead:
    """``[job]``: which app, how many rounds, from which seed."""

    name: str
    """For people; runs get their own ids."""
    app: str
    """Name of the app installed at the sites, optionally ``name@version``."""
    rounds: int
    """Rounds of training."""
    seed: int = 0
    """Of everything random in the run: initial model, each task's ``task.seed``."""

    def __post_init__(self) -> None:
        _require("job.rounds", self.rounds, 1 <= self.rounds <= 1_000_000, "must be from 1 to 1,000,000")
        _require("job.seed", self.seed, 0 <= self.seed < 2**63, "must be from 0 to 2**63 - 1")
        if not self.name.strip():
            raise ConfigError("job.name", self.name, "must not be empty")
        if not self.app.strip():
            raise ConfigError("job.app", self.app, "must name the app that the sites run")


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """``[model]``: where version 0 comes from, and which of its tensors take part."""

    initial: str = "app"
    """``"app"``: the app's ``init``; else the path of a safetensors file."""
    tensors: str | tuple[str, ...] = "all"
    """``"all"``, ``"trainable"``, or patterns of names (``fnmatch``): the others never leave a site."""


@dataclass(frozen=True, kw_only=True)
class StrategyChoice:
    """``[strategy]``: a registered name, every other key an option of that strategy."""

    name: str = "fedavg"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class UpdateChoice:
    """``[updates]``: how they travel; every key but ``encoding`` an option of that encoding."""

    encoding: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PartialChoice:
    """``[partials]``: how the regions' sums cross their borders."""

    drop_bits: int = 0
    """Bits that each region rounds away from its sums, what is left over going into its next round; 0: exact. Any other
    makes the run approximate across regions, and says so."""

    def __post_init__(self) -> None:
        _require(
            "partials.drop_bits", self.drop_bits, 0 <= self.drop_bits <= MAX_DROP_BITS, f"must be 0 to {MAX_DROP_BITS}"
        )


@dataclass(frozen=True, kw_only=True)
class RoundRules:
    """``[round]``: what a round waits for, and how long."""

    min_regions: int = 1
    """Quorum: fewest regions whose partial aggregates make a new model."""
    min_clients: int = 1
    """Fewest clients in each region for its round to begin, and for its partial to be sent."""
    report_timeout_s: float = 300.0
    """Seconds from the start of a round until missing regions and clients are given up."""
    silence_s: float = 6.0
    """Seconds without a word after which a region counts as lost, for as long as it stays silent."""
    hold_s: float = 30 * 86400.0
    """Seconds that a client keeps an update without a last word on it."""
    max_abandoned: int = 3
    """Abandoned attempts in a row that pause the run, with the reason."""
    evaluate_every: int = 1
    """Clients with an ``evaluate`` measure the model they fetch each so many rounds; 0: never."""
    border_budget_bytes: int = 0
    """Most that one region's sum may take in a round; 0: no limit. A job whose caps allow more is refused."""

    def __post_init__(self) -> None:
        _require("round.min_regions", self.min_regions, self.min_regions >= 1, "must be at least 1")
        _require("round.min_clients", self.min_clients, self.min_clients >= 1, "must be at least 1")
        _require("round.report_timeout_s", self.report_timeout_s, self.report_timeout_s > 0, "must be above 0 s")
        _require("round.silence_s", self.silence_s, self.silence_s >= 0.5, "must be at least 0.5 s")
        _require("round.hold_s", self.hold_s, self.hold_s >= 0, "must not be negative")
        _require("round.max_abandoned", self.max_abandoned, self.max_abandoned >= 1, "must be at least 1")
        _require(
            "round.border_budget_bytes", self.border_budget_bytes, self.border_budget_bytes >= 0, "must not be negative"
        )
        _require("round.evaluate_every", self.evaluate_every, self.evaluate_every >= 0, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """``[arithmetic]``: the caps from which the exact sums get their scale."""

    max_weight: int = 65_535
    """Cap on one update's weight; a larger ``num_examples`` is clipped, and the site is told."""
    total_weight: int = 2**27
    """Cap on the weights of one round, over all regions; shared out equally among them."""
    max_abs: float = 8.0
    """Cap on the magnitude of a value of ``delta``."""
    k: int = 2
    """Fewest sites in a sum that crosses a border; a zone may demand more, never less."""

    def __post_init__(self) -> None:
        _require("arithmetic.max_weight", self.max_weight, 1 <= self.max_weight <= 65_535, "must be from 1 to 65535")
        _require(
            "arithmetic.total_weight",
            self.total_weight,
            self.max_weight <= self.total_weight <= 2**40,
            "must be from max_weight to 2**40",
        )
        _require("arithmetic.max_abs", self.max_abs, 0 < self.max_abs <= 2**20, "must be above 0, at most 2**20")
        _require("arithmetic.k", self.k, self.k >= 2, "must be at least 2: one site's sum is its update")


@dataclass(frozen=True, kw_only=True)
class Job:
    """All of it. ``app`` holds the free keys handed to the app as ``task.config``."""

    job: JobHead
    model: ModelChoice = field(default_factory=ModelChoice)
    strategy: StrategyChoice = field(default_factory=StrategyChoice)
    updates: UpdateChoice = field(default_factory=UpdateChoice)
    partials: PartialChoice = field(default_factory=PartialChoice)
    round: RoundRules = field(default_factory=RoundRules)
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    app: Mapping[str, Any] = field(default_factory=dict)
