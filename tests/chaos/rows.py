"""The matrix: each row makes one fault in a real federation, as often as asked, and says what came of it.

A row is a function of a folder and a number of repeats; what it promises is in ``FAULTS.md`` under the same number.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from hierfl.failpoints import POINTS
from hierfl.processes import ProgramFailed
from hierfl.types import RunId
from tests.chaos import books, forger, links
from tests.chaos.audited import wrong_by_audit
from tests.chaos.figures import Figures, spread
from tests.chaos.load import SMALL, Load
from tests.chaos.trial import Trial, trial

__all__ = ["ROWS", "Case"]

logger = logging.getLogger("chaos")

Case = Callable[[Path, int], Awaitable[Figures]]


def verdict(
    row: int, load: Load, folder: Path, repeats: int, figures: Mapping[str, float | int | str], *wrong: str
) -> Figures:
    """The figures of a case whose federation has stopped, after a look into its books."""
    found = books.read_books(folder / "federation" / "controller", zones(folder, load))
    wrong = (*wrong, *found.wrong, *wrong_by_audit(folder / "federation"))
    figures = {**figures, "rounds": found.rounds, "updates_counted": found.counted}
    return Figures(row=row, load=str(load), repeats=repeats, clean=not wrong, wrong=wrong, figures=figures)


def zones(folder: Path, load: Load) -> dict[str, Path]:
    """Folders of the zones' stores, by region."""
    return {region: folder / "federation" / "regions" / region for region in load.names}


def points_of(*roles: str) -> list[str]:
    return [point for point in POINTS if point.partition(".")[0] in roles]


# ---------------------------------------------------------------- 1: lost acknowledgements


async def row_1(folder: Path, repeats: int) -> Figures:
    """Answers to updates are lost, one to five in a row; a tenth of ``repeats`` x 500 updates meets it."""
    wanted = 500 * repeats
    rng = random.Random(1)
    lost = 0
    async with trial(SMALL, folder) as harmed:
        run = await harmed.submit()
        while (made := await harmed.updates(run)) < wanted:
            if lost < made / 10:
                for _ in range(rng.randint(1, 5)):
                    harmed.arm("client.answered", "lost")
                    await harmed.struck("client.answered")
                    lost += 1
            await asyncio.sleep(0)
        await harmed.end(run)
    return verdict(1, SMALL, folder, lost, {"answers_lost": lost})


# ---------------------------------------------------------------- 2, 3: what a client forges


async def row_2(folder: Path, repeats: int) -> Figures:
    """Other bytes under a key: while the first are staged, once they are sealed, once they are counted."""
    return await forgeries(2, folder, forger.other_bytes, repeats)


async def row_3(folder: Path, repeats: int) -> Figures:
    """An update for a stale round, a future one, another attempt, another run."""
    return await forgeries(3, folder, forger.other_keys, repeats)


async def forgeries(row: int, folder: Path, forge: forger.Forge, repeats: int) -> Figures:
    """So many rounds with forged updates, all of which have to be refused."""
    async with trial(SMALL, folder) as harmed:
        run = await harmed.submit()
        tried, refused = await forge(harmed, repeats)
        await harmed.end(run)
    wrong = [] if tried == refused else [f"{tried - refused} of {tried} were taken"]
    return verdict(row, SMALL, folder, tried, {"tried": tried, "refused": refused}, *wrong)


# ---------------------------------------------------------------- 4, 5: processes that die


async def row_4(folder: Path, repeats: int) -> Figures:
    """An intake or the Region's actor is killed at every failpoint of theirs."""
    points = points_of("intake", "region")
    points.remove("region.refuse")  # no update is refused here: row 10
    return await kills(4, folder, points, repeats)


async def row_5(folder: Path, repeats: int) -> Figures:
    """The controller, alone, is killed at every failpoint of its own."""
    return await kills(5, folder, points_of("controller"), repeats)


async def kills(row: int, folder: Path, points: Sequence[str], repeats: int) -> Figures:
    """One kill at a time at each of these points, all in one federation."""
    times: dict[str, list[float]] = {point: [] for point in points}
    async with trial(SMALL, folder) as harmed:
        run = await harmed.submit()
        await harmed.whole_again(run, 0)
        for turn in range(repeats):
            for point in points:
                run, back_s = await killed_at(harmed, run, point)
                times[point].append(back_s)
                logger.info("row %d, repeat %d: killed at %s, whole after %.1f s", row, turn + 1, point, back_s)
        await harmed.end(run)
    every = [seconds for taken in times.values() for seconds in taken]
    slowest = max(times, key=lambda point: max(times[point]))
    figures = {**spread("whole_again", every), "points": len(points), "slowest_point": slowest}
    return verdict(row, SMALL, folder, len(every), figures)


