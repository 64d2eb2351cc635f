"""One combiner as a process: starts (or joins) the region's Ray, its Region and Intakes; drains; leaves nothing.

Everything of the region's own Ray listens on loopback, with a token of its own; nothing spills to disk. A
cluster that is joined keeps its own settings and its own life: only the actors made here end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from combiners.settings import IntakeSettings, RegionSettings
from hierfl.config import Address
from hierfl.errors import ConfigError, HierFLError, PortInUse, StorageError, StoreLocked, Unreachable
from hierfl.leftovers import adopt_orphans, clean_up, clean_up_predecessor, make_temporary
from hierfl.pki import Kit, RoleName

__all__ = ["Combiner", "CombinerSettings", "load_kit", "run_combiner"]

logger = logging.getLogger(__name__)

NAMESPACE = "hierfl"
REGION = "region"
"""Name of the Region's actor, in the region's namespace: there is one."""
DRAIN_S = 10.0
PORT_TRIES = 5
MEMORY_SHARE = 0.3
NO_SPILLING = '{"automatic_object_spilling_enabled": false}'
LEAST_MEMORY, MOST_MEMORY = 100 * 2**20, 2**32
"""Of Ray's object store, in bytes: it has two or three models, and hand-overs, and is touched only as far as used."""

_OWN_RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what keeps every socket on loopback
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",  # else the actors lose to clients on the same cores
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "MALLOC_ARENA_MAX": "1",  # what is freed stays for the next round (hierfl/buffers.py)
}


@dataclass(frozen=True, kw_only=True)
class CombinerSettings:
    """What ``combiner serve`` is told."""

    kit: Path
    directory: Path
    controllers: tuple[str, ...] = ()
    """Addresses of the controller; empty: the kit's."""
    listen: tuple[str, ...] = ("127.0.0.1:0",)
    """One for each intake; a single one with port 0 is for all."""
    advertise: tuple[str, ...] = ()
    """As clients reach the intakes, by the same rule; port 0: the port that it listens on. Empty: as ``listen``."""
    intakes: int = 1
    ray_address: str = ""
    """Of a cluster to join; empty: a local one of its own."""
    region: RegionSettings = field(default_factory=RegionSettings)
    intake: IntakeSettings = field(default_factory=IntakeSettings)

    def __post_init__(self) -> None:
        if self.intakes < 1:
            raise ConfigError("--intakes", self.intakes, "must be at least 1")
        for one in (*self.listen, *self.advertise, *self.controllers):
            self._port(one)
        self._check_one_each("--listen", self.listen)
        if self.advertise:
            self._check_one_each("--advertise", self.advertise)

    def _check_one_each(self, option: str, addresses: tuple[str, ...]) -> None:
        if len(addresses) not in (1, self.intakes):
            raise ConfigError(
                option, ", ".join(addresses), f"must be given once, or once for each of {self.intakes} intakes"
            )
        if len(addresses) < self.intakes and self._port(addresses[0]):
            raise ConfigError(
                option, addresses[0], "is one fixed port for several intakes; give each its own, or port 0"
            )

    @staticmethod
    def _port(address: str) -> int:
        try:
            return Address.parse(address)[1]
        except ValueError as error:
            raise ConfigError("address", address, str(error)) from None

    @property
    def intake_settings(self) -> IntakeSettings:
        """As the intakes get them. Shards are chosen by themselves in a cluster that may have other machines only: on
        one machine they have no more memory than the intake."""
        shards = self.intake.shards
        if shards is None and not self.ray_address:
            shards = 0
        return replace(self.intake, shards=shards, actors=1 + self.intakes * (1 + (shards or 0)))

    def listen_of(self, number: int) -> str:
        """Where intake ``number`` listens."""
        return self.listen[number if len(self.listen) > 1 else 0]

    def advertise_of(self, number: int) -> str:
        """Where clients reach intake ``number``; empty: where it listens."""
        return self.advertise[number if len(self.advertise) > 1 else 0] if self.advertise else ""


