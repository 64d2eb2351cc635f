"""``hierfl combiner serve`` as a process with its own Ray, against real clients and a controller on this loop."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from sharded import expected, hand_in, is_same, large, sealed_by
from sharded import persist as hand_in_until_sealed

from combiners.supervisor import NO_SPILLING
from hierfl.errors import Unreachable
from hierfl.layout import Layout, model_hash
from hierfl.plan import ModelRef
from hierfl.wire.fetch import fetch_model
from hierfl.wire.transfer import Expect, Outgoing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


class Served:
    """The process, its ready document and all that it ever started."""

    def __init__(self, process: asyncio.subprocess.Process, ready: dict[str, Any]) -> None:
        self.process, self.ready = process, ready
        self.tree = psutil.Process(process.pid).children(recursive=True)
        note = Path(ready["note"])
        self.folder = json.loads(note.read_text())["folder"] if note.exists() else None
        """Its own Ray's; none where it has joined a cluster."""

    @property
    def addresses(self) -> list[str]:
        return self.ready["addresses"]

    async def stop(self, number: int = signal.SIGTERM) -> int:
        self.tree = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        return await self.process.wait()

    def actor(self, name: str) -> psutil.Process:
        return self.actors(name)[0]

    def actors(self, name: str) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.process.pid).children(recursive=True) if name in title(child)]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture
def serve(combiner_kit, controller, tmp_path) -> Callable[..., Any]:
    @asynccontextmanager
    async def run(*more: str) -> AsyncIterator[Served]:
        directory = tmp_path / "zone"
        command = ["combiner", "serve", "--kit", str(combiner_kit.path), "--dir", str(directory)]
        rules = ["--controller", controller.address, "--k", "2", "--max-share", "1", "--intakes", "2"]
        said = tmp_path / "said"
        with said.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "hierfl", *command, *rules, *more), stdout=asyncio.subprocess.PIPE, stderr=file
            )
        try:
            assert process.stdout is not None
            line = await process.stdout.readline()
            yield Served(process, json.loads(line) | {"note": directory / "ray.json", "said": said})
        finally:
            print(said.read_text(), file=sys.stderr)
            if process.returncode is None:
                process.terminate()
                await process.wait()

    return run


def nothing_is_left(served: Served) -> None:
    psutil.wait_procs(served.tree, timeout=5)
    assert [process for process in served.tree if process.is_running()] == []
    assert not Path(served.folder).exists()
    assert not Path(served.ready["note"]).exists()


