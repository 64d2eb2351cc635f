"""TCP between a program and its server, in the test's own loop: counts what passes, and cuts connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

BLOCK = 65_536


class Proxy:
    """Passes bytes on; ``up`` is towards the server. Each entry of a ``cut_*`` list cuts one connection, once."""

    def __init__(self, target: str, cut_up: Sequence[int] = (), cut_down: Sequence[int] = ()) -> None:
        """``cut_up``, ``cut_down``: bytes of one connection after which it breaks off, in that direction."""
        self._target = target
        self._cuts = {"up": list(cut_up), "down": list(cut_down)}
        self._connections: set[asyncio.Task[None]] = set()
        self.bytes = {"up": 0, "down": 0}
        """Passed so far, of all connections."""
        self.num_cut = 0
        self.address = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def cut_next(self, direction: str, num_bytes: int) -> None:
        """Cut the next connection of which so many bytes have passed."""
        self._cuts[direction].append(num_bytes)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            host, _, port = self._target.rpartition(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            try:
                ways = (self._pass("up", reader, far_writer), self._pass("down", far_reader, writer))
                tasks = [asyncio.ensure_future(way) for way in ways]
                try:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in tasks:
                        way.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
            finally:
                far_writer.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass  # the server is not there, or the proxy stops: neither is this connection
        finally:
            writer.transport.abort()
            self._connections.discard(task)

    async def _pass(self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed, cuts = 0, self._cuts[direction]
        while block := await reader.read(BLOCK):
            writer.write(block)
            await writer.drain()
            passed += len(block)
            self.bytes[direction] += len(block)
            if cuts and passed >= cuts[0]:
                cuts.pop(0)
                self.num_cut += 1
                return


@asynccontextmanager
async def proxy_to(target: str, **cuts: Sequence[int]) -> AsyncIterator[Proxy]:
    proxy = Proxy(target, **cuts)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
