"""What a region and its intakes are started with."""

from __future__ import annotations

from dataclasses import dataclass, field

from hierfl.residency import ZonePolicy
from hierfl.wire.resume import KEEP_S

__all__ = ["IntakeSettings", "RegionSettings"]


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


@dataclass(frozen=True, kw_only=True)
class IntakeSettings:
    """Bounds of one intake."""

    max_uploads: int = 16
    """Uploads at once."""
    memory_bytes: int = 0
    """What the intake may use, and each of its shards; 0: its share of this machine's, or of this container's. It
    bounds the bytes of all uploads at once (``budget.py``); one that is larger goes alone."""
    actors: int = 2
    """Processes of the combiner that may share the machine."""
    shards: int | None = None
    """Processes that share an attempt's sums; 0: none, ``None``: as many as its model takes that does not fit here."""
    max_following: int = 4000
    """Clients that may wait at once; more are told when to come back."""
    least_turn_s: float = 20.0
    """While there are more than that, each may stay for at least about so long."""
    away_grace_s: float = 10.0
    """A client that was told to come back is waited for so much longer."""
    ticket_s: float = 10.0
    """Seconds in which an admitted upload has to begin."""
    silence_s: float = 30.0
    """An upload without a frame for so long has ended."""
    resume_s: float = KEEP_S
    """What came of a cut upload is kept for so long, and its room with it."""
