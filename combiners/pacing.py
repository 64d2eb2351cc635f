"""When a client that is turned away comes back: pace steering. No I/O and no clock.

An intake has room for so many clients, each stays for a turn, so a place comes free every ``turn_s / room``
seconds. Those turned away get these moments one after the other: nobody comes in vain, and all come by in turn.
"""

from __future__ import annotations

from hierfl.types import ClientRef

__all__ = ["LONGEST_S", "Pacer"]

LONGEST_S = 600.0
"""Nobody is sent away for longer: a place far back in the line is given anew by then."""
LEARNING = 0.1
"""Share of each turn in the running mean."""


class Pacer:
    """The moments given out at one intake."""

    def __init__(self, room: int, least_turn_s: float) -> None:
        """``least_turn_s``: a turn counts for at least so long, so that short ones do not make clients come and go
        faster than handshakes are worth.
        """
        self._room, self._least_turn_s = room, least_turn_s
        self._turn_s = least_turn_s
        self._last_s = float("-inf")
        self._given: dict[ClientRef, float] = {}

    @property
    def spacing_s(self) -> float:
        """Seconds between two clients that come back."""
        return self._turn_s / self._room

    def took(self, seconds: float) -> None:
        """A client was done with its work so many seconds after it had it."""
        self._turn_s += LEARNING * (max(seconds, self._least_turn_s) - self._turn_s)

    def next_s(self, client: ClientRef, now_s: float) -> float:
        """Seconds until ``client`` comes back. Asked again before that moment, it is the same moment."""
        given = self._given.get(client, now_s)
        if given <= now_s:
            least_s = self._least_turn_s / 20  # not at once, however many places there are
            given = max(self._last_s + self.spacing_s, now_s + least_s)
            self._last_s = self._given[client] = min(given, now_s + LONGEST_S)
        return self._given[client] - now_s

    def came(self, client: ClientRef) -> None:
        """The client is in: the next time that it is sent away is another."""
        self._given.pop(client, None)
