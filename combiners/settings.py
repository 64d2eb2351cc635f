"""What a region is started with."""

from __future__ import annotations

from dataclasses import dataclass, field

from hierfl.residency import ZonePolicy

__all__ = ["RegionSettings"]


@dataclass(frozen=True, kw_only=True)
class RegionSettings:
    """What a region is started with."""

    policy: ZonePolicy = field(default_factory=ZonePolicy)
    grace_s: float = 6.0
    """Seconds without its stream after which a client is not waited for, once enough are in."""
    freeze_s: float = 30.0
    """Seconds in which an intake has to answer; one that does not is void."""
    intake_silence_s: float = 15.0
    """Seconds without a tick after which an intake is void."""
    settle_s: float = 2.0
    """Seconds without a change after which a new endpoint list is made: an intake that restarts soon moves nobody."""
    capacity: int = 8
    """Runs served at once."""
    orphan_s: float = 600.0
    """Seconds without the controller after which clients are told that their sealed updates wait for it."""
    keep_partial_bytes: int = 2**30
    """Judged partials are kept up to this size, newest first: the same job, submitted again, gets the same bytes."""