async def killed_at(harmed: Trial, run: RunId, point: str) -> tuple[RunId, float]:
    """Kill at a point; the run that goes on, and the seconds until a round counts all regions again."""
    harmed.arm(point)
    if point == "controller.ended":
        await harmed.cancel(run)
    await harmed.struck(point)
    struck_s = time.monotonic()
    if point == "controller.ended":
        run = await harmed.submit()
    await harmed.whole_again(run)
    return run, time.monotonic() - struck_s


# ---------------------------------------------------------------- 10: too few sites


async def row_10(folder: Path, repeats: int) -> Figures:
    """Two of four sites die in mid-round with ``k`` at 3: their region sends nothing, the others' round stands."""
    load, died_refusing = Load(processes=2), 0
    wrong: list[str] = []
    async with trial(load, folder) as harmed:
        run = await harmed.submit(timeout_s=10.0)
        await harmed.whole_again(run, 0)
        for _ in range(repeats):
            harmed.arm("region.refuse")
            harmed.arm("client.send", "freeze")
            pid = await harmed.struck("client.send")
            name = next(name for name, child in harmed.federation.children.items() if child.pid == pid)
            region = name.split("-")[1]
            before = len(await harmed.rounds(run))
            await harmed.federation.kill(name)
            await harmed.round_after(run, before)
            died_refusing += not harmed.disarm(
                "region.refuse"
            )  # a refusal is a last word, though its Region dies of it
            (found,) = (await harmed.rounds(run))[before : before + 1]
            if region in [share.region for share in found.regions]:
                wrong.append(f"{region} took part in round {found.round} with two sites")
            harmed.forget("region.refuse")
            await harmed.federation.start_clients(harmed.federation.region(region).name)
            await harmed.whole_again(run)
        await harmed.end(run)
    crossed = books.crossings_below(zones(folder, load), 3)
    return verdict(
        10,
        load,
        folder,
        repeats,
        {"crossings_below_k": crossed, "died_refusing": died_refusing},
        *wrong,
        *(["crossed"] if crossed else []),
    )


# ---------------------------------------------------------------- 14: disks


DISK_POINTS = ("region.seal.write", "region.seal.file", "controller.accept", "controller.blob", "controller.link")


async def row_14(folder: Path, repeats: int) -> Figures:
    """No space, or EIO, where a partial, a model or a commit record becomes durable."""
    wrong: list[str] = []
    async with trial(SMALL, folder) as harmed:
        run = await harmed.submit()
        await harmed.whole_again(run, 0)
        for _ in range(repeats):
            for point in DISK_POINTS:
                for action in ("ENOSPC", "EIO"):
                    harmed.arm(point, action)
                    await harmed.struck(point)
                    await harmed.resume_if_paused(run)
                    await harmed.whole_again(run)
        await harmed.end(run)
    return verdict(14, SMALL, folder, repeats * len(DISK_POINTS) * 2, {}, *wrong)


# ---------------------------------------------------------------- 16: clocks


async def row_16(folder: Path, repeats: int) -> Figures:
    """One region's clocks, its combiner's and its clients', are an hour ahead, then two days behind."""
    wrong: list[str] = []
    region = SMALL.names[0]
    async with trial(SMALL, folder) as harmed:
        run = await harmed.submit()
        await harmed.whole_again(run, 0)
        for turn in range(repeats):
            await harmed.restart_at(region, "+1h")
            await harmed.whole_again(run)
            if harmed.mentions("ahead of that of the controller") <= turn:
                wrong.append("no warning names the clock that is an hour ahead")
            try:
                await harmed.restart_at(region, "-2d")  # its certificates are not valid yet
                wrong.append("a region serves two days before its certificates are valid")
            except ProgramFailed as failure:
                if "the clock here says" not in str(failure):
                    wrong.append(f"what it says does not name the clock: {failure}")
            await harmed.round_after(run, len(await harmed.rounds(run)) + 5)
            await harmed.restart_at(region, "")
            await harmed.whole_again(run)
        await harmed.end(run)
    return verdict(16, SMALL, folder, 2 * repeats, {}, *wrong)


