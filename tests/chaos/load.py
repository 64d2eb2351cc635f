"""The loads of the matrix: how many regions, sites and values a case has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hierfl.config import FederationConfig, RegionConfig, SiteConfig
from hierfl.job import Arithmetic, Job, JobHead, RoundRules
from hierfl.types import RegionId, SiteId

__all__ = ["SMALL", "Load"]

APP = Path(__file__).with_name("app.py")
REGIONS = ("ap", "eu", "us", "af", "oc", "sa")


@dataclass(frozen=True)
class Load:
    """``regions`` of ``sites`` sites, each with a client; a model of ``values`` float32; ``processes`` a region that
    share its clients."""

    regions: int = 3
    sites: int = 4
    values: int = 10_000
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.regions} regions x {self.sites} clients x {self.values:,} values"

    @property
    def names(self) -> tuple[RegionId, ...]:
        return tuple(map(RegionId, REGIONS[: self.regions]))

    @property
    def config(self) -> FederationConfig:
        def region(name: RegionId) -> RegionConfig:
            sites = tuple(
                SiteConfig(name=SiteId(f"site-{n:02d}"), app=str(APP), options={"process": str(n % self.processes)})
                for n in range(self.sites)
            )
            return RegionConfig(name=name, sites=sites, k=3)

        return FederationConfig(name="chaos", regions=tuple(map(region, self.names)))

    def job(
        self, rounds: int = 100_000, *, min_regions: int = 1, silence_s: float = 2.0, timeout_s: float = 30.0
    ) -> Job:
        """A run that goes on until it is cancelled, unless ``rounds`` says when it ends."""
        return Job(
            job=JobHead(name="chaos", app="app", rounds=rounds),
            round=RoundRules(
                min_regions=min_regions,
                min_clients=3,
                report_timeout_s=timeout_s,
                silence_s=silence_s,
                evaluate_every=0,
                max_abandoned=1000,
            ),
            arithmetic=Arithmetic(k=3),
            app={"values": self.values},
        )


SMALL = Load()
