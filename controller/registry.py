"""Known regions: who is attached, which start of it is the newest, when it was last heard from.

The regions are those that the federation has provisioned. No I/O: the clock is handed in, in seconds of a
monotonic clock, and what is sent to a region goes into its session's queue.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from hierfl.errors import NotFound, StaleEpoch
from hierfl.rounds import Presence
from hierfl.types import AttemptKey, RegionId
from hierfl.wire import hierfl_pb2 as pb

__all__ = ["Progress", "Registry", "Session", "Traffic"]

UNDELIVERED = 256
"""Verdicts and withdrawals kept for a region that is away; it asks for older ones when it attaches."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a region is with one attempt, in counts."""

    phase: str
    clients_ready: int
    clients_reported: int
    cohort: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a region last reported of itself."""

    clients_connected: int = 0
    sites_connected: int = 0
    bytes_from_sites: int = 0
    bytes_to_sites: int = 0


class Session:
    """One Attach stream: what is put into it is sent in order. ``None`` ends it."""

    def __init__(self, region: RegionId, region_epoch: int, store_id: str) -> None:
        self.region, self.region_epoch, self.store_id = region, region_epoch, store_id
        self.events: asyncio.Queue[pb.AttachResponse | None] = asyncio.Queue()
        self.replaced_by = 0
        """Epoch of the newer stream of the same region that ended this one; 0 where none did."""

    def end(self, *, replaced_by: int = 0) -> None:
        """Let the stream end after what is in it."""
        self.replaced_by = replaced_by
        self.events.put_nowait(None)


@dataclass(kw_only=True)
class _Region:
    region_epoch: int = 0
    store_id: str = ""
    session: Session | None = None
    heard_at: float | None = None
    excused_until: float = 0.0
    progress: Mapping[AttemptKey, Progress] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    undelivered: deque[pb.AttachResponse] = field(default_factory=lambda: deque(maxlen=UNDELIVERED))


class Registry:
    """All regions. ``changed`` is called when something a decision depends on is different."""

    def __init__(self, regions: Iterable[RegionId], clock: Callable[[], float], changed: Callable[[], None]) -> None:
        self._regions = {region: _Region() for region in sorted(regions)}
        self._clock, self._changed = clock, changed
        self._started_at = clock()

    @property
    def regions(self) -> tuple[RegionId, ...]:
        return tuple(self._regions)

    def restore(self, region: RegionId, region_epoch: int, store_id: str) -> None:
        """Recall the newest start of a region that an earlier controller saw."""
        if region in self._regions:
            known = self._regions[region]
            known.region_epoch, known.store_id = region_epoch, store_id

    def attach(self, region: RegionId, region_epoch: int, store_id: str) -> Session:
        """Open a session; it ends the region's earlier one. What waited for the region is in its queue.

        Raises:
            StaleEpoch: A newer start of this region is known.
        """
        known = self._known(region)
        self.check_epoch(region, region_epoch, store_id)
        if known.session is not None:
            known.session.end(replaced_by=region_epoch)
        session = Session(region, region_epoch, store_id)
        known.region_epoch, known.store_id, known.session = region_epoch, store_id, session
        known.progress = {}
        while known.undelivered:
            session.events.put_nowait(known.undelivered.popleft())
        known.heard_at = self._clock()
        self._changed()
        return session

    def check_epoch(self, region: RegionId, region_epoch: int, store_id: str | None = None) -> None:
        """Refuse a sender that a newer start of its region has replaced.

        A zone store with another identity counts its epochs anew: it is taken up while no other is attached.

        Raises:
            StaleEpoch: So it is.
        """
        known = self._known(region)
        other_store = store_id is not None and known.store_id not in ("", store_id)
        if other_store and known.session is not None:
            raise StaleEpoch(f"region {region} is attached with another zone store: stop one of the two combiners")
        if not other_store and region_epoch < known.region_epoch:
            raise StaleEpoch(
                f"region {region} was started again: epoch {region_epoch} is over, it has {known.region_epoch}"
            )

    def detach(self, session: Session) -> None:
        """The session's stream is over."""
        known = self._regions[session.region]
        if known.session is session:
            known.session = None

    def heard(self, region: RegionId) -> None:
        """A message of the region arrived; after a silence, that is news."""
        known = self._known(region)
        was_silent_s = self._clock() - (known.heard_at if known.heard_at is not None else -1e9)
        known.heard_at = self._clock()
        if was_silent_s >= SHORTEST_SILENCE_S:
            self._changed()

    def report(self, region: RegionId, progress: Mapping[AttemptKey, Progress], traffic: Traffic) -> None:
        """Take a region's progress; it replaces what was reported before."""
        known = self._known(region)
        news = dict(progress) != dict(known.progress)
        known.progress, known.traffic = dict(progress), traffic
        self.heard(region)
        if news:
            self._changed()

    def send(self, region: RegionId, event: pb.AttachResponse) -> None:
        """Send to a region. While it is away a verdict or withdrawal is kept; an offer is made anew on attaching."""
        known = self._known(region)
        if known.session is not None:
            known.session.events.put_nowait(event)
        elif event.WhichOneof("event") in ("verdict", "withdrawal"):
            known.undelivered.append(event)

    def presence(self, region: RegionId, silence_s: float) -> Presence:
        """What a round that allows ``silence_s`` of silence may think of a region."""
        known = self._known(region)
        is_live = self._clock() < self.live_until(region, silence_s)
        if known.heard_at is not None:
            return Presence.ATTACHED if is_live else Presence.SILENT
        return Presence.EXPECTED if is_live else Presence.ABSENT

    def live_until(self, region: RegionId, silence_s: float) -> float:
        """When a live region's presence changes unless it is heard from, on the registry's clock."""
        known = self._known(region)
        heard_at = self._started_at if known.heard_at is None else known.heard_at
        return max(heard_at + silence_s, known.excused_until)

    def excuse(self, seconds: float) -> None:
        """Attached regions are being told to report more often: until they do, for so long, they are not silent."""
        for known in self._regions.values():
            if known.session is not None:
                known.excused_until = self._clock() + seconds

    def silent_for_s(self, region: RegionId) -> float:
        """Seconds since the region was heard from, or since this controller's start."""
        known = self._known(region)
        return self._clock() - (self._started_at if known.heard_at is None else known.heard_at)

    def progress(self, region: RegionId, key: AttemptKey) -> Progress | None:
        return self._known(region).progress.get(key)

    def traffic(self, region: RegionId) -> Traffic:
        return self._known(region).traffic

    def region_epoch(self, region: RegionId) -> int:
        return self._known(region).region_epoch

    def sessions(self) -> list[Session]:
        return [known.session for known in self._regions.values() if known.session is not None]

    def _known(self, region: RegionId) -> _Region:
        if region not in self._regions:
            raise NotFound("region", region, f"this federation has {', '.join(self._regions)}")
        return self._regions[region]


SHORTEST_SILENCE_S = 0.5
"""Least ``round.silence_s``: no run can have noticed a shorter silence."""
