"""Run clients: many in one process, each with its own kit, connection and folder; user code in turn.

Ctrl-C and SIGTERM end it the same way: the combiner is told not to wait, connections close, what is held
stays held. User code at work is left behind, not waited for.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hierfl import buffers, observe
from hierfl.client.app import App
from hierfl.client.link import checked
from hierfl.client.offers import SitePolicy
from hierfl.client.session import Session
from hierfl.client.site import Site
from hierfl.client.worker import Worker
from hierfl.errors import ConfigError, Interrupted
from hierfl.pki import Kit
from hierfl.types import AttemptKey, ClientRef

__all__ = ["run", "serve"]

Say = Callable[[str], None]


def run(
    app: App,
    kits: Sequence[Kit | Path | str],
    directory: Path | str,
    *,
    site_config: Mapping[str, str] | None = None,
    min_k: int = 2,
    workers: int = 1,
    max_rounds: int | None = None,
    say: Say = print,
) -> None:
    """Serve an app until Ctrl-C or SIGTERM, or until ``max_rounds`` are over.

    Args:
        app: From ``load_app``, or made in Python.
        kits: One kit, or its folder, for each client.
        directory: Where updates are held; one folder for each client in it.
        site_config: What the app finds in ``task.site_config``.
        min_k: Fewest distinct sites in any sum that these clients take part in.
        workers: How many clients may train at once. With more than one, generators that an app shares
            (``random``, torch's) no longer give the same bits.
        max_rounds: Leave once each client is done with so many rounds.
        say: Takes a line for the site's administrator.
    Raises:
        Interrupted: By a signal; all is closed.
        StoreLocked: Another process runs one of these clients.
        IdentityError, ConfigError, StorageError: A kit or the directory cannot be used.
    """
    loaded = [checked(kit if isinstance(kit, Kit) else Kit.load(kit)) for kit in kits]
    policy = SitePolicy(app=app, min_k=min_k)
    observe.configure(_process_name(loaded), Path(directory))
    buffers.keep_freed_memory()
    try:
        interrupted = asyncio.run(
            serve(policy, loaded, Path(directory), site_config or {}, workers=workers, max_rounds=max_rounds, say=say)
        )
    finally:
        observe.shutdown()
    if interrupted:
        raise Interrupted("stopped; updates without a last word are held, and handed in at the next start")


def _process_name(kits: Sequence[Kit]) -> str:
    """The first client's, and how many others share the process."""
    first = f"{kits[0].identity.site}.{kits[0].identity.client}" if kits else "none"
    return f"client.{first}" + (f"+{len(kits) - 1}" if len(kits) > 1 else "")


async def serve(
    policy: SitePolicy,
    kits: Sequence[Kit],
    directory: Path,
    site_config: Mapping[str, str],
    *,
    workers: int = 1,
    max_rounds: int | None = None,
    say: Say,
) -> bool:
    """The loop of ``run``; true where a signal ended it. Cancelling it stops it cleanly too."""
    if not kits:
        raise ConfigError("--kit", None, "is needed: the folder that `hierfl provision site` made for this client")
    worker = Worker(workers)
    countdown = _Countdown(len(kits), max_rounds)
    site = Site(policy, site_config, worker, say, countdown.count, takes_models_along=len(kits) == 1)
    sessions: list[Session] = []
    try:
        for kit in kits:
            sessions.append(Session(kit, site, directory))  # noqa: PERF401  those opened are closed below
        with _signals() as stopped:
            return await _until(stopped, countdown.over, [asyncio.create_task(s.run()) for s in sessions], sessions)
    finally:
        for session in sessions:
            session.folder.close()
        worker.close()


async def _until(
    stopped: asyncio.Event, over: asyncio.Event, running: list[asyncio.Task[None]], sessions: Sequence[Session]
) -> bool:
    """Wait for a signal, for the rounds to be over, or for a session to fail; then end all of them."""
    ends = [asyncio.create_task(stopped.wait()), asyncio.create_task(over.wait())]
    try:
        await asyncio.wait([*ends, *running], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*(session.stop() for session in sessions))
    finally:
        for task in (*ends, *running):
            task.cancel()
        await asyncio.gather(*ends, *running, return_exceptions=True)
    for task in running:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
    return stopped.is_set()


class _Countdown:
    """Sets ``over`` once each client is done with ``max_rounds`` rounds."""

    def __init__(self, num_clients: int, max_rounds: int | None) -> None:
        self.over = asyncio.Event()
        self._num_clients, self._max_rounds = num_clients, max_rounds
        self._done: dict[ClientRef, set[tuple[str, int]]] = {}

    def count(self, client: ClientRef, key: AttemptKey) -> None:
        self._done.setdefault(client, set()).add((key.run, key.round))
        done = [rounds for rounds in self._done.values() if len(rounds) >= (self._max_rounds or sys.maxsize)]
        if len(done) == self._num_clients:
            self.over.set()


@contextmanager
def _signals() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C and SIGTERM set. ``signal.signal``, since Windows' loops have no handlers of their own."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        del number, frame
        loop.call_soon_threadsafe(stopped.set)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
