"""SCALE.md, made from the result of ``simulate_scale``: no figure in it is typed, but those whose source it names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from benchmarks.scale.constants import Constants
from benchmarks.scale.paper import GLOBAL, Federation, needs, totals
from benchmarks.scale.result import GOAL, Prediction, ScaleResult

__all__ = ["document"]

MODELS_MB = (0.4, 100.0)
"""100,000 values, and 25 million."""
UNITS = (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
COHORT = 0.01
"""Of the clients, in the second case: sites that are asked in turn."""
REPORTS_PER_S = 0.5
"""From each region to the controller, at the most (``combiners/uplink.py``)."""
STORE_WRITES = 3
"""Transactions of a round at the controller beside one for each region's answer: opened, closed, committed."""
SQLITE_PER_S, REDIS_PER_S, REDIS_MANY_PER_S = 4_000, 3_200, 9_800
RAY_NODES, RAY_ACTORS = 250, 10_000
RAY_CALL_S = (0.00065, 0.003)
RAY_SOURCE = (
    "https://github.com/ray-project/ray/blob/048f73e1902d1e464c92b7a0c7f0101e44ac11e7/release/benchmarks/README.md"
)
REDIS_SOURCE = "https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/"


def document(result: ScaleResult) -> str:
    """The whole page."""
    parts = (
        _head(result),
        _constants(result.constants),
        _simulation(result.predictions),
        _global(result),
        _controller(result),
        _costs(result),
        _others(),
        _missing(),
    )
    return "\n\n".join(parts) + "\n"


def _head(result: ScaleResult) -> str:
    machine = result.machine
    versions = ", ".join(f"{name} {number}" for name, number in sorted(result.versions.items()))
    return f"""\
# Scale, on paper, with numbers

<!-- Made by `python benchmarks/simulate_scale.py` from results/simulation.json; edit benchmarks/scale/text.py. -->

What does a round cost at {GLOBAL.regions} regions, {GLOBAL.regions * GLOBAL.intakes:,} intakes and {GLOBAL.clients:,} \
clients, and what gives way first? Rounds measured on one small machine give the cost of a client, of a megabyte, of \
a region; a simulation with these costs is held against rounds that it has not seen; then the costs are multiplied.

Measured on: {machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, load {result.load:.1f} \
before a bench (median); {versions}; seed {result.seed}."""


def _constants(constants: Constants) -> str:
    rows = [
        (part, term.replace("_mb", " x MB").replace("_", " "), f"{1000 * value:,.3g} ms")
        for part, terms in sorted(constants.cpu_s.items())
        for term, value in sorted(terms.items())
    ]
    return f"""\
## What things cost

CPU time, fitted to the rounds that calibrate (below); a MB is 10^6 bytes of float32 model, which go down and come up. \
Terms are not negative; 0 says that the rounds cannot tell the term from the others.

{_table(("part", "for each", "CPU"), rows, right=1)}

Work took {constants.slowdown:.2f} x its CPU time on as many cores (shared caches, other programs), and beside it a \
round waits {1000 * constants.wait_s:.0f} ms (commits to disk, hops between processes) and \
{1000 * constants.wait_s_mb:.1f} ms for each MB of the model (sum and model are written and synced); \
these are fitted to the same rounds, and none is used below where the costs are multiplied."""


def _simulation(predictions: Sequence[Prediction]) -> str:
    unseen = [one for one in predictions if not one.calibrates]
    good = sum(one.is_within_goal for one in unseen)
    rows = [
        (
            str(one.size),
            "calibrates" if one.calibrates else "**predicted**",
            f"{one.measured_s:.3f} s",
            f"{one.predicted_s:.3f} s",
            _signed(one.error),
            _signed(one.predicted_cpu_s / one.measured_cpu_s - 1),
            f"{one.load:.1f}",
        )
        for one in predictions
    ]
    headings = ("round", "", "measured", "simulated", "error", "error of CPU", "load before")
    return f"""\
## Does the simulation know this machine?

A discrete-event simulation (SimPy, `benchmarks/scale/round.py`): cores in slices, an event loop a process, upload \
slots, claims at the Region, both ends of a border working at once. Which rounds calibrate and which are predicted \
is fixed in `benchmarks/simulate_scale.py` before anything is measured; the goal is {100 * GOAL:g} %.

**{good} of {len(unseen)} predicted rounds are within {100 * GOAL:g} %.**{_misses(unseen)}

{_table(headings, rows, right=5)}"""


def _misses(unseen: Iterable[Prediction]) -> str:
    missed = [f"{one.size} ({_signed(one.error)})" for one in unseen if not one.is_within_goal]
    words = f" Outside it: {'; '.join(missed)}." if missed else ""
    loaded = " Load above 1 before a bench: other programs took cores, which the simulation knows by the slowdown only."
    return words + loaded


def _cases() -> list[tuple[str, Federation, float]]:
    everyone, some = GLOBAL, replace(GLOBAL, clients=int(GLOBAL.clients * COHORT))
    return [
        (f"{who}, {model_mb:g} MB", on, model_mb)
        for who, on in (("everyone", everyone), (f"{100 * COHORT:g} % of the clients", some))
        for model_mb in MODELS_MB
    ]


