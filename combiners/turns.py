"""Who makes room at a full intake: the one that has had nothing to do for longest. No I/O and no clock.

Who becomes idle is noted as it happens, so that one who comes in does not cost a look at all that are there. Whether
it still holds is asked when its turn comes: who was given something to do meanwhile is noted again after that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from combiners.followers import Session

__all__ = ["Turns"]


class Turns:
    """Sessions in the order in which they became idle."""

    def __init__(self, is_idle: Callable[[Session], bool]) -> None:
        self._is_idle = is_idle
        self._noted: OrderedDict[Session, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._noted)

    def note(self, sessions: Iterable[Session]) -> None:
        """These may have nothing to do from now on."""
        for session in filter(self._is_idle, sessions):
            self.forget(session)
            self._noted[session] = None

    def note_all(self, sessions: Iterable[Session]) -> None:
        """Something ended that many had to do: those who were given something first come first."""
        self._noted.clear()
        self.note(sorted(sessions, key=lambda session: session.since_s))

    def forget(self, session: Session) -> None:
        """It has left, or is not idle after all."""
        self._noted.pop(session, None)

    def take(self) -> Session | None:
        """The session that makes room, which is noted no more; none where all have something to do."""
        while self._noted:
            session, _ = self._noted.popitem(last=False)
            if not session.is_over and self._is_idle(session):
                return session
        return None