async def test_a_round_through_ray_is_counted_and_a_drain_leaves_nothing(
    serve, controller, client_kits, connect, plan, toy_model
):
    async with serve() as served:
        listening = {
            connection.laddr.ip
            for process in [psutil.Process(served.process.pid), *served.tree]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        assert len(served.addresses) == 2
        clients = [await connect(kit, served.addresses[n % 2]) for n, kit in enumerate(client_kits[:3])]
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        await asyncio.gather(*(client.hand_in(plan) for client in clients))
        _, head, partial, digest = await controller.partials.get()
        assert (head.num_sites, head.weight) == (3, 3)
        assert set(partial.sums["train"]) == {3 * 2**32}
        controller.commit(plan, digest, toy_model(1.0))
        for client in clients:
            while (await client.event("receipt")).state != 4:
                pass
        assert await served.stop() == 0
    nothing_is_left(served)


async def test_the_sums_of_many_intakes_are_added_through_the_object_store(
    serve, controller, client_kits, connect, plan
):
    plan = replace(plan, min_clients=5)
    async with serve("--intakes", "5", "--advertise", "combiner.example:0") as served:
        clients = [await connect(kit, address) for kit, address in zip(client_kits, served.addresses, strict=True)]
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        await asyncio.gather(*(client.hand_in(plan, weight=n + 1) for n, client in enumerate(clients)))
        _, head, partial, _ = await controller.partials.get()
        assert (head.num_sites, head.num_updates, head.weight) == (5, 5, 15)
        assert set(partial.sums["train"]) == {15 * 2**32}
        listed = json.loads((await clients[0].event("endpoints")).document)["endpoints"]
        ports = [address.rpartition(":")[2] for address in served.addresses]
        assert [one["address"] for one in listed] == [f"combiner.example:{port}" for port in ports]
        assert await served.stop() == 0
        assert "added elsewhere" not in served.ready["said"].read_text()


def private_bytes(process: psutil.Process) -> int:
    """Resident, beyond what is shared with files or other processes."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


async def test_a_large_model_is_served_from_the_object_store_and_outlives_its_region(
    serve, controller, client_kits, connect, plan
):
    """Both intakes serve it from there, and after the Region's death too, whose object it was."""
    num_values = 10_000_000
    layout = Layout.of({"w": np.zeros(num_values, np.float32)})
    vectors = {"train": np.random.default_rng(1).standard_normal(num_values).astype(np.float32)}
    name = model_hash(layout, vectors)
    controller.models[name] = Outgoing("model", layout.hash, vectors, meta=layout.to_bytes())
    base = ModelRef(version=0, model_hash=name, layout_hash=layout.hash, size_bytes=4 * num_values)
    expect = Expect("model", layout.hash, None, base.size_bytes)

    async def fetched(client):
        incoming = await fetch_model(client.stub, name, expect)
        return incoming.vectors()["train"].tobytes()

    async with serve() as served:
        clients = [await connect(kit, served.addresses[n % 2]) for n, kit in enumerate(client_kits[:3])]
        await controller.offer(replace(plan, base=base))
        await asyncio.gather(*(client.offer() for client in clients))
        intake = served.actor("IntakeActor")
        before = private_bytes(intake)
        for client in clients:
            assert await fetched(client) == vectors["train"].tobytes()
        assert private_bytes(intake) - before < base.size_bytes / 2, "no copy of it at the intake"
        assert "stays in the Region's memory" not in served.ready["said"].read_text()
        served.actor("RegionActor").kill()
        await asyncio.gather(*(client.ended.wait() for client in clients))
        again = [await connect(kit, served.addresses[0]) for kit in client_kits[:3]]
        await asyncio.gather(*(client.offer() for client in again))
        assert await fetched(again[0]) == vectors["train"].tobytes()


async def persist(connect, kit, address, plan):
    """As the SDK does: come back whenever sent away, until the update is sealed."""
    async with asyncio.timeout(60):
        while True:
            client = await connect(kit, address)
            try:
                return await client.until_sealed(plan)
            except Unreachable:
                await client.leave()


async def test_killed_actors_come_back_and_their_clients_are_asked_again(serve, controller, client_kits, connect, plan):
    async with serve() as served:
        clients = [await connect(kit, served.addresses[0]) for kit in client_kits[:3]]
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        await asyncio.gather(*(client.hand_in(plan) for client in clients[:2]))
        served.actor("RegionActor").kill()
        await asyncio.gather(*(client.ended.wait() for client in clients))
        again = [await connect(kit, served.addresses[0]) for kit in client_kits[:3]]
        await asyncio.gather(*(client.offer() for client in again))
        await asyncio.gather(*(client.hand_in(plan) for client in again[:2]))
        served.actor("IntakeActor").kill()
        await asyncio.gather(*(persist(connect, kit, served.addresses[1], plan) for kit in client_kits[:3]))
        _, head, _, _ = await controller.partials.get()
        assert (head.num_updates, head.region_epoch) == (3, 2)


@pytest.mark.parametrize("encoding", ["float32", "topk"])
async def test_shards_are_processes_of_their_own_and_make_the_same_sums(
    serve, controller, client_kits, connect, plan, encoding
):
    plan = large(plan, encoding)
    async with serve("--shards", "3") as served:
        head, partial, _ = await sealed_by(served, controller, connect, client_kits, plan)
        assert (head.num_updates, head.weight) == (4, 10)
        assert is_same(partial, expected(plan))
        assert len({shard.pid for shard in served.actors("ShardActor")}) == 6, "three for each intake"
        assert await served.stop() == 0
    nothing_is_left(served)


async def test_a_killed_shard_ends_its_intake_s_incarnation_and_every_update_counts_once(
    serve, controller, client_kits, connect, plan
):
    plan = large(plan)
    async with serve("--intakes", "1", "--shards", "3") as served:
        clients = [await connect(kit, served.addresses[0]) for kit in client_kits[:4]]
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        await asyncio.gather(*(hand_in(client, plan, number) for number, client in enumerate(clients[:3])))
        killed, *others = served.actors("ShardActor")
        intake = served.actor("IntakeActor")
        killed.kill()
        await asyncio.gather(*(client.ended.wait() for client in clients))
        await asyncio.gather(
            *(hand_in_until_sealed(connect, kit, served.addresses[0], plan, n) for n, kit in enumerate(client_kits[:4]))
        )
        head, partial = (await controller.partials.get())[1:3]
        assert (head.num_updates, head.weight) == (4, 10)
        assert is_same(partial, expected(plan))
        assert served.actor("IntakeActor").pid == intake.pid, "the intake lives on, under another incarnation"
        again = served.actors("ShardActor")
        assert len(again) == 3
        assert {shard.pid for shard in again}.isdisjoint({killed.pid, *(shard.pid for shard in others)})


async def test_the_shards_of_a_killed_intake_end_with_it(serve, controller, client_kits, connect, plan):
    plan = large(plan)
    async with serve("--intakes", "1", "--shards", "2") as served:
        client = await connect(client_kits[0], served.addresses[0])
        others = [await connect(kit, served.addresses[0]) for kit in client_kits[1:4]]
        await controller.offer(plan)
        await asyncio.gather(*(one.offer() for one in [client, *others]))
        await hand_in(client, plan, 0)
        shards = served.actors("ShardActor")
        served.actor("IntakeActor").kill()
        await asyncio.gather(
            *(hand_in_until_sealed(connect, kit, served.addresses[0], plan, n) for n, kit in enumerate(client_kits[:4]))
        )
        assert is_same((await controller.partials.get())[2], expected(plan))
        assert psutil.wait_procs(shards, timeout=20)[1] == []


CLUSTER = """
import json, sys, time
import ray

ray.init(
    address="local",
    include_dashboard=False,
    num_cpus=1,
    object_store_memory=100 * 2**20,
    _system_config=json.loads(sys.argv[1]),
)
print("at", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """``async with cluster(system_config) as address``: a Ray cluster that is nobody's own."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")

    @asynccontextmanager
    async def run(system_config: str) -> AsyncIterator[str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CLUSTER, system_config),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield await said_at(process.stdout)
        finally:
            process.stdin.close()
            await process.wait()

    async def said_at(said: asyncio.StreamReader) -> str:
        while not (line := (await said.readline()).decode()).startswith("at "):
            assert line, "it has ended"
        return line.split()[1]

    return run


async def test_shards_are_had_in_a_cluster_that_was_joined_if_it_writes_no_update_to_a_disk(
    serve, cluster, combiner_kit, controller, client_kits, connect, plan, tmp_path
):
    plan = large(plan)
    async with (
        cluster(NO_SPILLING) as address,
        serve("--ray-address", address, "--shards", "2") as served,
    ):
        _, partial, _ = await sealed_by(served, controller, connect, client_kits, plan)
        assert is_same(partial, expected(plan))
        assert await served.stop() == 0
    kit, other = str(combiner_kit.path), str(tmp_path / "other")
    async with cluster("{}") as address:
        asked = ("--controller", controller.address, "--ray-address", address, "--shards", "2")
        status, said = await refused("--kit", kit, "--dir", other, *asked)
        assert (status, "spills no objects to a disk" in said) == (3, True), said


MODEL_MIB = 64


async def test_an_intake_with_shards_needs_less_memory_than_the_model_has(
    serve, controller, client_kits, connect, plan
):
    plan = large(plan, num_values=MODEL_MIB * 2**18)
    async with serve("--intakes", "1", "--shards", "2") as served:
        clients = [await connect(kit, served.addresses[0]) for kit in client_kits[:4]]
        intake, before = served.actor("IntakeActor"), private_mib(served.actor("IntakeActor"))
        await controller.offer(plan)
        await asyncio.gather(*(client.offer() for client in clients))
        peak, shards_peak = before, 0.0

        async def watch() -> None:
            nonlocal peak, shards_peak
            while True:
                peak = max(peak, private_mib(intake))
                shards_peak = max([shards_peak, *map(private_mib, served.actors("ShardActor"))])
                await asyncio.sleep(0.05)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(hand_in(client, plan, number) for number, client in enumerate(clients)))
        _, head, _, _ = await asyncio.wait_for(controller.partials.get(), 120)
        watching.cancel()
        assert head.num_updates == 4
        print(f"intake {before:.0f} MiB before, {peak:.0f} at most; a shard {shards_peak:.0f}")
        assert peak - before < MODEL_MIB
        assert shards_peak > MODEL_MIB, "half of the sums, twice as wide as the model"