class Combiner:
    """The running actors of one region."""

    def __init__(self, region: Any, intakes: list[Any], addresses: tuple[str, ...]) -> None:
        self.region, self.intakes, self.addresses = region, intakes, addresses

    async def failed(self) -> None:
        """Waits; raises what the region cannot go on after. A Region that Ray restarts is waited for again."""
        from ray.exceptions import ActorUnavailableError

        while True:
            try:
                await self.region.failed.remote()
            except ActorUnavailableError:
                logger.warning("the region's actor is being restarted")
                await asyncio.sleep(1.0)

    async def drain(self) -> None:
        """Stop admitting, seal or hand back, leave."""
        await _quietly(*(intake.stop_admitting.remote() for intake in self.intakes))
        await _quietly(self.region.drain.remote(DRAIN_S))
        await _quietly(*(intake.stop.remote() for intake in self.intakes))
        await _quietly(self.region.stop.remote())


async def _quietly(*references: Any) -> None:
    """Wait for calls whose actors may be gone already."""
    for answer in await asyncio.gather(*references, return_exceptions=True):
        if isinstance(answer, BaseException):
            logger.debug("while stopping: %s", answer)


def load_kit(path: Path) -> Kit:
    """A combiner's kit.

    Raises:
        ConfigError: It is somebody else's.
        IdentityError: As ``Kit.load``.
    """
    kit = Kit.load(path)
    if kit.identity.role is not RoleName.COMBINER:
        raise ConfigError("--kit", str(path), f"must be a combiner's kit, it is that of {kit.identity}")
    return kit


def _check_ports(listen: tuple[str, ...]) -> None:
    """Find a taken port before Ray is started; its intake will find it again, if it is taken meanwhile."""
    from hierfl.wire import tls

    for address in listen:
        tls.probe(address)


@asynccontextmanager
async def run_combiner(
    settings: CombinerSettings, on_ray: Callable[[], None] = lambda: None
) -> AsyncIterator[Combiner]:
    """Start a combiner; at the end it is drained, and nothing of it is left.

    Args:
        settings: See there.
        on_ray: Called once Ray runs: it has put signal handlers of its own in place.
    Raises:
        ConfigError: The kit is none, or names no controller, and so on.
        StoreLocked, StoreTooNew, DiskFull: The zone store cannot be had.
        PortInUse: Another program listens on a port asked for.
        Unreachable: The cluster to join does not answer.
    """
    kit = load_kit(settings.kit)
    controllers = settings.controllers or kit.addresses
    if not controllers:
        raise ConfigError("--controller", None, "is needed: the kit names no controller either")
    if not settings.ray_address:
        _check_ports(settings.listen)
    with _alone(settings.directory), _ray(settings, f"{NAMESPACE}.{kit.identity.federation}.{kit.identity.region}"):
        on_ray()
        combiner = await _start(settings, controllers)
        try:
            yield combiner
        finally:
            await combiner.drain()


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One combiner at a time works in ``directory``; the other one hears of it before it has started anything."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"{directory} cannot be used: {error.strerror}; check --dir") from None
    try:
        _lock(descriptor, directory)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreLocked(f"another combiner works in {directory}; stop that one, or give --dir another") from None


@contextlib.contextmanager
def _ray(settings: CombinerSettings, namespace: str) -> Iterator[None]:
    """The cluster, for as long as the block lasts; in it stdout is stderr, since Ray prints where it likes."""
    stdout = sys.stdout
    sys.stdout = sys.stderr
    start = _joined if settings.ray_address else _own
    try:
        with start(settings, namespace):
            yield
    finally:
        sys.stdout = stdout


