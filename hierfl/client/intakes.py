"""Which of its region's intakes a client dials: its own by the endpoint list, then others, the kit's addresses too.

The newest list is kept in the client's folder, so that a restart does not need the kit's addresses. One that
did not answer is passed over for a while. Dials nothing itself (``hierfl/client/link.py`` does).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from google.protobuf.message import DecodeError

from hierfl.client.files import write_durably
from hierfl.endpoints import Endpoint, EndpointList, Signed, accept_endpoints
from hierfl.errors import HierFLError, StaleEpoch, StorageError
from hierfl.pki import Kit
from hierfl.rendezvous import preference
from hierfl.wire import hierfl_pb2 as pb

__all__ = ["Intakes", "Target", "candidates"]

PASSED_OVER_S = 60.0
"""So long is an address that did not answer tried after all others."""
LISTED_FIRST = 2
"""So many of the list are tried before the kit's addresses: a site's firewall may know only these."""


@dataclass(frozen=True)
class Target:
    """An address to dial, and the intake's name where the list gives one."""

    address: str
    name: str = ""


def candidates(preferred: Iterable[Endpoint], kit_addresses: Iterable[str]) -> list[Target]:
    """What to dial, in order, each address once.

    Args:
        preferred: Of the list, in the client's order of preference.
        kit_addresses: ``host:port``, in the kit's order.
    """
    listed = [Target(one.address, one.name) for one in preferred]
    bootstrap = [Target(address) for address in kit_addresses]
    targets: dict[str, Target] = {}
    for target in (*listed[:LISTED_FIRST], *bootstrap, *listed[LISTED_FIRST:]):
        targets.setdefault(target.address, target)
    return list(targets.values())


class Intakes:
    """What one client knows of its region's intakes."""

    def __init__(self, kit: Kit, file: Path, say: Callable[[str], None]) -> None:
        """Begin with the list kept in ``file``, if it is there and still believed."""
        self._file, self._say = file, say
        self._client = kit.identity.uri
        self._preferred: list[Endpoint] = []
        self._failed_at_s: dict[str, float] = {}
        self.age = (0, 0)
        """Of the newest list."""
        self._load(kit)

    def _load(self, kit: Kit) -> None:
        try:
            self._take_up(pb.Endpoints.FromString(self._file.read_bytes()), kit)
        except FileNotFoundError:
            return
        except (OSError, DecodeError, HierFLError) as error:
            self._say(f"the list of intakes kept in {self._file} is not used, the kit's addresses are: {error}")

    def _take_up(self, message: pb.Endpoints, kit: Kit) -> EndpointList:
        signed = Signed(document=message.document, signature=message.signature, certificate=message.certificate)
        listed = accept_endpoints(signed, kit.identity, kit.trust, self.age, datetime.now(UTC))
        by_name = {one.name: one for one in listed.endpoints}
        self._preferred = [by_name[name] for name in preference(self._client, by_name)]
        self.age = listed.age
        return listed

    def take(self, message: pb.Endpoints, kit: Kit) -> None:
        """Take up a list from the combiner, and keep it. One that is not believed, or older, changes nothing."""
        try:
            before = self.age
            self._take_up(message, kit)
            if self.age > before:
                write_durably(self._file, (message.SerializeToString(),))
        except StaleEpoch as error:
            self._say(f"an older list of intakes was left aside: {error}")
        except StorageError as error:
            self._say(f"the list of intakes is used, but could not be kept: {error}")
        except HierFLError as error:
            self._say(f"a list of intakes was refused: {error}")

    @property
    def home(self) -> Target | None:
        """The intake that this client belongs to, by the list."""
        return Target(self._preferred[0].address, self._preferred[0].name) if self._preferred else None

    def targets(self, kit_addresses: Iterable[str], now_s: float | None = None) -> list[Target]:
        """What to dial, in order: those that did not answer of late come last, the latest last of all."""
        horizon_s = (time.monotonic() if now_s is None else now_s) - PASSED_OVER_S
        failed = {address: at_s for address, at_s in self._failed_at_s.items() if at_s > horizon_s}
        return sorted(
            candidates(self._preferred, kit_addresses), key=lambda target: failed.get(target.address, float("-inf"))
        )

    def failed(self, target: Target, now_s: float | None = None) -> None:
        """It did not answer."""
        self._failed_at_s[target.address] = time.monotonic() if now_s is None else now_s

    def answered(self, target: Target) -> None:
        self._failed_at_s.pop(target.address, None)
