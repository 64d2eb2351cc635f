"""Which of several servers a client belongs to, decided by both names alone: rendezvous hashing. Pure.

Every (client, server) pair has a rank of its own, and a client prefers high ranks. A server that is added
takes its share from all the others and moves nobody else; one that goes leaves its clients to all the others.
Source: Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["preference", "rank"]

CONTEXT = b"hierfl.rendezvous/1"


def rank(client: str, server: str) -> int:
    """The first 8 bytes, big-endian, of the SHA-256 of the context and both names, joined by zero bytes."""
    text = b"\0".join((CONTEXT, client.encode(), server.encode()))
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def preference(client: str, servers: Iterable[str]) -> list[str]:
    """``servers`` as ``client`` prefers them: its own first, then those it fails over to; equal ranks by name."""
    return sorted(set(servers), key=lambda server: (-rank(client, server), server))
