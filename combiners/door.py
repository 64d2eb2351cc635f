"""Who may follow at an intake: as many as it takes. When it is full those who have nothing to do make room, and the
others are told when to come back.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from combiners.followers import Followers, Session
from combiners.messages import App
from combiners.pacing import Pacer
from combiners.turns import Turns
from hierfl.errors import ComeBack
from hierfl.types import ClientRef

__all__ = ["Door"]

FULL = "as many clients are connected here as this combiner takes at once; come back when it says"


class Door:
    """See the module."""

    def __init__(
        self,
        followers: Followers,
        is_idle: Callable[[Session], bool],
        *,
        max_following: int,
        least_turn_s: float,
        away_grace_s: float,
    ) -> None:
        """
        Args:
            followers: Those who are inside.
            is_idle: Whether a client has nothing to do.
            max_following, least_turn_s, away_grace_s: See ``IntakeSettings``.
        """
        self._followers, self._max_following, self._away_grace_s = followers, max_following, away_grace_s
        self._pacer = Pacer(max_following, least_turn_s)
        self._turns = Turns(is_idle)

    def join(self, client: ClientRef, apps: tuple[App, ...]) -> Session:
        """Let a client follow.

        Raises:
            ComeBack: As many do as can, and all of them have something to do.
        """
        if len(self._followers) >= self._max_following:
            self._make_room(client, apps)
        self._pacer.came(client)
        session = self._followers.join(client, apps)
        self._turns.note([session])
        return session

    def leave(self, session: Session) -> None:
        """A client's stream has ended."""
        self._turns.forget(session)
        self._followers.leave(session)

    def answered(self, client: ClientRef) -> None:
        """The client has nothing more to do in an attempt."""
        sessions = self._followers.of(client)
        self._turns.note(sessions)
        since_s = min((session.since_s for session in sessions), default=None)
        if since_s is not None:
            self._pacer.took(time.monotonic() - since_s)

    def attempt_over(self) -> None:
        """Many may have nothing to do from now on."""
        self._turns.note_all(self._followers)

    def _make_room(self, client: ClientRef, apps: tuple[App, ...]) -> None:
        own = next((session for session in self._followers.of(client) if not session.is_over), None)
        if own is not None:
            own.end()  # a stream that broke on its way, and the client is back before that was noticed
            return
        idle = self._turns.take()
        if idle is None:
            raise self._send_away(client, apps)
        idle.end(self._send_away(idle.client, idle.apps))

    def _send_away(self, client: ClientRef, apps: tuple[App, ...]) -> ComeBack:
        after_s = self._pacer.next_s(client, time.monotonic())
        self._followers.turn_away(client, apps, after_s, self._away_grace_s)
        return ComeBack(FULL, after_s)
