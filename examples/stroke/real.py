"""The study as a real federation: a controller, a combiner with its own Ray for each region, a client for each site.

All of it on this machine, over mutual TLS; hospitals of one region share processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reference import APP_FILE, Trained
from study import Study

from hierfl.cli.output import say
from hierfl.cli.progress import Progress
from hierfl.cli.runs import raise_for_outcome
from hierfl.client import initial_model
from hierfl.client.held import LocalTensors
from hierfl.errors import Unreachable
from hierfl.job import Job
from hierfl.local import Federation, serving
from hierfl.operator import Operator, connect
from hierfl.pki import Kit
from hierfl.types import ModelHash, Params, RunId
from hierfl.wire import hierfl_pb2 as pb

__all__ = ["run_jobs"]

CONNECT_TIMEOUT_S = 180.0
LOOK_AGAIN_S = 0.5


async def run_jobs(study: Study, jobs: Sequence[Job], data: Path, state: Path) -> list[tuple[Trained, dict[str, Any]]]:
    """Start the federation, run one job after the other, and stop it.

    Args:
        data: Folder of the hospitals' files.
        state: Folder of the federation's certificates and stores.
    Returns:
        What each run trained, and how it went, for the report.
    Raises:
        RunFailed, Unreachable: A run did not finish, or hospitals did not connect.
    """
    async with serving(study.federation(data), state, say) as federation:
        kit = Kit.load(federation.operator_kit)
        async with connect(kit, federation.controller_address) as operator:
            await _wait_for_all(operator, study)
            return [await _run(operator, federation, study, job) for job in jobs]


async def _wait_for_all(operator: Operator, study: Study) -> None:
    """A round begins once enough are there; this one is to have every hospital from the first on."""
    wanted, before = len(study.hospitals), -1
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            while (there := await _num_connected(operator)) < wanted:
                if there > before:
                    say(f"{there} of {wanted} hospitals are connected")
                before = there
                await asyncio.sleep(LOOK_AGAIN_S)  # an operator is told of no client's coming
    except TimeoutError:
        raise Unreachable(
            f"{wanted - before} of {wanted} hospitals did not connect; keep their logs with --dir"
        ) from None
    say(f"all {wanted} hospitals are connected")


async def _num_connected(operator: Operator) -> int:
    return sum(region.sites_connected for region in (await operator.status()).regions)


async def _run(operator: Operator, federation: Federation, study: Study, job: Job) -> tuple[Trained, dict[str, Any]]:
    layout, vectors = initial_model(job, app=str(APP_FILE))
    run = await operator.submit(job, await operator.upload_model(layout, vectors))
    await _follow(operator, run)
    newest = max(await operator.models(run), key=lambda model: model.version)
    layout, vectors = await operator.fetch_model(newest)
    local = {} if job.model.tensors == "all" else _kept_at_sites(federation.state, study, run)
    trained = Trained(model_sha256=ModelHash(newest.model_hash), params=layout.unflatten(vectors), local=local)
    return trained, _document(await operator.run(run), len(study.hospitals))


async def _follow(operator: Operator, run: RunId) -> None:
    """Show the run until it ends. It ends with this program, so Ctrl-C detaches from nothing."""
    with Progress() as progress:
        async for snapshot in operator.follow(run):
            progress.show(snapshot)
            if snapshot.summary.state == "paused":
                break
    raise_for_outcome((await operator.run(run)).summary)


def _document(found: pb.GetRunResponse, num_hospitals: int) -> dict[str, Any]:
    training = [one for one in found.rounds if one.task == pb.TASK_KIND_TRAIN]
    return {
        "run": found.summary.run,
        "rounds": {
            "committed": found.summary.rounds_committed,
            "abandoned": found.summary.rounds_abandoned,
            "with_every_hospital": sum(one.num_sites == num_hospitals for one in training),
        },
        "seconds_a_round": round(sum(one.seconds for one in training) / len(training), 3),
        "bytes_over_borders": sum(share.bytes_out for one in found.rounds for share in one.regions),
    }


def _kept_at_sites(state: Path, study: Study, run: RunId) -> Mapping[str, Params]:
    """The tensors that never left, from each hospital's own folder: possible since all are on this machine."""
    found = {}
    for region, sites in study.sites.items():
        for site in sites:
            (folder,) = (state / "clients").glob(f"*/{region}.{site}.client-00")
            found[site] = LocalTensors(folder).load(run, study.rounds + 1)
    return found
