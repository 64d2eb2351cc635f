"""One controller as a whole: opened, serving, closed. ``command.py`` runs it as a process, tests on their own loop.

It leads, or it stands by and answers that another leads; which of the two is the store's word. A store that only one
process can have (SQLite) makes a leader for good; with another (Redis) a controller that loses the lead, or the store,
stands by, and leads again from what the store holds.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from controller.blobs import Blobs
from controller.commits import Commits
from controller.leader import Leader, checker
from controller.redis_options import RedisOptions
from controller.service import make_server, make_standby_server
from controller.store import SqliteStore, Store
from controller.tenure import Tenure
from controller.volume import MARKER, require_shared
from hierfl import kernels, observe
from hierfl.errors import ConfigError, ExtraMissing, HierFLError, NotTheLeader, StaleEpoch, StoreUnreachable
from hierfl.pki import Kit, RoleName
from hierfl.wire import tls

__all__ = ["ControllerApp", "open_redis"]

logger = logging.getLogger(__name__)

GRACE_S = 0.5
"""For answers that are on their way when the controller stops."""
ASK_S = 1.0
"""A stand-by asks so often, at least, whether the lead is to be had."""


class ControllerApp:
    """Serves from ``__aenter__`` to ``__aexit__``; what it knows is in ``directory``, and it goes on from there.

    Args:
        kit: The controller's.
        directory: Of ``controller.sqlite``, ``blobs/``, ``commits/``, ``runs/``, ``traces/``; made if it is not there.
            Controllers that share a store share it.
        listen: ``host:port``, port 0 for any free one.
        open_store: Opens the store for a directory and a federation.
        advertise: The address that others are told, where it is another than the one listened on.
    """

    def __init__(
        self,
        kit: Kit,
        directory: Path,
        listen: str = "127.0.0.1:0",
        *,
        open_store: Callable[[Path, str], Store] | None = None,
        advertise: str = "",
    ) -> None:
        if kit.identity.role is not RoleName.CONTROLLER:
            raise ConfigError("kit", str(kit.path), f"is the kit of {kit.identity}, not of the controller")
        self._kit, self._directory, self._listen, self._advertise = kit, directory, listen, advertise
        self._open_store = open_store or _open_sqlite
        self._stack = AsyncExitStack()
        self._server: Any = None
        self._roles: asyncio.Task[None] | None = None
        self._tenure: Tenure | None = None
        self._why = NotTheLeader("this controller is starting")
        """What it answers with while it does not lead."""
        self._leader: Leader | None = None
        self.leads = False
        """Whether it serves as the leader."""
        self.address = ""
        """``host:port`` that it listens on."""

    @property
    def leader(self) -> Leader:
        """The newest of this process."""
        assert self._leader is not None, "it has led"
        return self._leader

    async def __aenter__(self) -> ControllerApp:
        """Open, take the lead or stand by, serve.

        Raises:
            StorageError: The directory cannot be used, or another controller has it.
            PortInUse: Another program listens there.
        """
        async with self._stack:
            await self._open()
            self._stack = self._stack.pop_all()
        return self

    async def _open(self) -> None:
        await asyncio.to_thread(kernels.warm_up)
        self._store = self._open_store(self._directory, self._kit.identity.federation)
        self._stack.callback(self._store.close)
        self._commits = Commits(self._directory / "commits", checker(self._kit))
        self._stack.callback(observe.flush)
        self._stack.push_async_callback(self._end)
        if self._store.lease_s is not None:
            await self._serve(make_standby_server(self._kit, lambda: self._why))
            await self._try_to_lead()
        else:
            await self._lead(Tenure(self._store, name=""))
        self._roles = asyncio.create_task(self._change_roles())

    # -------------------------------------------------------------- roles

    async def _change_roles(self) -> None:
        """Lead and stand by in turn. Ends with the error after which this controller cannot go on."""
        while True:
            if self._tenure is None:
                await asyncio.sleep(random.uniform(0.5, 1.0) * ASK_S)  # noqa: S311 - spread, not secrecy
                await self._try_to_lead()
                continue
            error = await self._why_it_ended(self._tenure)
            if self._store.lease_s is None or not isinstance(error, NotTheLeader | StaleEpoch | StoreUnreachable):
                raise error
            logger.warning("this controller steps down: %s", error)
            await self._step_down(_told(error))

    async def _try_to_lead(self) -> None:
        """Take the lead if it is to be had; if not, keep why."""
        try:
            name = self._advertise or self.address
            await self._lead(await asyncio.to_thread(lambda: Tenure(self._store, name=name)))
        except (NotTheLeader, StaleEpoch, StoreUnreachable) as error:
            if self._tenure is not None:
                await self._step_down(_told(error))
            self._say(error)

    def _say(self, error: HierFLError) -> None:
        told = _told(error)
        if told.args != self._why.args:
            logger.warning("%s", error)
        self._why = told

    async def _lead(self, tenure: Tenure) -> None:
        """Take up every run where the store has it, and serve. The blobs are this controller's alone from now on."""
        self._tenure = tenure
        blobs = Blobs(self._directory / "blobs")
        leader = self._leader = Leader(self._kit, tenure, blobs, self._commits, asyncio.get_running_loop().time)
        leader.failed.add_done_callback(_seen)
        server = make_server(leader)
        if self._server is None:
            self._bind(server)  # before a run is taken up: a taken port ends it here
        leader.start()
        tenure.renew(tenure.epoch)  # taking up many runs may have taken much of the first lease
        await self._serve(server)
        self.leads = True
        if self._store.lease_s is not None:
            logger.warning("this controller leads, under epoch %d", leader.epoch)

    async def _why_it_ended(self, tenure: Tenure) -> BaseException:
        kept = asyncio.create_task(tenure.kept_up())
        failed = asyncio.ensure_future(asyncio.wait([self.leader.failed]))
        try:
            await asyncio.wait([kept, failed], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (kept, failed):
                task.cancel()
        if tenure.ended is not None:
            return tenure.ended
        failure = self.leader.failed.exception()
        assert failure is not None, "it is only ever done with one"
        return failure

    async def _step_down(self, why: NotTheLeader) -> None:
        self._why, self._tenure = why, None
        if self._leader is not None:
            await self._leader.stop()
        await self._serve(make_standby_server(self._kit, lambda: self._why))
        self.leads = False

    # -------------------------------------------------------------- serving

    async def _serve(self, server: Any) -> None:
        """Serve with this one, in place of the one before."""
        if server is not self._server:
            if self._server is not None:
                await self._server.stop(GRACE_S)
            self._bind(server)
        await server.start()

    def _bind(self, server: Any) -> None:
        """Listen, always on the address that was taken first."""
        port = tls.bind(server, self.address or self._listen, tls.server_credentials(self._kit))
        self.address, self._server = f"{self._listen.rpartition(':')[0]}:{port}", server

    async def _end(self) -> None:
        while self._roles is not None and not self._roles.done():
            self._roles.cancel()  # which a wait within gRPC may swallow
            await asyncio.wait([self._roles], timeout=GRACE_S)
        if self._leader is not None:
            await self._leader.stop()
        if self._server is not None:
            await self._server.stop(GRACE_S)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def failed(self) -> None:
        """Wait until this controller cannot go on, and raise why."""
        assert self._roles is not None, "it serves"
        await asyncio.shield(self._roles)


def _seen(failed: asyncio.Future[None]) -> None:
    """What came after the end of a tenure is its consequence, and nobody asks for it."""
    if not failed.cancelled():
        failed.exception()


def _told(error: HierFLError) -> NotTheLeader:
    """What a caller may know: who leads; of a store's trouble no more than that there is some."""
    if isinstance(error, NotTheLeader):
        return error
    if isinstance(error, StaleEpoch):
        return NotTheLeader("this controller has been replaced")
    return NotTheLeader("this controller waits for its store, which its log says more about")


def _open_sqlite(directory: Path, federation: str) -> Store:
    if (directory / MARKER).exists():
        raise ConfigError("--dir", str(directory), "belongs to a store in Redis: name that one with --store")
    return SqliteStore(directory / "controller.sqlite", federation)


def open_redis(options: RedisOptions, recovering: Kit | None = None) -> Callable[[Path, str], Store]:
    """Opens the store in Redis, for ``ControllerApp``; rebuilds it first, where the kit for that is given."""

    def open_store(directory: Path, federation: str) -> Store:
        try:
            from controller.store_redis import RedisStore
        except ModuleNotFoundError:
            raise ExtraMissing("a store in Redis (redis-py)", "hierfl[redis]") from None
        store = RedisStore(options, federation)
        try:
            if recovering is not None:
                from controller.recovery import recover

                recover(directory, store, recovering)
            require_shared(directory, store)
        except BaseException:
            store.close()
            raise
        return store

    return open_store
