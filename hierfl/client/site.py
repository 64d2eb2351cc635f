"""What the clients of one process share, and how a round is called before people."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hierfl.client.link import DIALS_AT_ONCE
from hierfl.client.models import ModelCache, OwnModels
from hierfl.client.offers import SitePolicy
from hierfl.client.worker import Worker
from hierfl.types import AttemptKey, ClientRef, TaskKind

__all__ = ["Site", "round_of"]


@dataclass(frozen=True)
class Site:
    """What the clients of one process share."""

    policy: SitePolicy
    site_config: Mapping[str, str]
    worker: Worker
    say: Callable[[str], None]
    on_round_over: Callable[[ClientRef, AttemptKey], None] = lambda client, key: None
    """Called when a client has nothing more to do for a round: last word, or declined."""
    dialling: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(DIALS_AT_ONCE))
    takes_models_along: bool = False
    """Whether there is one client only, so that a small model may as well come with each offer."""
    models: ModelCache = field(default_factory=ModelCache)
    own_models: OwnModels = field(default_factory=OwnModels)


def round_of(key: AttemptKey) -> str:
    """A key for people: ``round 3``, ``round 3, attempt 2``, ``evaluation``."""
    what = f"round {key.round}" if key.task is TaskKind.TRAIN else "evaluation"
    return f"{what}, attempt {key.attempt}" if key.attempt > 1 else what
