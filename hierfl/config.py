"""The files an operator writes, as frozen dataclasses: ``job.toml`` and ``federation.toml``.

Read once at the edge and passed down as values; nothing below looks at a file or at the environment.
``load_job`` and ``load_federation`` report everything that is wrong with a file at once
(``hierfl/toml.py`` reads strictly; ``hierfl init`` writes commented examples of both).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

from hierfl.errors import ConfigError, ConfigErrors
from hierfl.job import Job, StrategyChoice, UpdateChoice
from hierfl.toml import Reading, build, open_toml
from hierfl.types import NAME_PATTERN, RegionId, SiteId

__all__ = [
    "ANY_PORT",
    "Address",
    "ControllerConfig",
    "FederationConfig",
    "RegionConfig",
    "SiteConfig",
    "check_store_url",
    "load_federation",
    "load_job",
]

ANY_PORT = "127.0.0.1:0"
"""Loopback, any free port: the ready-file says which."""
MAX_PORT = 65_535
_NAME_RULE = "must be 1 to 63 lower-case letters, digits and inner hyphens"


class Address(NamedTuple):
    """Where a server listens, or is reached."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``host:port``; an IPv6 host stands in brackets. ``ValueError`` says what it must be."""
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if not colon or not host or not port.isdecimal() or int(port) > MAX_PORT or (":" in host and not bracketed):
            raise ValueError("must be HOST:PORT, such as 127.0.0.1:4433 (port 0: any free one)")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def check_store_url(key: str, url: str) -> None:
    """Raises ``ConfigError`` unless ``url`` is one of a Redis, without a password: that stands in a file of its own."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    is_there = parts.path if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in ("redis", "rediss", "unix") or not is_there:
        raise ConfigError(key, url, "must be redis://[USER@]HOST:PORT[/DB], rediss:// for TLS, or unix://[USER@]/PATH")
    if parts.password is not None:
        hidden = url.replace(f":{parts.password}@", ":...@")
        raise ConfigError(key, hidden, "must hold no password: HIERFL_STORE_PASSWORD_FILE names a file with it")
    if parts.query or parts.fragment:
        raise ConfigError(key, url, "must end with the address: settings of the connection are hierfl's own")


class _Rules:
    """Collects the broken rules of one dataclass, to raise them together."""

    def __init__(self) -> None:
        self._broken: list[ConfigError] = []

    def require(self, key: str, value: object, ok: bool, rule: str) -> None:
        if not ok:
            self._broken.append(ConfigError(key, value, rule))

    def require_name(self, key: str, value: str) -> None:
        self.require(key, value, NAME_PATTERN.fullmatch(value) is not None, _NAME_RULE)

    def require_clients(self, value: int) -> None:
        self.require("clients", value, 1 <= value <= 10_000, "must be from 1 to 10,000")

    def require_address(self, key: str, value: str, ports: int = 1) -> None:
        try:
            last = Address.parse(value).port + ports - 1
        except ValueError as error:
            self._broken.append(ConfigError(key, value, str(error)))
        else:
            self.require(key, value, last <= MAX_PORT, f"must leave room for {ports} ports, one for each intake")

    def require_store(self, key: str, url: str) -> None:
        try:
            check_store_url(key, url)
        except ConfigError as error:
            self._broken.append(error)

    def finish(self) -> None:
        if self._broken:
            raise ConfigErrors(tuple(self._broken))


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """One site of a region: how many clients it runs, and what they run."""

    name: SiteId
    app: str
    """File or module of the app: ``app.py``, from a file's own folder, or ``package.module``."""
    clients: int = 1
    options: Mapping[str, str] = field(default_factory=dict)
    """What the app finds in ``task.site_config``, such as the path of the site's data."""

    def __post_init__(self) -> None:
        rules = _Rules()
        rules.require_name("name", self.name)
        rules.require("app", self.app, bool(self.app.strip()), "must name the app's file or module")
        rules.require_clients(self.clients)
        rules.finish()


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """One region: its combiner, its border, its sites."""

    name: RegionId
    sites: tuple[SiteConfig, ...]
    listen: str = ANY_PORT
    """Address of the first intake; the next ones take the ports after it, or any free ones for port 0."""
    intakes: int = 1
    """Servers for clients, each in a process of its own."""
    k: int = 3
    """Fewest sites in a sum that leaves the region."""
    max_share: float = 0.8
    """Largest share of one site in the weight of such a sum, 0 to 1."""

    def __post_init__(self) -> None:
        rules = _Rules()
        num_sites = len(self.sites)
        rules.require_name("name", self.name)
        rules.require("intakes", self.intakes, 1 <= self.intakes <= 64, "must be from 1 to 64")
        rules.require_address("listen", self.listen, self.intakes if self.fixed_ports else 1)
        rules.require("k", self.k, self.k >= 2, "must be at least 2: one site's sum is its update")
        rules.require("k", self.k, self.k < 2 or self.k <= num_sites, self._too_few(num_sites))
        rules.require("max_share", self.max_share, 0 < self.max_share <= 1, "must be above 0, at most 1")
        rules.require(
            "max_share",
            self.max_share,
            not 0 < self.max_share * num_sites < 1,
            f"must be at least 1/{num_sites}: some site always has that share",
        )
        for site, times in Counter(site.name for site in self.sites).items():
            rules.require("sites", site, times == 1, "is there twice; sites of a region need names of their own")
        rules.finish()

    @staticmethod
    def _too_few(num_sites: int) -> str:
        return f"must be at most the region's number of sites, {num_sites}; else nothing ever leaves it"

    @property
    def fixed_ports(self) -> bool:
        """Whether ports were asked for by number."""
        return not self.listen.endswith(":0")

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where each intake listens."""
        first = Address.parse(self.listen)
        step = 1 if self.fixed_ports else 0
        return tuple(Address(first.host, first.port + step * n) for n in range(self.intakes))


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """``[controller]``."""

    listen: str = ANY_PORT
    store: str = ""
    """URL of a Redis for its rows; a SQLite file in its folder where empty. A password is in the environment."""
    standbys: int = 0
    """Further controllers, on any free ports: with a Redis only. One leads, the next takes over."""

    def __post_init__(self) -> None:
        rules = _Rules()
        rules.require_address("listen", self.listen)
        if self.store:
            rules.require_store("store", self.store)
        rules.require("standbys", self.standbys, 0 <= self.standbys <= 8, "must be from 0 to 8")
        rules.require("standbys", self.standbys, not self.standbys or bool(self.store), "needs a `store` they share")
        rules.finish()


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """A whole federation on one machine: what ``hierfl up`` starts."""

    name: str
    regions: tuple[RegionConfig, ...]
    controller: ControllerConfig = field(default_factory=ControllerConfig)

    def __post_init__(self) -> None:
        rules = _Rules()
        rules.require_name("federation.name", self.name)
        rules.require("regions", None, bool(self.regions), "must have at least one region, such as [regions.eu-west]")
        for region, times in Counter(region.name for region in self.regions).items():
            rules.require(f"regions.{region}", None, times == 1, "is there twice; regions need names of their own")
        owners: dict[Address, str] = {}
        for owner, address in self._fixed_addresses():
            other = owners.setdefault(address, owner)
            rules.require(f"{owner}.listen", str(address), other == owner, f"is taken by {other}; give each its own")
        rules.finish()

    def _fixed_addresses(self) -> Iterable[tuple[str, Address]]:
        controller = Address.parse(self.controller.listen)
        if controller.port:
            yield "controller", controller
        for region in self.regions:
            if region.fixed_ports:
                yield from ((f"regions.{region.name}", address) for address in region.addresses)


# --- job.toml


def load_job(path: Path, overrides: Iterable[str] = ()) -> Job:
    """Read a job, with the ``KEY=VALUE`` of ``--set`` laid over it; options of strategy and encoding are checked too.

    Raises:
        NotFound: There is no such file.
        ConfigError: Something is wrong; ``ConfigErrors`` where it is more than one thing.
    """
    reading = open_toml(path, overrides)
    job = build(Job, reading.table, reading, rest={StrategyChoice: "options", UpdateChoice: "options"})
    if job is not None:
        _check_choices(job, reading)
    reading.finish()
    assert job is not None, "a job that was not made has an error noted"
    return job


def _check_choices(job: Job, reading: Reading) -> None:
    from hierfl import encodings, strategies  # they need NumPy, which reading a file does not

    try:
        strategies.get(job.strategy.name, job.strategy.options)
    except ConfigError as error:
        _note(reading, error, "strategy")
    try:
        encodings.get(job.updates.encoding, job.updates.options)
    except ConfigError as error:
        _note(reading, error, "updates")


def _note(reading: Reading, error: ConfigError, path: str) -> None:
    """Add an error, or all of several, under ``path``."""
    for one in getattr(error, "errors", (error,)):
        reading.add(f"{path}.{one.key.removeprefix(path + '.')}" if path else one.key, one.value, one.rule)


# --- federation.toml


@dataclass(frozen=True, kw_only=True)
class _Head:
    name: str


@dataclass(frozen=True, kw_only=True)
class _SiteTable:
    """``[site]``, and ``[regions.REGION.sites.SITE]`` over it."""

    app: str = ""
    clients: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rules = _Rules()
        rules.require_clients(self.clients if self.clients is not None else 1)
        rules.finish()


@dataclass(frozen=True, kw_only=True)
class _RegionTable:
    sites: int | tuple[str, ...] | Mapping[str, _SiteTable]
    listen: str = RegionConfig.listen
    intakes: int = RegionConfig.intakes
    k: int = RegionConfig.k
    max_share: float = RegionConfig.max_share

    def __post_init__(self) -> None:
        rules = _Rules()
        if isinstance(self.sites, int):
            rules.require("sites", self.sites, 1 <= self.sites <= 1_000, "must be from 1 to 1,000, or a list of names")
        rules.finish()


@dataclass(frozen=True, kw_only=True)
class _File:
    federation: _Head
    regions: Mapping[str, _RegionTable]
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    site: _SiteTable = field(default_factory=_SiteTable)


def load_federation(path: Path, overrides: Iterable[str] = ()) -> FederationConfig:
    """Read a federation, with the ``KEY=VALUE`` of ``--set`` laid over it.

    Sites given by number are called ``site-00``, ``site-01``, ... through the whole file, so that their
    names, and with them their data and seeds, do not depend on how they are grouped into regions.

    Raises:
        NotFound: There is no such file.
        ConfigError: Something is wrong; ``ConfigErrors`` where it is more than one thing.
    """
    reading = open_toml(path, overrides)
    file = build(_File, reading.table, reading)
    federation = None if file is None else _federation(file, reading)
    reading.finish()
    assert federation is not None, "a federation that was not made has an error noted"
    return federation


def _federation(file: _File, reading: Reading) -> FederationConfig | None:
    numbers = count()
    regions = [_region(name, table, file.site, numbers, reading) for name, table in file.regions.items()]
    made = tuple(region for region in regions if region is not None)
    if len(made) < len(reading.table["regions"]):  # those that are wrong have been noted
        return None
    try:
        return FederationConfig(name=file.federation.name, controller=file.controller, regions=made)
    except ConfigError as error:
        _note(reading, error, "")
        return None


def _region(
    name: str, table: _RegionTable, defaults: _SiteTable, numbers: Iterator[int], reading: Reading
) -> RegionConfig | None:
    path = f"regions.{name}"
    tables = _site_tables(table.sites, numbers)
    sites = [_site(site, own, defaults, f"{path}.sites.{site}", reading) for site, own in tables]
    try:
        region = RegionConfig(
            name=RegionId(name),
            sites=tuple(site for site in sites if site is not None),
            listen=table.listen,
            intakes=table.intakes,
            k=table.k,
            max_share=table.max_share,
        )
    except ConfigError as error:
        _note(reading, error, path)
        return None
    return None if None in sites else region


def _site_tables(
    sites: int | tuple[str, ...] | Mapping[str, _SiteTable], numbers: Iterator[int]
) -> list[tuple[str, _SiteTable]]:
    """Names of a region's sites, each with the keys that it has of its own."""
    if isinstance(sites, Mapping):
        return list(sites.items())
    if isinstance(sites, int):
        sites = tuple(f"site-{number:02d}" for number in islice(numbers, sites))
    return [(name, _SiteTable()) for name in sites]


def _site(name: str, table: _SiteTable, defaults: _SiteTable, path: str, reading: Reading) -> SiteConfig | None:
    app = table.app or defaults.app or "app.py"
    try:
        return SiteConfig(
            name=SiteId(name),
            app=str(reading.path.parent / app) if app.endswith(".py") else app,
            clients=table.clients or defaults.clients or 1,
            options={**defaults.options, **table.options},
        )
    except ConfigError as error:
        _note(reading, error, path)
        return None
