"""Who somebody is: one name of one role in one federation, as a certificate's SAN URI says it.

A name proves nothing by itself: ``hierfl/certificates.py`` checks who signed it. The table ``_PATHS`` is
the only place that says how a role is written; reading is strict, so two spellings never mean one identity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from string import Formatter

from hierfl.errors import CertificateUntrusted, ConfigError
from hierfl.types import NAME_PATTERN, ClientId, ClientRef, RegionId, SiteId

__all__ = ["NAME_RULE", "Identity", "RoleName", "require_name"]

NAME_RULE = "must be 1 to 63 lower-case letters, digits and inner hyphens"


class RoleName(StrEnum):
    """What a certificate lets its holder be. ``hierfl/wire/access.py`` says what each may call."""

    CLIENT = "client"
    COMBINER = "combiner"
    REGION_OPERATOR = "region_operator"
    CONTROLLER = "controller"
    OPERATOR = "operator"


_PATHS: Mapping[RoleName, str] = {
    RoleName.CLIENT: "/region/{region}/site/{site}/client/{client}",
    RoleName.COMBINER: "/region/{region}/combiner",
    RoleName.REGION_OPERATOR: "/region/{region}/operator/{operator}",
    RoleName.CONTROLLER: "/controller",
    RoleName.OPERATOR: "/operator/{operator}",
}

_HOSTS: Mapping[RoleName, str] = {
    RoleName.COMBINER: "combiner.{region}.{federation}",
    RoleName.CONTROLLER: "controller.{federation}",
}
"""Names that servers are dialled by, whatever their address is."""

_WORDS: Mapping[RoleName, str] = {
    RoleName.CLIENT: "client {region}/{site}/{client}",
    RoleName.COMBINER: "the combiner of {region}",
    RoleName.REGION_OPERATOR: "operator {operator} of {region}",
    RoleName.CONTROLLER: "the controller",
    RoleName.OPERATOR: "operator {operator}",
}

_FIELDS: Mapping[RoleName, frozenset[str]] = {
    role: frozenset(name for _, name, _, _ in Formatter().parse(path) if name) for role, path in _PATHS.items()
}
"""Which names a role has; the others stay empty."""


def _pattern(path: str) -> re.Pattern[str]:
    """The regular expression that reads a URI back into its names."""
    names = re.sub(r"\{(\w+)\}", rf"(?P<\1>{NAME_PATTERN.pattern})", path)
    return re.compile(rf"spiffe://(?P<federation>{NAME_PATTERN.pattern}){names}", re.ASCII)


_PATTERNS: Mapping[RoleName, re.Pattern[str]] = {role: _pattern(path) for role, path in _PATHS.items()}


def require_name(key: str, value: str) -> None:
    """Raise ``ConfigError`` under ``key`` unless ``value`` is a name (``hierfl.types.NAME_PATTERN``)."""
    if not NAME_PATTERN.fullmatch(value):
        raise ConfigError(key, value, NAME_RULE)


@dataclass(frozen=True, order=True)
class Identity:
    """One holder of a certificate. Names that the role does not have are empty.

    Raises:
        ConfigError: A name is no DNS label, is missing, or is one that the role does not have.
    """

    federation: str
    role: RoleName
    region: str = ""
    site: str = ""
    client: str = ""
    operator: str = ""

    def __post_init__(self) -> None:
        require_name("federation", self.federation)
        for name in ("region", "site", "client", "operator"):
            value = getattr(self, name)
            if name in _FIELDS[self.role]:
                require_name(name, value)
            elif value:
                raise ConfigError(name, value, f"is not part of the name of a {self.role}")

    @classmethod
    def parse(cls, uri: str) -> Identity:
        """Read a SAN URI back.

        Raises:
            CertificateUntrusted: It is no identity of hierfl, letter by letter.
        """
        for role, pattern in _PATTERNS.items():
            if match := pattern.fullmatch(uri):
                return cls(role=role, **match.groupdict())
        raise CertificateUntrusted(f"the certificate names {uri[:300]!r}, which is no identity of a federation")

    @property
    def uri(self) -> str:
        """The SAN URI: ``spiffe://<federation>/region/<R>/site/<S>/client/<C>`` and so on."""
        return f"spiffe://{self.federation}" + _PATHS[self.role].format_map(vars(self))

    @property
    def dns_name(self) -> str:
        """The DNS SAN of a server, which callers set as target name; empty where the role never serves."""
        return _HOSTS.get(self.role, "").format_map(vars(self))

    @property
    def client_ref(self) -> ClientRef:
        """The client as receipts and keys name it. ``ValueError`` for every other role."""
        if self.role is not RoleName.CLIENT:
            raise ValueError(f"{self} is no client")
        return ClientRef(RegionId(self.region), SiteId(self.site), ClientId(self.client))

    @property
    def dials(self) -> Identity | None:
        """The one server that this identity connects to; ``None`` for the controller."""
        if self.role in (RoleName.CLIENT, RoleName.REGION_OPERATOR):
            return Identity(self.federation, RoleName.COMBINER, region=self.region)
        if self.role in (RoleName.COMBINER, RoleName.OPERATOR):
            return Identity(self.federation, RoleName.CONTROLLER)
        return None

    def __str__(self) -> str:
        """For people: ``client eu/site-00/client-00``."""
        return _WORDS[self.role].format_map(vars(self))