@contextlib.contextmanager
def _joined(settings: CombinerSettings, namespace: str) -> Iterator[None]:
    import ray

    try:
        ray.init(address=settings.ray_address, namespace=namespace, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise Unreachable(
            f"the Ray cluster at {settings.ray_address} does not answer: {error};"
            " check --ray-address, and RAY_AUTH_TOKEN if that cluster asks for one"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _own(settings: CombinerSettings, namespace: str) -> Iterator[None]:
    note = settings.directory / "ray.json"
    clean_up_predecessor(note)
    adopt_orphans()
    folder = make_temporary(note)
    os.environ.update(_OWN_RAY, RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_TMPDIR=str(folder))
    try:
        _init(namespace, folder)
        try:
            yield
        finally:
            import ray

            ray.shutdown()
    finally:
        clean_up(folder, note)


def _init(namespace: str, folder: Path) -> None:
    import ray

    try:
        ray.init(
            address="local",
            namespace=namespace,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder / "r"),  # Ray opens its own folder to everybody; the one around it is not
            include_dashboard=False,
            num_cpus=1,
            object_store_memory=_object_store_bytes(),
            _system_config={"automatic_object_spilling_enabled": False},
            logging_level=logging.WARNING,
        )
    except Exception as error:  # Ray raises bare ones
        if "timed out" not in str(error):
            raise
        ray.shutdown()
        raise Unreachable(
            "Ray did not start in the time it gives itself: is this machine overloaded, or short of memory? Try again"
        ) from None


def _object_store_bytes() -> int:
    """A part of what shared memory has left, within bounds."""
    try:
        free = shutil.disk_usage("/dev/shm").free  # noqa: S108 - Ray's object store lives there
    except OSError:
        free = 0
    return max(LEAST_MEMORY, min(MOST_MEMORY, int(MEMORY_SHARE * free)))


async def _start(settings: CombinerSettings, controllers: tuple[str, ...]) -> Combiner:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from combiners.actor import remote_intake, remote_region

    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    directory, kit = settings.directory.resolve(), settings.kit.resolve()
    settings = _with_safe_shards(settings)
    try:
        region = remote_region(name=REGION, scheduling_strategy=here).remote(
            kit, directory, controllers, settings.region
        )
    except ValueError:
        raise StoreLocked(
            f"a combiner of this region runs in the Ray cluster at {settings.ray_address} already"
        ) from None
    try:
        await _made(region)
        numbers = range(settings.intakes)
        started = await asyncio.gather(
            *(_start_intake(remote_intake, settings, number, kit, directory) for number in numbers)
        )
    except BaseException:
        ray.kill(region)
        raise
    return Combiner(region, [handle for handle, _ in started], tuple(address for _, address in started))


def _with_safe_shards(settings: CombinerSettings) -> CombinerSettings:
    """Updates pass through Ray's object store on their way to shards: it must not write what it holds to a disk.

    Raises:
        ConfigError: Shards are asked for in a cluster that does.
    """
    from ray._private.state import state

    if not settings.ray_address or settings.intake.shards == 0:
        return settings
    if not state.get_system_config().get("automatic_object_spilling_enabled", True):
        return settings
    if settings.intake.shards is not None:
        rule = "needs a cluster that spills no objects to a disk: start its head with --system-config " + repr(
            NO_SPILLING
        )
        raise ConfigError("--shards", settings.intake.shards, rule)
    logger.warning("no shards, however large a model is: the cluster that was joined spills objects to a disk")
    return replace(settings, intake=replace(settings.intake, shards=0))


async def _start_intake(
    remote_intake: Any, settings: CombinerSettings, number: int, kit: Path, directory: Path
) -> tuple[Any, str]:
    """An intake on a port that it keeps when it is restarted: port 0 is chosen here, once."""
    host, port = Address.parse(settings.listen_of(number))
    for attempt in range(PORT_TRIES):
        chosen = f"{host}:{port or _free_port(host)}"
        handle = remote_intake().remote(
            f"intake-{number}", kit, directory, chosen, settings.advertise_of(number), REGION, settings.intake_settings
        )
        try:
            await _made(handle)
        except PortInUse:
            if port or attempt == PORT_TRIES - 1:
                raise
        else:
            return handle, chosen
    raise AssertionError("the last try returns or raises")


async def _made(handle: Any) -> None:
    """Wait until an actor serves; what kept it from that is raised as itself."""
    from ray.exceptions import RayTaskError

    try:
        await handle.ready.remote()
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise cause if isinstance(cause, HierFLError) else error from None


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host.strip("[]"), 0))
        return int(probe.getsockname()[1])
