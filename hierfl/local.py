"""A whole federation on one machine (``hierfl up``, ``hierfl demo``): the same programs, as processes.

Nothing here takes a short cut: each program is started by its own command line, finds its kit on disk
and meets the others over mutual TLS. What is kept lies in one state folder:

    pki/ kits/        certificates (hierfl/provision.py)
    controller/       the controller's store, blobs, commit records, traces
    regions/<R>/      a combiner's zone store, blobs, traces
    clients/<name>/   held updates and traces of one client process
    ready/ logs/      where each program serves; what it said
    up.json lock      who is running this federation now (hierfl/statefolder.py)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hierfl import provision
from hierfl.config import ANY_PORT, FederationConfig, RegionConfig, SiteConfig
from hierfl.errors import AppError
from hierfl.processes import Child, Program, ProgramFailed, kill_all
from hierfl.statefolder import claim, end_leftovers
from hierfl.types import RegionId

__all__ = ["OPERATOR", "Federation", "serving"]

OPERATOR = "admin"
"""Name of the operator whose kit ``up`` makes."""
CONTROLLERS = ("controller", *(f"controller-{number}" for number in range(1, 9)))
"""Names of the controllers' processes: the first, and those that stand by to begin with."""
CLIENTS_PER_PROCESS = 32
"""Clients of one region and app that share a process; each keeps its own certificate and connection."""
RESTART_FIRST_S, RESTART_MOST_S = 1.0, 30.0
WELL_S = 5.0
"""What has served for so long was well: the pause before it is started again is the first one."""

Say = Callable[[str], None]
Arguments = Callable[[], list[str]]