def private_mib(process: psutil.Process) -> float:
    """Pages that only this process has; 0 once it has ended."""
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")) / 1024


async def test_after_kill_minus_9_the_next_start_cleans_up_and_goes_on(serve, controller):
    async with serve() as served:
        await controller.attached()
        await served.stop(signal.SIGKILL)
    async with serve() as again:
        assert again.folder != served.folder
        assert not Path(served.folder).exists()
        assert [process for process in served.tree if process.is_running()] == []
        assert controller.attachments[-1].region_epoch == 2
        assert await again.stop(signal.SIGINT) in (0, 130)
    nothing_is_left(again)


async def refused(*arguments: str) -> tuple[int, str]:
    """Exit status and error line of a combiner that cannot serve."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hierfl", "combiner", "serve", *arguments), stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, next(line for line in said.decode().splitlines() if line.startswith("error "))


async def test_what_keeps_it_from_serving_is_one_clear_line(serve, combiner_kit, controller, tmp_path):
    kit, other = str(combiner_kit.path), str(tmp_path / "other")
    assert (await refused("--kit", str(tmp_path), "--dir", other))[0] == 3
    async with serve() as served:
        port = served.addresses[0]
        taken = await refused("--kit", kit, "--dir", other, "--controller", controller.address, "--listen", port)
        assert taken[0] == 3, taken
        assert f"cannot listen on {port}" in taken[1]
        status, said = await refused("--kit", kit, "--dir", str(tmp_path / "zone"), "--controller", controller.address)
        assert status == 1
        assert "another combiner works in" in said
    with sqlite3.connect(tmp_path / "zone" / "zone.sqlite") as database:
        database.execute("pragma user_version = 99")
    database.close()
    status, said = await refused("--kit", kit, "--dir", str(tmp_path / "zone"), "--controller", controller.address)
    assert (status, "later release" in said) == (1, True), said
