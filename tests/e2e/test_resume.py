"""Links that break in the middle of a transfer: it goes on where it broke off, and the model's bits are the same."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from federations import job, noisy_app
from proxies import Proxy, proxy_to

from hierfl.client.params import make_layout
from hierfl.operator import connect
from hierfl.pki import Kit
from hierfl.wire import hierfl_pb2 as pb

NUM_VALUES = 8_000_000
"""32 MB: about 5 MB may be on their way, in buffers of system and gRPC, when a link breaks under load."""
SIZE_BYTES = 4 * NUM_VALUES
REGION, SITES = "eu", ["site-00", "site-01"]
OVERHEAD = 0.02
"""Framing, TLS, and all that is said beside transfers."""


@pytest.fixture
def run_through(federate) -> Callable:
    """``async with run_through(cuts) as (run, proxies)``: one round, every hop through a proxy of its own."""

    @asynccontextmanager
    async def start(cuts: dict[str, dict[str, list[int]]]) -> AsyncIterator[tuple[pb.GetRunResponse, dict[str, Proxy]]]:
        proxies: dict[str, Proxy] = {}
        async with AsyncExitStack() as stack:

            async def between(name: str, address: str) -> str:
                proxies[name] = await stack.enter_async_context(proxy_to(address, **cuts.get(name, {})))
                return proxies[name].address

            app = noisy_app(num_values=NUM_VALUES)
            async with federate({REGION: SITES}, app=app, between=between) as federation:
                run = await federation.train(job(rounds=1, min_clients=2, evaluate_every=0))
                await federation.hear("counted in model version 1", times=len(SITES))  # the region has that model now
                yield run, proxies

    return start


@pytest.mark.timeout(120)
@pytest.mark.parametrize("hop", ["download of a client", "upload of a client", "download of a region", "uplink"])
async def test_a_cut_transfer_goes_on_where_it_broke_off_and_the_model_has_the_same_bits(hop, run_through):
    server, way = {
        "download of a client": (REGION, "down"),
        "upload of a client": (REGION, "up"),
        "download of a region": ("controller", "down"),
        "uplink": ("controller", "up"),
    }[hop]
    async with run_through({}) as (uncut, proxies):
        assert uncut.summary.state == "finished", uncut.summary.reason
        passed = proxies[server].bytes[way]
    num_transfers = {"upload of a client": len(SITES), "download of a region": 2}  # before the round, and after it
    size = passed / num_transfers.get(hop, 1)  # clients of one process share what they fetch
    assert size > 0.9 * SIZE_BYTES
    for fraction in (0.25, 0.5, 0.99):
        async with run_through({server: {f"cut_{way}": [int(fraction * size)]}}) as (run, proxies):
            assert run.summary.state == "finished", run.summary.reason
            assert proxies[server].num_cut == 1
            again = proxies[server].bytes[way] - passed
        assert [item.model_hash for item in run.rounds] == [item.model_hash for item in uncut.rounds]
        assert [item.num_updates for item in run.rounds] == [len(SITES)]
        assert again < (0.3 - OVERHEAD) * size, f"cut at {fraction}"


@pytest.mark.timeout(120)
async def test_an_operators_upload_that_is_cut_goes_on_where_it_broke_off(federate):
    app = noisy_app(num_values=NUM_VALUES)
    layout, vectors = make_layout(app.init({}))
    async with federate({}, app=app) as federation:
        kit = Kit.load(federation.kit("operators", "admin"))
        for cuts in ([SIZE_BYTES // 2, SIZE_BYTES // 4], [int(0.99 * SIZE_BYTES)]):
            async with proxy_to(federation.controller.address, cut_up=cuts) as proxy:
                async with connect(kit, proxy.address) as operator:
                    name = await operator.upload_model(layout, vectors)
                assert proxy.num_cut == len(cuts)
            assert federation.controller.leader.blobs.model(name)[1]["train"].tobytes() == vectors["train"].tobytes()
            assert proxy.bytes["up"] < (1 + 0.3 * len(cuts)) * SIZE_BYTES
