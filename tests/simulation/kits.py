"""Certificates of two small federations, made once a process: of region ``eu``, and of ``eu`` and ``us``."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from hierfl import provision
from hierfl.pki import Kit
from hierfl.types import RegionId

__all__ = ["CONTROLLERS", "REGIONS", "SITES", "Kits", "kits"]

REGIONS = (RegionId("eu"), RegionId("us"))
SITES = 4
CONTROLLERS = ("ctl-a:1", "ctl-b:1")
MOST_INTAKES = 2


@dataclass(frozen=True)
class Kits:
    controller: Kit
    combiners: dict[str, Kit]
    clients: dict[str, tuple[Kit, ...]]
    """By region: one client for each of four sites, and a second one of the first site."""


@functools.cache
def kits(num_regions: int) -> Kits:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        provision.init(folder, "sim")
        clients, combiners = {}, {}
        for region in REGIONS[:num_regions]:
            provision.add_region(folder, region)
            addresses = tuple(f"{region}.intake-{number}:1" for number in range(MOST_INTAKES))
            for site in range(SITES):
                provision.add_site(folder, region, f"site-{site}", 2 if site == 0 else 1)
            names = [(site, 0) for site in range(SITES)] + [(0, 1)]
            of_sites = folder / "kits" / "sites" / region
            made = [Kit.load(of_sites / f"site-{site}" / f"client-{number:02d}") for site, number in names]
            clients[region] = tuple(replace(kit, addresses=addresses) for kit in made)
            combiners[region] = Kit.load(folder / "kits" / "regions" / region / "combiner")
        return Kits(Kit.load(folder / "kits" / "controller"), combiners, clients)
