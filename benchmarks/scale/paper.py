"""The same constants at a size that no machine here can run: what each resource needs for one round.

Nothing is simulated here: a resource's time is its work over its capacity, and a round takes at least the longest of
them. What saturates first is the one at the top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.scale.constants import Constants

__all__ = ["GLOBAL", "Federation", "Need", "Totals", "needs", "totals"]

GBIT = 1e9 / 8
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Federation:
    """How many, and on what. Cores are those of the machine that was measured."""

    regions: int
    intakes: int
    """Of each region."""
    clients: int
    """In all that take part in one round."""
    intake_cores: int
    """Of each intake."""
    region_cores: int
    """Of the Region actor: one for its event loop, the others for bytes."""
    controller_cores: int
    link_gbit: float
    """Of each intake, and of the controller; each way."""

    @property
    def clients_an_intake(self) -> float:
        return self.clients / (self.regions * self.intakes)

    @property
    def clients_a_region(self) -> float:
        return self.clients / self.regions


GLOBAL = Federation(
    regions=100,
    intakes=10,
    clients=10_000_000,
    intake_cores=4,
    region_cores=4,
    controller_cores=8,
    link_gbit=10.0,
)


@dataclass(frozen=True, kw_only=True)
class Need:
    """One resource, and the seconds that one round keeps it busy."""

    resource: str
    seconds: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What one round costs, over all places."""

    client_bytes: float
    """Down to all clients and up again."""
    border_up_bytes: float
    border_down_bytes: float
    core_s: Mapping[str, float]
    """By part."""


def needs(on: Federation, model_mb: float, constants: Constants, partial_ratio: float) -> list[Need]:
    """Every resource, the busiest first.

    Args:
        model_mb: The float32 model, in 10^6 bytes.
        partial_ratio: Bytes of a partial over bytes of the model.
    """
    cost, mine, here = constants.of, on.clients_an_intake, on.clients_a_region
    link = on.link_gbit * GBIT
    intake_bytes_s = mine * model_mb * cost("intake", "client_mb") + model_mb * cost("intake", "region_mb") / on.intakes
    controller_mb_s = model_mb * (on.regions * cost("controller", "region_mb") + cost("controller", "round_mb"))
    found = (
        Need(
            resource="an intake's event loop",
            seconds=mine * cost("intake", "client"),
            why=f"{mine:,.0f} clients, one after the other",
        ),
        Need(
            resource="an intake's cores",
            seconds=(mine * cost("intake", "client") + intake_bytes_s) / on.intake_cores,
            why=f"{on.intake_cores} cores: TLS, checks and folds of {mine:,.0f} updates",
        ),
        Need(
            resource="an intake's link",
            seconds=mine * model_mb * MB / link,
            why=f"{mine:,.0f} models of {model_mb:g} MB each way at {on.link_gbit:g} Gbit/s",
        ),
        Need(
            resource="a Region's event loop",
            seconds=here * cost("region", "client") + cost("region", "region"),
            why=f"{here:,.0f} claims, one after the other",
        ),
        Need(
            resource="a Region's cores",
            seconds=model_mb * cost("region", "region_mb") / max(1, on.region_cores - 1),
            why="fetch the model; seal, pack and send the sum",
        ),
        Need(
            resource="the controller's event loop",
            seconds=cost("controller", "round") + on.regions * cost("controller", "region"),
            why=f"{on.regions} regions",
        ),
        Need(
            resource="the controller's cores",
            seconds=controller_mb_s / on.controller_cores,
            why=f"{on.controller_cores} cores: {on.regions} models out, {on.regions} sums in, one new model",
        ),
        Need(
            resource="the controller's link",
            seconds=on.regions * model_mb * max(1.0, partial_ratio) * MB / link,
            why=f"{on.regions} partials of {partial_ratio:.2f} x the model at {on.link_gbit:g} Gbit/s",
        ),
    )
    return sorted(found, key=lambda need: -need.seconds)


def totals(on: Federation, model_mb: float, constants: Constants, partial_ratio: float) -> Totals:
    """Bytes and core-seconds of one round, over all places. Clients are processes of their own."""
    cost, clients, regions = constants.of, on.clients, on.regions
    core_s = {
        "client": clients * (cost("client", "client") + model_mb * cost("client", "client_mb")),
        "intake": clients * (cost("intake", "client") + model_mb * cost("intake", "client_mb"))
        + regions * (cost("intake", "region") + model_mb * cost("intake", "region_mb")),
        "region": clients * cost("region", "client")
        + regions * (cost("region", "region") + model_mb * cost("region", "region_mb")),
        "controller": cost("controller", "round")
        + regions * cost("controller", "region")
        + model_mb * (cost("controller", "round_mb") + regions * cost("controller", "region_mb")),
        "ray": regions * cost("ray", "region") + clients * cost("ray", "client"),
    }
    return Totals(
        client_bytes=2 * clients * model_mb * MB,
        border_up_bytes=regions * model_mb * partial_ratio * MB,
        border_down_bytes=regions * model_mb * MB,
        core_s=core_s,
    )
