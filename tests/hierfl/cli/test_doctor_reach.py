"""``hierfl doctor --kit``: real kits, and a real server of one RPC, asked by a process of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from hierfl import provision
from hierfl.pki import Kit
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc, tls


class Polite:
    """Says hello; nothing else is asked of it here."""

    async def Hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloResponse:  # noqa: N802  the RPC's name
        return rpc.answer_hello(request)

    async def ListClients(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    provision.init(folder, "clinics")
    for region in ("eu", "us"):
        provision.add_region(folder, region)
        provision.add_operator(folder, "ann", region)
    return folder


@pytest.fixture
async def combiner(federation: Path) -> AsyncIterator[str]:
    """Address of a server with the certificate of the combiner of eu."""
    server = grpc.aio.server(options=tls.server_options())
    rpc.add_service(server, "RegionOperatorService", Polite())
    kit = Kit.load(federation / "kits" / "regions" / "eu" / "combiner")
    port = tls.bind(server, "127.0.0.1:0", tls.server_credentials(kit))
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


CHECK = """
import json, sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from hierfl.cli.doctor import check_kit
kit, *servers = sys.argv[1:]
print(json.dumps([asdict(found) for found in check_kit(Path(kit), servers, datetime.now(UTC))]))
"""


async def check(kit: Path, *servers: str) -> dict[str, dict[str, str]]:
    """Findings by what was checked, as a process of its own sees it (the rest of ``doctor`` imports torch)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHECK, str(kit), *servers, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    return {one["check"]: one for one in json.loads(out)}


async def test_a_good_kit_whose_server_answers_is_fine(federation, combiner):
    found = await check(federation / "kits" / "regions" / "eu" / "operators" / "ann", combiner)
    assert found[f"the combiner of eu at {combiner}"]["found"].startswith("answers, protocol version")
    assert {one["state"] for one in found.values()} == {"ok"}


async def test_a_server_of_another_region_is_named_wrong(federation, combiner):
    found = await check(federation / "kits" / "regions" / "us" / "operators" / "ann", combiner)
    assert found[f"the combiner of us at {combiner}"]["state"] == "wrong"


async def test_nobody_there_is_said_at_once(federation):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    found = await check(federation / "kits" / "regions" / "eu" / "operators" / "ann", address)
    assert "firewall" in found[f"the combiner of eu at {address}"]["next"]


async def test_a_kit_without_an_address_says_so(federation):
    found = await check(federation / "kits" / "regions" / "eu" / "operators" / "ann")
    assert found["server"]["state"] == "absent"