class Federation:
    """The running processes of one federation. Made by ``serving``."""

    client_program: tuple[str, ...] = ("hierfl", "client", "run")
    """Module and arguments that clients are started with; benchmarks have others, with the same options."""

    def __init__(
        self,
        config: FederationConfig,
        state: Path,
        say: Say,
        watchers: asyncio.TaskGroup,
        *,
        restart: bool = True,
        well_s: float = WELL_S,
    ) -> None:
        """``watchers``: ends with the error of a process that cannot go on. ``restart``: others are started again, soon
        where they had served for ``well_s`` seconds, else ever more slowly."""
        self.config = config
        self.state = state
        self.fleet = uuid.uuid4().hex
        self.children: dict[str, Child] = {}
        self._say = say
        self._restart, self._well_s = restart, well_s
        self._group = watchers
        self._watchers: set[asyncio.Task[None]] = set()
        self._addresses: dict[str, list[str]] = {}

    @property
    def operator_kit(self) -> Path:
        return self.state / "kits" / "operators" / OPERATOR

    @property
    def controller_address(self) -> str:
        return self._addresses["controller"][0]

    @property
    def controller_addresses(self) -> tuple[str, ...]:
        """Of all controllers, whichever leads."""
        return tuple(self._addresses[name][0] for name in CONTROLLERS if name in self._addresses)

    async def start(self) -> None:
        """Start the controller, then all combiners at once, then the clients; returns when all serve.

        Raises:
            AppError: A site's app is a file that is not there; nothing was started.
            ProgramFailed: One of them ended.
        """
        _require_apps(self.config)
        self._say(f"certificates for {len(self.config.regions)} regions")
        provision_all(self.config, self.state)
        self._say("controller starting")
        for number in range(1 + self.config.controller.standbys):
            await self.start_controller(number)
        names = ", ".join(region.name for region in self.config.regions)
        self._say(f"combiners starting, each with its own Ray cluster: {names}")
        async with asyncio.TaskGroup() as group:
            for region in self.config.regions:
                group.create_task(self.start_region(region.name))

    async def start_controller(self, number: int = 0) -> None:
        """Start, or start again, a controller (0 or a stand-by's number): on the address it had before."""
        name, config = CONTROLLERS[number], self.config.controller

        def arguments() -> list[str]:
            listen = self._listen(name, config.listen if number == 0 else ANY_PORT)[0]
            options = ("--kit", self._kit("controller"), "--dir", self.state / "controller", "--listen", listen)
            store = ("--store", config.store) if config.store else ()
            return ["hierfl", "controller", "serve", *map(str, options), *store]

        await self._start(name, arguments)

    async def start_region(self, name: RegionId) -> None:
        """Start a region's combiner, then its clients."""
        await self.start_combiner(name)
        await self.start_clients(name)

    async def start_combiner(self, name: RegionId) -> None:
        """Start, or start again, a region's combiner: on the addresses it had before."""
        region = self.region(name)

        def arguments() -> list[str]:
            listens = self._listen(f"combiner-{name}", *map(str, region.addresses))
            options = [
                *("--kit", self._kit("regions", name, "combiner"), "--dir", self.state / "regions" / name),
                *(part for address in self.controller_addresses for part in ("--controller", address)),
                *("--intakes", region.intakes),
                *("--k", region.k, "--max-share", region.max_share),
                *(part for listen in listens for part in ("--listen", listen)),
            ]
            return ["hierfl", "combiner", "serve", *map(str, options)]

        await self._start(f"combiner-{name}", arguments)
        self._say(f"region {name} serves at {', '.join(self._addresses[f'combiner-{name}'])}")

    async def start_clients(self, name: RegionId) -> None:
        """Start a region's client processes."""
        addresses = self._addresses[f"combiner-{name}"]
        for number, sites in enumerate(_processes_of(self.region(name))):
            kits = [self._kit("sites", name, site.name, client) for site in sites for client in _client_names(site)]
            for kit in kits:
                provision.set_addresses(kit, addresses)
            process = f"clients-{name}-{number}"
            options = ["--dir", str(self.state / "clients" / process)]
            options += [part for kit in kits for part in ("--kit", str(kit))]
            options += [part for item in sites[0].options.items() for part in ("--set", "=".join(item))]
            command = [*self.client_program, sites[0].app, *options]
            await self._start(process, partial(list, command), has_ready_line=False)

    async def kill(self, name: str) -> None:
        """SIGKILL one process with all that it started, and leave it dead."""
        await self.children.pop(name).kill()

    async def stop(self) -> None:
        """End clients, combiners and controller, in this order; whatever is left is killed."""
        for watcher in self._watchers:
            watcher.cancel()
        for prefix in ("clients-", "combiner-", "controller"):
            stopping = [child.stop() for name, child in self.children.items() if name.startswith(prefix)]
            await asyncio.gather(*stopping)
        self.children.clear()
        await asyncio.to_thread(end_leftovers, self.state)

    def region(self, name: RegionId) -> RegionConfig:
        return next(region for region in self.config.regions if region.name == name)

    # --- one process

    async def _start(self, name: str, arguments: Arguments, *, has_ready_line: bool = True) -> None:
        """``arguments`` are made anew for each start: addresses once chosen are kept."""
        child = await self._launch(name, arguments, has_ready_line=has_ready_line)
        if has_ready_line:
            self._note_ready(name, await child.ready)
        watcher = self._group.create_task(self._keep_up(child, arguments))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    async def _launch(self, name: str, arguments: Arguments, *, has_ready_line: bool) -> Child:
        program = Program(
            name=name,
            argv=[sys.executable, "-m", *arguments()],
            log=self.state / "logs" / f"{name}.log",
            has_ready_line=has_ready_line,
        )
        child = self.children[name] = await Child.start(program, self.fleet)
        return child

    def _note_ready(self, name: str, document: dict[str, Any]) -> None:
        self._addresses[name] = document["addresses"]
        path = self.state / "ready" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))

    async def _keep_up(self, child: Child, arguments: Arguments) -> None:
        """Start a process again when it ends by itself, ever more slowly until it has been well again.

        Raises:
            ProgramFailed: It is not to be started again, or never ran and never will.
        """
        name, has_ready_line = child.name, child.program.has_ready_line
        began_s, tries = time.monotonic(), -1
        for number in itertools.count():
            failure = await child.failed()
            if self.children.get(name) is not child:
                return  # it was ended
            await child.kill()  # what outlived it would hold its ports
            if not self._restart or (failure.is_final and number == 0):
                raise failure
            tries = 0 if time.monotonic() - began_s > self._well_s else tries + 1
            pause_s = min(RESTART_FIRST_S * 2 ** min(tries, 10), RESTART_MOST_S)
            self._say(f"{failure}; starting it again in {pause_s:.0f} s")
            await asyncio.sleep(pause_s)
            if self.children.get(name) is not child:
                return
            child = await self._launch(name, arguments, has_ready_line=has_ready_line)
            if has_ready_line:
                with contextlib.suppress(ProgramFailed):  # said in the next turn
                    self._note_ready(name, await child.ready)
                    self._say(f"{name} serves again")
            began_s = time.monotonic()

    def _listen(self, name: str, *configured: str) -> list[str]:
        """The addresses it had before, where it has run here already, so that its peers find it again."""
        if any(not address.endswith(":0") for address in configured):
            return list(configured)
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
            before = json.loads((self.state / "ready" / f"{name}.json").read_text())["addresses"]
            if len(before) == len(configured):
                return list(before)
        return list(configured)

    def _kit(self, *parts: str) -> Path:
        return self.state.joinpath("kits", *parts)


