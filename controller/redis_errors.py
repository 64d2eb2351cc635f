"""What Redis answers, in this project's words: whose move it is, and which. A table; no connection."""

from __future__ import annotations

from hierfl.errors import StorageError, StoreUnreachable

__all__ = ["translated"]

_WAIT = "what is not acknowledged is not counted; it goes on by itself afterwards"
_MEANINGS: tuple[tuple[str, type[StorageError], str], ...] = (
    ("OutOfMemory", StoreUnreachable, f"has no memory left: raise its `maxmemory`; {_WAIT}"),
    ("MISCONF", StoreUnreachable, f"cannot write to its disk: make room there, its log says more; {_WAIT}"),
    ("BusyLoading", StoreUnreachable, "is reading its data after a start: wait"),
    ("ReadOnly", StoreUnreachable, "is a replica: point --store at the primary"),
    ("NOREPLICAS", StoreUnreachable, f"reaches too few of its replicas (`min-replicas-to-write`); {_WAIT}"),
    ("MasterDown", StoreUnreachable, "has lost its primary: wait, or point --store at the new one"),
    ("BUSY ", StoreUnreachable, "is busy with another script: wait"),
    ("ClusterDown", StoreUnreachable, "is a cluster that serves nothing at present: wait"),
    ("MovedError", StorageError, "is one of a cluster that keeps this federation elsewhere: point --store at that one"),
    ("NOAUTH", StorageError, "asks for a password: HIERFL_STORE_PASSWORD_FILE names a file with it"),
    (
        "WRONGPASS",
        StorageError,
        "refuses this user or password: see HIERFL_STORE_PASSWORD_FILE, and the user in the URL",
    ),
    ("Authentication required", StorageError, "asks for a password: HIERFL_STORE_PASSWORD_FILE names a file with it"),
    ("invalid username-password", StorageError, "refuses this user or password: see HIERFL_STORE_PASSWORD_FILE"),
    (
        "NoPermission",
        StorageError,
        "does not allow this user what it needs: `ACL SETUSER USER ~hierfl:* +@read +@write +@scripting +config|get`",
    ),
    (
        "no permissions",
        StorageError,
        "does not allow this user what it needs: +@read +@write +@scripting +config|get",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        StorageError,
        "shows a certificate that the CA file does not vouch for: see --store-ca",
    ),
    ("Timeout", StoreUnreachable, "gives no answer in time: is it frozen, or the network? Trying again"),
)
"""Words in an error or in its class's name (redis-py cuts off Redis's own code where it has a class for it), the class
that it becomes, and what is said after the store's address."""


def translated(error: Exception, where: str) -> StorageError:
    """Our error for one of redis-py's; ``where``: the store's URL, which holds no password."""
    text = f"{type(error).__name__}: {error}"
    for words, kind, meaning in _MEANINGS:
        if words in text:
            return kind(f"Redis at {where} {meaning}")
    if "ConnectionError" in text:
        return StoreUnreachable(f"Redis at {where} is not there ({error}): is it running? Trying again")
    return StorageError(f"Redis at {where} refuses: {error}")
