"""Clients that hang on ``Follow`` at one intake: who they are, what they serve, and a queue for each.

A queue is bounded: a client that does not read is let go, and comes back. Several sessions of one client
count as one connection to the Region. A client that was told when to come back counts as connected until
some time after that: a round waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from combiners.messages import App, Connection, serves
from hierfl.errors import ComeBack
from hierfl.plan import Plan
from hierfl.types import ClientRef
from hierfl.wire import hierfl_pb2 as pb

__all__ = ["Followers", "Session"]

MAX_QUEUED = 256
"""Offers and receipts that a client may be behind."""
LATENESS = 1.5
"""A client told to come back adds some jitter of its own: it is waited for so much longer than it was told."""


@dataclass(eq=False)
class Session:
    """One open stream. ``None`` in its queue ends it."""

    client: ClientRef
    apps: tuple[App, ...]
    queue: asyncio.Queue[pb.FollowResponse | None] = field(default_factory=lambda: asyncio.Queue(MAX_QUEUED))
    since_s: float = field(default_factory=time.monotonic)
    """When it came, or was last given something to do."""
    takes_along: bool = False
    """Whether the client reads receipts that come along with other events."""
    takes_models: bool = False
    """Whether it reads the model that comes along with an offer."""
    is_over: bool = False
    goodbye: ComeBack | None = None
    """What the stream ends with, where it is not just closed."""
    on_end: Callable[[], None] = lambda: None

    def send(self, event: pb.FollowResponse) -> None:
        """Queue an event; a session that is too far behind ends."""
        if self.queue.full():
            self.end()
        else:
            self.queue.put_nowait(event)

    def end(self, goodbye: ComeBack | None = None) -> None:
        """End the stream, whatever waits in it."""
        if not self.is_over:
            self.on_end()
        self.is_over, self.goodbye = True, goodbye
        while not self.queue.empty():
            self.queue.get_nowait()
        self.queue.put_nowait(None)


class Followers:
    """All sessions of an intake, by client."""

    def __init__(self, tell: Callable[[Connection], None]) -> None:
        """``tell`` learns of clients that join and leave."""
        self._tell = tell
        self._sessions: dict[ClientRef, list[Session]] = {}
        self._away: dict[ClientRef, tuple[tuple[App, ...], asyncio.TimerHandle]] = {}
        self._open: Counter[tuple[App, ...]] = Counter()
        """Streams that go on, by what their clients serve: few kinds, whatever the number of clients."""

    def __len__(self) -> int:
        """Streams that go on."""
        return self._open.total()

    def num_serving(self, plan: Plan) -> int:
        """Those that go on and serve the plan's app."""
        return sum(number for apps, number in self._open.items() if serves(apps, plan))

    def _ended(self, apps: tuple[App, ...]) -> None:
        self._open[apps] -= 1
        if not self._open[apps]:
            del self._open[apps]

    def __iter__(self) -> Iterator[Session]:
        return (session for sessions in self._sessions.values() for session in sessions if not session.is_over)

    def join(self, client: ClientRef, apps: tuple[App, ...]) -> Session:
        session = Session(client, apps, on_end=partial(self._ended, apps))
        self._open[apps] += 1
        self._stop_waiting_for(client)
        self._sessions.setdefault(client, []).append(session)
        self._tell(self._presence(client))
        return session

    def leave(self, session: Session) -> None:
        before = self._presence(session.client)
        if not session.is_over:
            session.end()
        sessions = self._sessions[session.client]
        sessions.remove(session)
        if not sessions:
            del self._sessions[session.client]
        self._tell_change(session.client, before)

    def turn_away(self, client: ClientRef, apps: tuple[App, ...], after_s: float, grace_s: float) -> None:
        """The client was told to come back after ``after_s``; it is waited for a while longer, then it has left."""
        before = self._presence(client)
        self._stop_waiting_for(client)
        patience_s = LATENESS * after_s + grace_s
        timer = asyncio.get_running_loop().call_later(patience_s, self._give_up, client)
        self._away[client] = (apps, timer)
        self._tell_change(client, before)

    def _give_up(self, client: ClientRef) -> None:
        before = self._presence(client)
        self._stop_waiting_for(client)
        self._tell_change(client, before)

    def _stop_waiting_for(self, client: ClientRef) -> None:
        _, timer = self._away.pop(client, ((), None))
        if timer is not None:
            timer.cancel()

    def _presence(self, client: ClientRef) -> Connection:
        """What the Region should know of it."""
        is_here = client in self._sessions or client in self._away
        return Connection(client=client, joined=is_here, apps=self._apps(client))

    def _tell_change(self, client: ClientRef, before: Connection) -> None:
        """Who joins is asked (again) for its update: only who really does is said to."""
        after = self._presence(client)
        if after != before:
            self._tell(after)

    def serving(self, plan: Plan) -> list[Session]:
        return [session for session in self if serves(session.apps, plan)]

    def of(self, client: ClientRef) -> list[Session]:
        return self._sessions.get(client, [])

    def send(self, client: ClientRef, event: pb.FollowResponse) -> None:
        for session in self._sessions.get(client, []):
            session.send(event)

    def end_all(self) -> None:
        for session in list(self):
            session.end()
        for client in list(self._away):
            self._give_up(client)

    def _apps(self, client: ClientRef) -> tuple[App, ...]:
        away, _ = self._away.get(client, ((), None))
        apps = {app for session in self._sessions.get(client, []) for app in session.apps} | set(away)
        return tuple(sorted(apps, key=lambda app: (app.name, app.version)))