def _require_apps(config: FederationConfig) -> None:
    apps = {site.app for region in config.regions for site in region.sites}
    missing = sorted(app for app in apps if app.endswith(".py") and not Path(app).is_file())
    if missing:
        raise AppError(f"there is no app file {missing[0]}; `app` of a site is a file beside the TOML, or a module")


def _client_names(site: SiteConfig) -> list[str]:
    return [f"client-{number:02d}" for number in range(site.clients)]


def _processes_of(region: RegionConfig) -> Iterator[list[SiteConfig]]:
    """Sites with the same app and options share a process, up to a bound."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[SiteConfig]] = {}
    for site in region.sites:
        groups.setdefault((site.app, tuple(site.options.items())), []).append(site)
    for sites in groups.values():
        yield from (sites[n : n + CLIENTS_PER_PROCESS] for n in range(0, len(sites), CLIENTS_PER_PROCESS))


def provision_all(config: FederationConfig, state: Path) -> None:
    """Make what certificates are missing; those that are there stay."""
    provision.init(state, config.name)
    provision.add_operator(state, OPERATOR, exist_ok=True)
    for region in config.regions:
        provision.add_region(state, region.name, exist_ok=True)
        for site in region.sites:
            provision.add_site(state, region.name, site.name, site.clients, exist_ok=True)


@asynccontextmanager
async def serving(
    config: FederationConfig,
    state: Path,
    say: Say,
    *,
    restart: bool = True,
    well_s: float = WELL_S,
    kind: type[Federation] = Federation,
) -> AsyncIterator[Federation]:
    """A federation, started; stopped at the end, also when starting failed or was interrupted.

    Raises:
        StoreLocked: This state folder's federation is running already.
        ProgramFailed: One of its processes cannot go on: what is done in the block is cancelled.
    """
    state.mkdir(parents=True, exist_ok=True)
    try:
        async with asyncio.TaskGroup() as watchers:
            federation = kind(config, state, say, watchers, restart=restart, well_s=well_s)
            with claim(state, federation.fleet):
                try:
                    await federation.start()
                    yield federation
                except asyncio.CancelledError:
                    say("stopping clients, combiners and controller; Ctrl-C again does not wait for their last words")
                    raise
                finally:
                    await _stop(federation)
    except BaseExceptionGroup as group:
        raise _first(group) from None


async def _stop(federation: Federation) -> None:
    """Stop all of it; whoever is asked a second time does not wait for what a stop seals and sends."""
    stopping = asyncio.ensure_future(federation.stop())
    try:
        await asyncio.shield(stopping)
    except asyncio.CancelledError:
        await asyncio.to_thread(kill_all, federation.fleet)
        await stopping
        raise


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of several failures: one clear line is worth more than all of them."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
