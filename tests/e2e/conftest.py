"""``federate``: a whole federation in one event loop (tests/support/federations.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from commands import hierfl
from federations import InProcess, directly, noisy_app

from combiners.settings import IntakeSettings, RegionSettings
from hierfl.client.app import App

__all__ = ["federate", "hierfl"]


@pytest.fixture
def federate(tmp_path: Path):
    """``async with federate({"eu": ["site-00", ...]}, intakes=1) as federation``."""
    count = iter(range(1000))

    @asynccontextmanager
    async def start(
        regions: Mapping[str, list[str]],
        *,
        intakes: int = 1,
        app: App | None = None,
        settings: RegionSettings | None = None,
        between: Callable[[str, str], Awaitable[str]] = directly,
        intake: IntakeSettings | None = None,
        bootstrap: int | None = None,
    ) -> AsyncIterator[InProcess]:
        directory = tmp_path / f"federation-{next(count)}"
        federation = InProcess(
            directory, regions, intakes, app or noisy_app(), settings or RegionSettings(), between, intake, bootstrap
        )
        federation.provision()
        async with AsyncExitStack() as stack:
            await federation.start_controller(stack)
            for region in regions:
                await federation.start_combiner(stack, region)
                federation.start_clients(region)
            stack.push_async_callback(federation.stop_clients)
            yield federation

    return start
