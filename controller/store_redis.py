"""The store in Redis, for two controllers or more: rows, the lead as a lease, and everything atomic by one script each.

Rows of a table are a hash (key -> document) and a sorted set of its keys, which gives them back in order. All keys
begin with ``hierfl:{FEDERATION}:``, so that a federation is one slot of a cluster and one pattern of an ACL.

A write may reach Redis twice (it is sent again once where no answer came) or late (it waited in a buffer while Redis
was frozen). Each carries its number in its epoch: one that is there already changes nothing and is answered the same,
an older one than the newest is refused. So writes may be repeated; and after an answer that never came at all the
controller takes a new epoch, which refuses whatever is still on its way, and reads back what the store holds.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import redis
from redis.backoff import ConstantBackoff, NoBackoff
from redis.retry import Retry

from controller import redis_scripts as scripts
from controller.redis_errors import translated
from controller.redis_options import RedisOptions
from controller.rows import Row
from controller.store import SCHEMA_VERSION
from controller.tables import TABLES, WRITTEN_ONCE, Tables, decoded, key_of
from hierfl import documents
from hierfl.errors import ConfigError, NotTheLeader, StaleEpoch, StorageError, StoreDamaged, StoreTooNew

__all__ = ["LEASE_S", "RedisStore"]

logger = logging.getLogger(__name__)

LEASE_S = 6.0
"""A leader that has not renewed for so long is replaced: as long as a region may be silent (``leader.SILENCE_S``)."""
ANSWER_S = 1.25
"""Longest wait for a connection, and for an answer. Twice that and a pause stay below 3 s."""
PAUSE_S = 0.1

SAFE_SETTINGS = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
"""Without them Redis loses, or throws away, what it has acknowledged."""

R = TypeVar("R")
T = TypeVar("T")


class RedisStore(Tables):
    """See ``Store`` and the module. Methods block, for less than 3 s each; they may be called from any thread."""

    def __init__(self, options: RedisOptions, federation: str, *, lease_s: float = LEASE_S) -> None:
        """Connect; create the store of ``federation`` where there is none.

        Raises:
            StoreUnreachable: No answer, or Redis takes no writes at present.
            ConfigError: Redis is set up so that it may lose what it has acknowledged.
            StoreTooNew: A later release wrote it.
            StoreDamaged: What is there is another federation's.
            StorageError: Redis refuses this user, or what a store needs.
        """
        self.lease_s: float = lease_s
        self._where = options.url
        self._prefix = f"hierfl:{{{federation}}}:"
        self._token, self._name = uuid.uuid4().hex, ""
        self._number = self._epoch = 0
        self._writing = threading.Lock()
        self._again = Retry(ConstantBackoff(PAUSE_S), 1)
        self._db = _client(options)
        self._scripts = {name: self._db.register_script(text) for name, text in scripts.SCRIPTS.items()}
        self.store_id = ""
        try:
            self._open(federation)
        except BaseException:
            self._db.close()
            raise

    def _open(self, federation: str) -> None:
        self._require_safe()
        made = (uuid.uuid4().hex, federation, str(SCHEMA_VERSION))
        self.store_id, owner, version = self._run("open", *made)
        if int(version) > SCHEMA_VERSION:
            raise StoreTooNew(f"{self._where} has schema {version}, this release knows {SCHEMA_VERSION}: upgrade")
        if owner != federation:
            raise StoreDamaged(f"{self._where} belongs to federation {owner!r}, not {federation!r}: use another one")
        self._warn_of_replicas()

    def _require_safe(self) -> None:
        """Raises ``ConfigError`` for settings with which an acknowledged write may be lost."""
        for name, wanted in SAFE_SETTINGS.items():
            found = self._call(lambda name=name: self._db.config_get(name)).get(name)  # type: ignore[misc]
            if found != wanted:
                rule = f"must be {wanted}, or it may lose what it has acknowledged: `CONFIG SET {name} {wanted}`, and "
                raise ConfigError(f"{self._where}: {name}", found, f"{rule}the line `{name} {wanted}` in redis.conf")

    def _warn_of_replicas(self) -> None:
        """A replica that is made the primary without the last writes would take the federation back, unseen."""
        with suppress(redis.RedisError):  # a user who may not ask is not told
            kind, _, replicas = self._db.role()
            if kind == b"master" and replicas and self._db.config_get("min-replicas-to-write").popitem()[1] == "0":
                words = "Redis at %s has replicas and no `min-replicas-to-write 1`: one may be made primary that lags"
                logger.warning(words, self._where)

    # -------------------------------------------------------------- the lead

    def lead(self, at_least: int = 0, *, name: str = "", under: int | None = None) -> int:
        self._name = name or self._name
        held = "" if under is None else str(under)
        self._require_safe()
        said, value = self._run("lead", self.store_id, self._holder, self._lease_ms, str(at_least), held)
        if said == "held":
            raise NotTheLeader("this controller stands by", value)
        self._require_ours(said, value, under)
        self._number, self._epoch = 0, int(value)
        return self._epoch

    def renew(self, epoch: int) -> None:
        said, value = self._run("renew", self.store_id, self._holder, self._lease_ms, str(epoch))
        self._require_ours(said, value, epoch)

    @property
    def _holder(self) -> str:
        """What the lease says: who we are, and what others are told of us."""
        return f"{self._token} {self._name}"

    @property
    def _lease_ms(self) -> str:
        return str(int(1000 * self.lease_s))

    def shared(self, volume: str) -> str:
        """Name of the blob volume of this store: ``volume``, unless one was named before."""
        said, value = self._run("volume", self.store_id, volume)
        self._require_ours(said, value, None)
        return str(value)

    def _require_ours(self, said: str, value: str, epoch: int | None) -> None:
        if said == "wiped":
            raise StoreDamaged(
                f"{self._where} holds store {value or 'none'}, not {self.store_id}: was Redis wiped, or is it another? "
                "Stop all controllers, and bring back its append-only file, or start one with --recover"
            )
        if said == "stale":
            raise StaleEpoch(f"this controller leads under epoch {epoch}, the store is under {value}: stop it")
        if said == "other":
            raise StoreDamaged(f"{self._where}: {value} is there already, with other contents")

    # -------------------------------------------------------------- rows

    def write(self, epoch: int, *rows: Row) -> None:
        with self._writing:
            self._number += 1
            put = [part for row in rows for part in self._encoded(row)]
            said, value = self._run("write", self.store_id, str(epoch), str(self._number), *put)
        self._require_ours(said, value, epoch)

    def _encoded(self, row: Row) -> tuple[str, str, str, bytes]:
        once = "1" if isinstance(row, WRITTEN_ONCE) else ""
        return TABLES[type(row)], once, key_of(row), documents.encode(row)

    def _rows(self, kind: type[R], prefix: str = "") -> list[R]:
        found = self._run("rows", self.store_id, TABLES[kind], prefix, binary=True)
        if found and found[0] == b"wiped":
            self._require_ours("wiped", found[1].decode(), None)
        return decoded(found, kind, self._where)

    def close(self) -> None:
        if self._epoch:
            with suppress(StorageError):  # then the lease runs out
                self._run("release", self.store_id, self._holder, self._lease_ms, str(self._epoch))
            self._epoch = 0
        self._db.close()

    # -------------------------------------------------------------- calls

    def _run(self, name: str, *arguments: str | bytes, binary: bool = False) -> Any:
        """Run a script; texts come back as ``str`` unless ``binary``."""
        answer = self._call(lambda: self._scripts[name](keys=[self._prefix], args=list(arguments)))
        return answer if binary else [each.decode() for each in answer]

    def _call(self, call: Callable[[], T]) -> T:
        """Every call may be made twice: reads, and writes and leads for the reason that the module gives."""
        try:
            return self._again.call_with_retry(
                call, lambda _: self._db.connection_pool.disconnect(inuse_connections=False)
            )
        except redis.RedisError as error:
            raise translated(error, self._where) from None


def _client(options: RedisOptions) -> redis.Redis:
    """A client whose every wait is bounded; it repeats nothing by itself."""
    return redis.Redis.from_url(
        options.url,
        password=options.password or None,
        protocol=2,
        socket_timeout=ANSWER_S,
        socket_connect_timeout=ANSWER_S,
        retry=Retry(NoBackoff(), 0),
        **options.tls_files(),
    )
