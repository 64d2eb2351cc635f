"""A real federation that a case harms: its processes, the failpoints that it meets, its runs, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from hierfl.client.params import make_layout
from hierfl.errors import HierFLError
from hierfl.failpoints import POINTS, VARIABLE
from hierfl.local import Federation, serving
from hierfl.operator import Operator, connect
from hierfl.pki import Kit
from hierfl.types import RegionId, RunId
from hierfl.wire import hierfl_pb2 as pb
from tests.chaos import books
from tests.chaos.load import Load

__all__ = ["Trial", "trial", "until"]

LOOK_S = 0.02
FAKETIME = next(map(str, Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), "")
"""Shifts the clock of the processes that load it."""
PATIENCE_S = 60.0


async def until(holds: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> float:
    """Wait for what processes of ours bring about; seconds that it took.

    Raises:
        AssertionError: It did not come.
    """
    began_s = time.monotonic()
    while not holds():
        assert time.monotonic() - began_s < patience_s, f"after {patience_s:g} s still waiting until {what}"
        await asyncio.sleep(LOOK_S)
    return time.monotonic() - began_s


class Trial:
    """See the module. Made by ``trial``."""

    def __init__(self, federation: Federation, load: Load, failpoints: Path, said: list[str]) -> None:
        self.federation, self.load, self.said = federation, load, said
        self._failpoints = failpoints

    # ------------------------------------------------------------ runs

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[Operator]:
        """A connection of its own: a controller may be killed under it."""
        kit = Kit.load(self.federation.operator_kit)
        async with connect(kit, self.federation.controller_address) as operator:
            yield operator

    async def submit(self, rounds: int = 100_000, **rules: float) -> RunId:
        """A new run from zeros."""
        from tests.chaos.app import init

        job = self.load.job(rounds, **rules)  # type: ignore[arg-type]
        layout, vectors = make_layout(init(job.app))
        async with self.operator() as operator:
            return await operator.submit(job, await operator.upload_model(layout, vectors))

    async def rounds(self, run: RunId) -> list[pb.RoundSummary]:
        """Committed rounds, as soon as a controller answers."""
        began_s = time.monotonic()
        while True:
            try:
                async with self.operator() as operator:
                    return list((await operator.run(run)).rounds)
            except HierFLError:
                assert time.monotonic() - began_s < PATIENCE_S, "no controller answers"
                await asyncio.sleep(LOOK_S)

    async def updates(self, run: RunId) -> int:
        """Counted so far."""
        return sum(one.num_updates for one in await self.rounds(run))

    async def round_after(self, run: RunId, after: int, patience_s: float = PATIENCE_S) -> None:
        """Wait for the round after so many."""
        began_s = time.monotonic()
        while len(await self.rounds(run)) <= after:
            assert time.monotonic() - began_s < patience_s, f"for {patience_s:g} s no round was committed"
            await asyncio.sleep(LOOK_S)

    async def finished(self, run: RunId) -> None:
        """Wait for a run's end."""
        async with self.operator() as operator, asyncio.timeout(PATIENCE_S):
            async for _ in operator.follow(run):
                pass

    async def resume_if_paused(self, run: RunId) -> None:
        """What an operator does once the disk is all right again."""
        async with self.operator() as operator:
            if (await operator.run(run)).summary.state == "paused":
                await operator.resume(run)

    async def whole_again(self, run: RunId, after: int | None = None, patience_s: float = PATIENCE_S) -> float:
        """Wait for a round after round ``after`` (the last one now) that counts every region; seconds until then."""
        began_s = time.monotonic()
        if after is None:
            after = len(await self.rounds(run))
        while not any(len(one.regions) == self.load.regions for one in (await self.rounds(run))[after:]):
            assert time.monotonic() - began_s < patience_s, f"for {patience_s:g} s no round had all regions"
            await asyncio.sleep(LOOK_S)
        return time.monotonic() - began_s

    async def cancel(self, run: RunId) -> None:
        """Ask for a run's end; a controller that dies of it has been asked all the same, or is asked again."""
        while True:
            try:
                async with self.operator() as operator:
                    await operator.cancel(run)
                    return
            except HierFLError:
                await asyncio.sleep(LOOK_S)

    async def end(self, run: RunId) -> None:
        """Cancel a run, and wait until every region has its last words: nobody holds a sealed update of it."""
        await self.cancel(run)
        zones = [self.zone(name) for name in self.load.names]
        await until(lambda: not any(books.open_receipts(zone, run) for zone in zones), "all updates have a last word")

    # ------------------------------------------------------------ harm

    def arm(self, point: str, action: str = "kill") -> None:
        """Let ``action`` happen to whoever reaches ``point`` next."""
        path = self._failpoints / point
        path.with_suffix(".new").write_text(action)
        path.with_suffix(".new").rename(path)

    def disarm(self, point: str) -> bool:
        """Take it back; whether it was still to come."""
        with contextlib.suppress(FileNotFoundError):
            (self._failpoints / point).unlink()
            return True
        return False

    def forget(self, point: str) -> None:
        """Remove what says that a point was reached."""
        for taken in self._failpoints.glob(f"{point}.[0-9]*"):
            taken.unlink()

    async def struck(self, point: str, patience_s: float = PATIENCE_S) -> int:
        """Wait until somebody has reached an armed point; its process id."""
        await until(lambda: bool(list(self._failpoints.glob(f"{point}.[0-9]*"))), f"{point} is reached", patience_s)
        (taken,) = self._failpoints.glob(f"{point}.[0-9]*")
        taken.unlink()
        return int(taken.suffix[1:])

    async def all_struck(self, patience_s: float = PATIENCE_S) -> None:
        """Wait until nothing that was armed is left."""
        points = set(POINTS)
        await until(
            lambda: not any(path.name in points for path in self._failpoints.iterdir()), "all is reached", patience_s
        )
        for taken in self._failpoints.iterdir():
            taken.unlink()

    def move_zone(self, region: str) -> None:
        """A copy of a region's folder takes its place, as on another machine; the old one is gone."""
        folder = self.zone(region)
        copy = folder.with_name(f"{region}.copy")
        shutil.copytree(folder, copy)
        shutil.rmtree(folder)
        copy.rename(folder)

    async def restart_at(self, region: str, offset: str) -> None:
        """Start a region again, its clocks off by so much (faketime's words); empty: right."""
        names = [f"combiner-{region}", f"clients-{region}-0"]
        await asyncio.gather(*(self.federation.kill(name) for name in names if name in self.federation.children))
        off = {"LD_PRELOAD": FAKETIME, "FAKETIME": offset} if offset else {}
        os.environ.update(off)
        try:
            await self.federation.start_region(RegionId(region))
        finally:
            for name in off:
                del os.environ[name]

    # ------------------------------------------------------------ where things are

    async def says(self, words: str) -> None:
        """Wait until one of the programs says it, once more than so far."""
        before = self.mentions(words)
        await until(lambda: self.mentions(words) > before, f"somebody says {words!r}")

    def mentions(self, words: str) -> int:
        """How often the programs have said it so far."""
        return sum(path.read_text(errors="replace").count(words) for path in (self.state / "logs").glob("*.log"))

    def combiner_address(self, region: str) -> str:
        """Where its first intake listens."""
        ready = json.loads((self.state / "ready" / f"combiner-{region}.json").read_text())
        return str(ready["addresses"][0])

    @property
    def state(self) -> Path:
        return self.federation.state

    def zone(self, region: str) -> Path:
        """Folder of a region's zone store."""
        return self.state / "regions" / region


@asynccontextmanager
async def trial(load: Load, folder: Path) -> AsyncIterator[Trial]:
    """A federation of this load, up; at the end nothing of it is left but its folder."""
    failpoints = folder / "failpoints"
    failpoints.mkdir(parents=True)
    said: list[str] = []
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(failpoints)  # for the processes that are started; this one has read it already
    try:
        async with serving(load.config, folder / "federation", said.append, well_s=0.0) as federation:
            yield Trial(federation, load, failpoints, said)
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