# ---------------------------------------------------------------- 17, 18: whole regions


async def row_17(folder: Path, repeats: int) -> Figures:
    """A region's Ray dies with all its processes, and the region goes on from a copy of its store elsewhere."""
    times = []
    async with trial(SMALL, folder) as harmed:
        run = await harmed.submit()
        await harmed.whole_again(run, 0)
        for turn in range(repeats):
            region = SMALL.names[turn % SMALL.regions]
            await harmed.federation.kill(f"combiner-{region}")
            struck_s = time.monotonic()
            await asyncio.to_thread(harmed.move_zone, region)
            await harmed.federation.start_combiner(region)
            await harmed.whole_again(run)
            times.append(time.monotonic() - struck_s)
        await harmed.end(run)
    return verdict(17, SMALL, folder, repeats, spread("whole_again", times))


async def row_18(folder: Path, repeats: int) -> Figures:
    """144 clients in six regions start at once; then all client processes die at once and come back."""
    load = Load(regions=6, sites=24)
    times = []
    began_s = time.monotonic()
    async with trial(load, folder) as harmed:
        serving_s = time.monotonic() - began_s
        run = await harmed.submit()
        first_s = await harmed.whole_again(run, 0)
        for _ in range(repeats):
            for name, child in list(harmed.federation.children.items()):
                if name.startswith("clients-"):
                    os.kill(child.pid, signal.SIGKILL)
            times.append(await harmed.whole_again(run))
        await harmed.end(run)
    figures = {"serving_s": round(serving_s, 1), "first_round_s": round(first_s, 1), **spread("whole_again", times)}
    return verdict(18, load, folder, repeats, figures)


# ---------------------------------------------------------------- 19: all at once


async def row_19(folder: Path, repeats: int) -> Figures:
    """Kills, freezes and lost answers in an order that a seed draws; ``repeats`` is the number of seeds."""
    points = [point for point in POINTS if point not in ("region.refuse", "controller.ended", "client.hold")]
    harms = 0
    async with trial(SMALL, folder) as harmed:
        run = await harmed.submit()
        await harmed.whole_again(run, 0)
        for seed in range(repeats):
            rng = random.Random(seed)
            for point in rng.sample(points, 4):
                harmed.arm(point, "lost" if point == "client.answered" else "kill")
                harms += 1
            await harmed.all_struck()
            seconds = await harmed.whole_again(run, patience_s=120.0)
            logger.info("row 19, seed %d: whole after %.1f s", seed, seconds)
        await harmed.end(run)
    return verdict(19, SMALL, folder, repeats, {"harms": harms})


# ---------------------------------------------------------------- 21, 22: releases, zombies


async def row_21(folder: Path, repeats: int) -> Figures:
    """The same job twice, and with other sites alive: one release for one base and task, whatever is tried."""
    load = Load(processes=2)
    async with trial(load, folder) as harmed:
        for _ in range(repeats):
            first = await harmed.submit(rounds=2)
            await harmed.finished(first)
            victims = [name for name in harmed.federation.children if name.endswith("-1") and "clients" in name]
            await asyncio.gather(*(harmed.federation.kill(name) for name in victims))
            again = await harmed.submit(rounds=2)
            await harmed.finished(again)
            for region in load.names:
                await harmed.federation.start_clients(region)
    twice = books.released_twice(zones(folder, load))
    return verdict(21, load, folder, repeats, {"bases_released_twice": len(twice)}, *twice)


async def row_22(folder: Path, repeats: int) -> Figures:
    """An intake freezes until its Region holds it void, and thaws: nothing of what it had is accepted."""
    points = points_of("intake")
    async with trial(SMALL, folder) as harmed:
        run = await harmed.submit()
        await harmed.whole_again(run, 0)
        for turn in range(repeats):
            harmed.arm(points[turn % len(points)], "freeze")
            pid = await harmed.struck(points[turn % len(points)])
            try:
                await harmed.says("is void")
            finally:
                os.kill(pid, signal.SIGCONT)
            await harmed.whole_again(run)
        await harmed.end(run)
    return verdict(22, SMALL, folder, repeats, {})


ROWS: Mapping[int, Case] = {
    **links.ROWS,
    1: row_1,
    2: row_2,
    3: row_3,
    4: row_4,
    5: row_5,
    10: row_10,
    14: row_14,
    16: row_16,
    17: row_17,
    18: row_18,
    19: row_19,
    21: row_21,
    22: row_22,
}
