"""The region's endpoint list: which intakes there are and where clients reach them, signed, newest version last.

A list is made once the intakes have not changed for a while, and only where it differs from the last one: an
intake that is restarted on its address moves no client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from hierfl.endpoints import Endpoint, EndpointList, sign_endpoints
from hierfl.pki import Kit
from hierfl.wire import hierfl_pb2 as pb

__all__ = ["Directory"]

MOST_SETTLES = 5
"""An intake that comes and goes without end does not keep the others out of the list for longer."""


class Directory:
    """Makes the lists of one Region start."""

    def __init__(self, kit: Kit, region_epoch: int, settle_s: float) -> None:
        self._kit, self._region_epoch, self._settle_s = kit, region_epoch, settle_s
        self._listed: tuple[Endpoint, ...] = ()
        self._version = 0
        self._changed = asyncio.Event()
        self.newest = b""
        """Signed (``pb.Endpoints``); empty before the first."""

    def changed(self) -> None:
        """An intake came or went."""
        self._changed.set()

    async def run(self, intakes: Callable[[], Iterable[Endpoint]], publish: Callable[[bytes], None]) -> None:
        """Publish each new list, for as long as the Region lives."""
        while True:
            await self._changed.wait()
            for _ in range(MOST_SETTLES):
                self._changed.clear()
                await asyncio.sleep(self._settle_s)
                if not self._changed.is_set():
                    break
            if self._renew(intakes()):
                publish(self.newest)

    def _renew(self, intakes: Iterable[Endpoint]) -> bool:
        """Make the list of these intakes, those without an address left out. Whether it is another one."""
        listed = tuple(sorted((one for one in intakes if one.address), key=lambda one: one.name))
        if listed == self._listed:
            return False
        self._listed = listed
        self._version += 1
        own = self._kit.identity
        signed = sign_endpoints(
            self._kit,
            EndpointList(
                federation=own.federation,
                region=own.region,
                region_epoch=self._region_epoch,
                version=self._version,
                endpoints=listed,
            ),
        )
        self.newest = pb.Endpoints(
            document=signed.document, signature=signed.signature, certificate=signed.certificate
        ).SerializeToString()
        return True
