"""One controller as a whole: opened, serving, closed. ``command.py`` runs it as a process, tests on their own loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType

from controller.blobs import Blobs
from controller.commits import Commits
from controller.leader import Leader, checker
from controller.service import make_server
from controller.store import SqliteStore, Store
from hierfl import kernels, observe
from hierfl.errors import ConfigError
from hierfl.pki import Kit, RoleName
from hierfl.wire import tls

__all__ = ["ControllerApp"]

GRACE_S = 0.5
"""For answers that are on their way when the controller stops."""


class ControllerApp:
    """Serves from ``__aenter__`` to ``__aexit__``; what it knows is in ``directory``, and it goes on from there.

    Args:
        kit: The controller's.
        directory: Of ``controller.sqlite``, ``blobs/``, ``commits/``, ``traces/``; made if it is not there.
        listen: ``host:port``, port 0 for any free one.
        open_store: Opens the store for a directory and a federation.
    """

    def __init__(
        self,
        kit: Kit,
        directory: Path,
        listen: str = "127.0.0.1:0",
        *,
        open_store: Callable[[Path, str], Store] | None = None,
    ) -> None:
        if kit.identity.role is not RoleName.CONTROLLER:
            raise ConfigError("kit", str(kit.path), f"is the kit of {kit.identity}, not of the controller")
        self._kit, self._directory, self._listen = kit, directory, listen
        self._open_store = open_store or _open_sqlite
        self._stack = AsyncExitStack()
        self.address = ""
        """``host:port`` that it listens on."""

    async def __aenter__(self) -> ControllerApp:
        """Open, take the lead, serve.

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
        store = self._open_store(self._directory, self._kit.identity.federation)
        self._stack.callback(store.close)
        blobs = Blobs(self._directory / "blobs")
        commits = Commits(self._directory / "commits", checker(self._kit))
        self.leader = Leader(self._kit, store, blobs, commits, asyncio.get_running_loop().time)
        server = make_server(self.leader)
        port = tls.bind(server, self._listen, tls.server_credentials(self._kit))
        self._stack.callback(observe.flush)
        self._stack.push_async_callback(server.stop, GRACE_S)
        self._stack.push_async_callback(self.leader.stop)
        self.leader.start()
        await server.start()
        self.address = f"{self._listen.rpartition(':')[0]}:{port}"

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def failed(self) -> None:
        """Wait until this controller cannot go on, and raise why."""
        await asyncio.shield(self.leader.failed)


def _open_sqlite(directory: Path, federation: str) -> Store:
    return SqliteStore(directory / "controller.sqlite", federation)
