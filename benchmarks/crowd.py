"""Many light clients in one process, for models that so many processes could not hold: ``python -m benchmarks.crowd``.

Each has its own certificate, connection and place in line, fetches the model itself and sends an update of its own,
byte for byte, with its own digest and signature. What they share is memory: the model that one fetched is dropped
chunk by chunk once it is checked, and every update is a piece of one vector of noise, encoded frame by frame while it
is sent. Nothing is trained, held on a disk, or repeated where it fails: that is ``hierfl client run``, whose
options these are.
"""

from __future__ import annotations

import asyncio
import time
import traceback
import zlib
from datetime import UTC, datetime
from pathlib import Path

import click

from benchmarks import round_app
from hierfl import buffers, documents
from hierfl.cli.serving import catch_signals
from hierfl.client.app import load_app
from hierfl.client.courier import Courier
from hierfl.client.held import Held, Work
from hierfl.client.intakes import Intakes
from hierfl.client.link import DIALS_AT_ONCE, Link
from hierfl.client.offers import SitePolicy, accept
from hierfl.errors import HierFLError
from hierfl.pki import Kit
from hierfl.plan import Plan
from hierfl.receipts import ReceiptState
from hierfl.records import UpdateHead
from hierfl.types import AttemptKey
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc, transfer
from hierfl.wire.delta import Bases
from hierfl.wire.fetch import Fetched, Fetcher

__all__ = ["LightClient", "Passing", "update_of"]


class Passing(transfer.Incoming):
    """A transfer that is checked chunk by chunk, and let go."""

    def feed(self, frame: bytes) -> None:
        super().feed(frame)
        self.frames.clear()
        for chunks in self.chunks.values():
            chunks.clear()


class PassingFetcher(Fetcher):
    """Fetches a model that nobody here needs: its digest is checked, and not its hash."""

    async def fetch(
        self, stub: rpc.Stub, model_hash: str, expect: transfer.Expect, bases: Bases | None = None
    ) -> Fetched:
        call = stub.FetchModel(pb.FetchModelRequest(model_hash=model_hash))
        incoming = Passing(expect)
        await rpc.frames_of(call, incoming)
        return Fetched(incoming)


def update_of(plan: Plan, place: int, weight: int) -> transfer.Outgoing:
    """An update that takes no memory: a piece of the process's noise, from ``place`` on."""
    (group,) = plan.task.groups
    size = group.num_values
    noise = round_app.noise(int(plan.task.config["seed"]), size + round_app.PLACES)  # type: ignore[call-overload]
    head = UpdateHead(weight=weight, metrics={}, base_model_hash=plan.base.model_hash, task_hash=plan.task.hash)
    return transfer.Outgoing(
        "update",
        plan.base.layout_hash,
        {group.name: noise[place : place + size]},
        documents.encode(head),
        plan.task.encoding.name,
        keeps_copy=False,
    )


class LightClient:
    """One client: answers each offer once."""

    def __init__(self, kit: Kit, policy: SitePolicy, folder: Path, dialling: asyncio.Semaphore) -> None:
        app = policy.app
        self.name = f"{kit.identity.site}/{kit.identity.client}"
        self._policy = policy
        intakes = Intakes(kit, folder / "endpoints", self.say)
        self.link = Link(kit, [(app.name, app.version)], intakes, self.say, dialling)
        self._courier = Courier(self.link, self.say)
        self._answered: dict[AttemptKey, asyncio.Task[None]] = {}

    def say(self, text: str) -> None:
        print(f"{self.name}: {text}", flush=True)

    async def run(self) -> None:
        async for event in self.link.events():
            if event.WhichOneof("event") == "offer":
                self._take_up(event.offer)

    def _take_up(self, offer: pb.Offer) -> None:
        plan = accept(offer, self.link.kit, self._policy, 0, datetime.now(UTC))
        if plan.key not in self._answered:
            self._answered = {plan.key: asyncio.create_task(self._guarded(plan))}

    async def _guarded(self, plan: Plan) -> None:
        try:
            await self._answer(plan)
        except HierFLError as error:
            self.say(f"round {plan.round}: {error}")
        except Exception:  # noqa: BLE001  a bug here would be a round that never ends
            self.say(f"round {plan.round}: {traceback.format_exc()}")

    async def _answer(self, plan: Plan) -> None:
        expect = transfer.Expect("model", plan.base.layout_hash, None, plan.base.size_bytes, vouched=plan.base.digest)
        await self._courier.patiently(
            lambda: self.link.fetch_model(plan.base.model_hash, expect, {}, PassingFetcher()), "no model yet"
        )
        number = zlib.crc32(self.name.encode())
        outgoing = update_of(plan, number % round_app.PLACES, 1 + number % round_app.MOST_WEIGHT)
        await asyncio.to_thread(outgoing.encode)
        receipt = await self._courier.hand_in(_held(plan, outgoing), outgoing, f"round {plan.round}")
        self.say(f"round {plan.round}: {receipt.state}")


def _held(plan: Plan, outgoing: transfer.Outgoing) -> Held:
    return Held(
        work=Work.of(plan),
        attempt=plan.attempt,
        digest=outgoing.digest,
        layout_hash=plan.base.layout_hash,
        vectors=outgoing.descriptor.vectors,
        head=documents.decode(outgoing.descriptor.meta.encode(), UpdateHead, "update head"),
        state=ReceiptState.OFFERED,
        made_unix_ns=time.time_ns(),
        hold_s=plan.hold_s,
        encoding=plan.task.encoding.name,
    )


@click.command()
@click.argument("app_spec", metavar="APP")
@click.option("--kit", "kits", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--dir", "directory", type=click.Path(path_type=Path), required=True)
@click.option("--set", "settings", multiple=True)
def main(app_spec: str, kits: tuple[Path, ...], directory: Path, settings: tuple[str, ...]) -> None:
    """See the module."""
    del settings
    buffers.keep_freed_memory()
    policy = SitePolicy(app=load_app(app_spec))
    dialling = asyncio.Semaphore(DIALS_AT_ONCE)
    asyncio.run(serve([LightClient(Kit.load(kit), policy, _folder(directory, kit), dialling) for kit in kits]))


def _folder(directory: Path, kit: Path) -> Path:
    """Of a client: its site's name and its own."""
    folder = directory / kit.parent.name / kit.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


async def serve(clients: list[LightClient]) -> None:
    """Run all of them until SIGTERM or Ctrl-C."""
    stopped = asyncio.Event()
    catch_signals(stopped)
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(client.run()) for client in clients]
        await stopped.wait()
        for task in running:
            task.cancel()


if __name__ == "__main__":
    main()
