"""Clients that hang on ``Follow`` at one intake: who they are, what they serve, and a queue for each.

A queue is bounded: a client that does not read is let go, and comes back. Several sessions of one client
count as one connection to the Region.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from combiners.messages import App, Connection, serves
from hierfl.plan import Plan
from hierfl.types import ClientRef
from hierfl.wire import hierfl_pb2 as pb

__all__ = ["Followers", "Session"]

MAX_QUEUED = 256
"""Offers and receipts that a client may be behind."""


@dataclass(eq=False)
class Session:
    """One open stream. ``None`` in its queue ends it."""

    client: ClientRef
    apps: tuple[App, ...]
    queue: asyncio.Queue[pb.FollowResponse | None] = field(default_factory=lambda: asyncio.Queue(MAX_QUEUED))

    def send(self, event: pb.FollowResponse) -> None:
        """Queue an event; a session that is too far behind ends."""
        if self.queue.full():
            self.end()
        else:
            self.queue.put_nowait(event)

    def end(self) -> None:
        """End the stream, whatever waits in it."""
        while not self.queue.empty():
            self.queue.get_nowait()
        self.queue.put_nowait(None)


class Followers:
    """All sessions of an intake, by client."""

    def __init__(self, tell: Callable[[Connection], None]) -> None:
        """``tell`` learns of clients that join and leave."""
        self._tell = tell
        self._sessions: dict[ClientRef, list[Session]] = {}

    def __len__(self) -> int:
        return sum(len(sessions) for sessions in self._sessions.values())

    def __iter__(self) -> Iterator[Session]:
        return (session for sessions in self._sessions.values() for session in sessions)

    def join(self, client: ClientRef, apps: tuple[App, ...]) -> Session:
        session = Session(client, apps)
        self._sessions.setdefault(client, []).append(session)
        self._tell(Connection(client=client, joined=True, apps=self._apps(client)))
        return session

    def leave(self, session: Session) -> None:
        sessions = self._sessions[session.client]
        sessions.remove(session)
        if not sessions:
            del self._sessions[session.client]
        self._tell(Connection(client=session.client, joined=bool(sessions), apps=self._apps(session.client)))

    def serving(self, plan: Plan) -> list[Session]:
        return [session for session in self if serves(session.apps, plan)]

    def send(self, client: ClientRef, event: pb.FollowResponse) -> None:
        for session in self._sessions.get(client, []):
            session.send(event)

    def end_all(self) -> None:
        for session in list(self):
            session.end()

    def _apps(self, client: ClientRef) -> tuple[App, ...]:
        apps = {app for session in self._sessions.get(client, []) for app in session.apps}
        return tuple(sorted(apps, key=lambda app: (app.name, app.version)))