def _global(result: ScaleResult) -> str:
    on = GLOBAL
    blocks = []
    for name, federation, model_mb in _cases():
        found = needs(federation, model_mb, result.constants, result.partial_ratio)
        rows = [(need.resource, _duration(need.seconds), need.why) for need in found]
        first = found[0]
        blocks.append(
            f"**{name}.** First to saturate: {first.resource}; a round takes at least {_duration(first.seconds)}.\n\n"
            + _table(("resource", "busy for", "with"), rows)
        )
    memory = ""
    if result.kib_a_client is not None:
        memory = (
            f" A connected client costs an intake {result.kib_a_client:,.0f} KiB (measured):"
            f" {result.kib_a_client * on.clients_an_intake / 2**20:,.1f} GiB were all of them connected at once."
        )
    return f"""\
## {on.regions} regions, {on.regions * on.intakes:,} intakes, {on.clients:,} clients

{on.intakes} intakes a region with {on.intake_cores} cores each, {on.region_cores} cores for each Region, \
{on.controller_cores} for the controller, links of {on.link_gbit:g} Gbit/s; {on.clients_an_intake:,.0f} clients an \
intake where everyone takes part. Each line is the time that one round keeps a resource busy; they overlap, so a \
round takes at least the longest. Clients are on machines of their own, and their training is not counted.{memory}

""" + "\n\n".join(blocks)


def _controller(result: ScaleResult) -> str:
    rows = []
    for name, federation, model_mb in _cases():
        found = needs(federation, model_mb, result.constants, result.partial_ratio)
        round_s = found[0].seconds
        cost = totals(federation, model_mb, result.constants, result.partial_ratio)
        writes = federation.regions + STORE_WRITES
        rows.append(
            (
                name,
                _duration(round_s),
                f"{cost.border_down_bytes / round_s / 1e6:,.1f} MB/s",
                f"{cost.border_up_bytes / round_s / 1e6:,.1f} MB/s",
                f"{cost.core_s['controller'] / round_s:,.2f} cores",
                f"{writes / round_s:,.1f}/s",
                f"{federation.regions * REPORTS_PER_S:g}/s",
            )
        )
    headings = ("case", "a round takes", "models out", "sums in", "CPU", "store commits", "reports, at most")
    return f"""\
## What the controller does each second

It sees regions, never clients: its work does not grow with their number. With rounds as short as the busiest \
resource allows, back to back:

{_table(headings, rows, right=6)}

A round is {GLOBAL.regions} + {STORE_WRITES} commits to the store: one for each region's answer, and it is opened, \
closed and committed."""


def _costs(result: ScaleResult) -> str:
    rows = []
    for name, federation, model_mb in _cases():
        cost = totals(federation, model_mb, result.constants, result.partial_ratio)
        servers_s = sum(seconds for part, seconds in cost.core_s.items() if part != "client")
        flat = federation.clients * model_mb * 1e6
        rows.append(
            (
                name,
                _bytes(cost.client_bytes),
                f"{_bytes(cost.border_up_bytes)} + {_bytes(cost.border_down_bytes)}",
                f"{flat / cost.border_up_bytes:,.0f} x",
                f"{cost.core_s['client']:,.0f}",
                f"{servers_s:,.0f}",
                f"{cost.core_s['controller']:,.1f}",
            )
        )
    headings = (
        "case",
        "inside regions",
        "across borders, up + down",
        "updates alone over sums",
        "core-s, clients",
        "core-s, servers",
        "core-s, controller",
    )
    return f"""\
## What a round costs

{_table(headings, rows, right=6)}

"Updates alone over sums" is what would cross borders upwards if clients sent to one place, over what does."""


def _others() -> str:
    actors = GLOBAL.intakes + 1
    low, high = (1 / seconds for seconds in reversed(RAY_CALL_S))
    return f"""\
## Where Ray's and Redis's limits stand

- **Ray**: one cluster a region, so that its limits are a region's, not the federation's. Here a cluster has {actors} \
actors (a Region, {GLOBAL.intakes} intakes) on at most as many nodes. Ray's own release tests cover {RAY_NODES}+ nodes \
and {RAY_ACTORS:,}+ actors in one cluster ([scalability envelope]({RAY_SOURCE})): {RAY_NODES // actors} x and \
{RAY_ACTORS // actors} x what is needed. A call takes {1000 * RAY_CALL_S[0]:g} ms idle and up to \
{1000 * RAY_CALL_S[1]:g} ms under load (measured when the libraries were chosen, two cores), so that a Region answers \
{low:,.0f} to {high:,.0f} calls a second; an intake makes one call for all claims that wait, never one a client.
- **SQLite**, the controller's and each region's store: {SQLITE_PER_S:,} durable commits a second (WAL, \
`synchronous=FULL`; measured as above). The table above is what the controller asks of it.
- **Redis**, the store of several controllers. With its append-only file synced at every write it took \
{REDIS_PER_S:,} commits a second on one connection, {REDIS_MANY_PER_S:,} on eight (measured as above); that setting, \
`appendfsync always`, is the slow and safe one of [its three]({REDIS_SOURCE}). It stores rows, never models or sums, \
so that the number of commits is what counts."""


def _missing() -> str:
    return """\
## What this page does not show

- Sites' own training, and networks with loss or with less than the links above: `bench_wan` measures slow links.
- More cores than the machine has: event loops are taken as they are, work on bytes as if it spread over all cores.
- Ten million handshakes. Connections are kept; a client that comes and goes pays TLS each time.
- Caches and memory bandwidth, which many cores share."""


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> str:
    """Markdown; the last ``right`` columns are set to the right."""
    left = len(headings) - right
    rule = ["---"] * left + ["---:"] * right
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows))


def _signed(part: float) -> str:
    return f"{100 * part:+.0f} %"


def _duration(seconds: float) -> str:
    if seconds >= 600:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:,.0f} ms"


def _bytes(number: float) -> str:
    unit, size = next(((unit, size) for unit, size in UNITS if number >= size), UNITS[-1])
    return f"{number / size:,.3g} {unit}"
