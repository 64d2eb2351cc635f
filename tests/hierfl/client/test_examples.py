"""The quickstart apps run as they are, over the wire; the torch one is a whole client in 30 lines."""

from __future__ import annotations

import asyncio
import hashlib
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hierfl.client import App, initial_model, load_app
from hierfl.client.offers import SitePolicy
from hierfl.client.runner import serve
from hierfl.config import load_job
from hierfl.pki import Kit

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"


async def one_update(app: App, combiner: Any, plan: Callable[..., Any], folder: Path, **task: Any) -> Any:
    """What one client sends for round 1 of a run of ``app`` from its own version 0."""
    job = load_job(QUICKSTART / "job.toml")
    job = replace(job, app=task.get("config", job.app), job=replace(job.job, app=str(app)))
    layout, vectors = initial_model(job, app=app)
    model = replace(next(iter(combiner.models.values())), layout=layout, vectors=vectors)
    combiner.models[model.hash] = model
    combiner.offers.clear()
    combiner.received.clear()
    combiner.book.clear()
    combiner.offer(plan(model=model, app=app.name, config=dict(job.app), client_part={}, seed=job.job.seed))
    kit = Kit.load(combiner.federation.client_kit())
    lines: list[str] = []
    client = asyncio.create_task(
        serve(SitePolicy(app=app), [kit], folder, task.get("site_config", {}), say=lines.append)
    )
    try:
        await combiner.until(lambda: combiner.received or combiner.declined)
        assert combiner.declined == [], lines
        return combiner.received[0]
    finally:
        client.cancel()
        await asyncio.gather(client, return_exceptions=True)


def test_the_quickstart_client_has_at_most_thirty_lines() -> None:
    assert len((QUICKSTART / "app.py").read_text().splitlines()) <= 30
    assert tomllib.loads((QUICKSTART / "job.toml").read_text())["job"]["app"] == "digits"


async def test_the_torch_quickstart_gives_the_same_update_each_time(
    combiner: Any, plan: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    app = load_app(str(QUICKSTART / "app.py"))
    first = await one_update(app, combiner, plan, tmp_path / "a")
    again = await one_update(app, combiner, plan, tmp_path / "b")
    assert first.head.weight == 100
    assert first.head.metrics["num_examples"] == 180
    assert first.head.metrics["eval_examples"] == 179
    assert abs(first.vectors["train"]).max() > 0
    assert hashlib.sha256(first.vectors["train"]).digest() == hashlib.sha256(again.vectors["train"]).digest()
    assert first.digest == again.digest


async def test_the_numpy_quickstart_reads_the_sites_own_file(
    combiner: Any, plan: Callable[..., Any], tmp_path: Path
) -> None:
    data = tmp_path / "patients.csv"
    data.write_text("".join(f"{n % 3},{n % 7},{int(n % 3 > 0)}\n" for n in range(100)))
    app = load_app(str(QUICKSTART / "numpy_app.py"))
    update = await one_update(
        app,
        combiner,
        plan,
        tmp_path / "c",
        config={"num_features": 2, "learning_rate": 0.1},
        site_config={"data": str(data)},
    )
    assert update.head.weight == 80
    assert update.vectors["train"].shape == (3,)
