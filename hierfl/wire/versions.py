"""Protocol versions: a release speaks its own and the one before (N and N-1), and both sides agree in ``Hello``."""

from __future__ import annotations

from collections.abc import Collection

from hierfl.errors import VersionMismatch

__all__ = ["PROTOCOL_VERSIONS", "negotiate"]

PROTOCOL_VERSIONS = (1,)
"""Versions of PROTOCOL.md that this release speaks, rising."""


def negotiate(ours: Collection[int], theirs: Collection[int], *, our_name: str, their_name: str) -> int:
    """The highest version that both sides speak.

    Args:
        ours: Versions that this side speaks.
        theirs: Versions that the other side says it speaks.
        our_name, their_name: For the error: ``"this client"``, ``"the combiner"``.
    Raises:
        VersionMismatch: None in common; names both sides' versions and which of them to upgrade.
    """
    common = set(ours) & set(theirs)
    if common:
        return max(common)
    older = our_name if max(ours, default=0) < max(theirs, default=0) else their_name
    raise VersionMismatch(
        f"{our_name} speaks protocol {_listed(ours)}, {their_name} {_listed(theirs)}: upgrade {older}"
    )


def _listed(versions: Collection[int]) -> str:
    return ", ".join(str(version) for version in sorted(set(versions))[:10]) or "none"
