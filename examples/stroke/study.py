"""What is asked: which hospitals, in which regions, with which job. Pure, so that every part agrees on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from baselines import Split
from prepare import Hospital, hospitals_of, read_rows, sample_of, split
from reference import APP_FILE
from regions import group

from hierfl.config import FederationConfig, RegionConfig, SiteConfig
from hierfl.job import Arithmetic, Job, JobHead, ModelChoice, RoundRules
from hierfl.types import RegionId, SiteId

__all__ = ["Study"]

STEPS, LEARNING_RATE = 5, 2.0
"""Of gradient descent at a hospital in each round."""
HELD_OUT = 0.3
"""Share of each hospital's patients that models are measured on."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Made by ``of``."""

    regions: dict[str, list[Hospital]]
    rounds: int
    k: int
    seed: int

    @classmethod
    def of(cls, data: Path, *, min_patients: int, rounds: int, k: int, seed: int) -> Study:
        """The hospitals of the trial's CSV that have at least ``min_patients`` with a known outcome.

        Raises:
            NotFound, ConfigError: The file, or a value in it, is not the trial's; or too few hospitals are left.
        """
        hospitals = [one for one in hospitals_of(read_rows(data)) if len(one.rows) >= min_patients]
        return cls(regions=group(hospitals, k), rounds=rounds, k=k, seed=seed)

    @property
    def hospitals(self) -> list[Hospital]:
        return [hospital for own in self.regions.values() for hospital in own]

    @property
    def sites(self) -> dict[str, list[str]]:
        """Names of the sites by region."""
        return {region: [hospital.name for hospital in own] for region, own in self.regions.items()}

    @cached_property
    def split(self) -> Split:
        """Training and held-out patients by site: the same as the app makes at each."""
        return {one.name: split(sample_of(one.rows), HELD_OUT, self.seed, one.name) for one in self.hospitals}

    def job(self, *, own_intercept: bool) -> Job:
        """All hospitals in every round. ``own_intercept``: the intercept has the role ``local``."""
        return Job(
            job=JobHead(name="stroke", app="stroke", rounds=self.rounds, seed=self.seed),
            model=ModelChoice(tensors=("coefficients",) if own_intercept else "all"),
            round=RoundRules(
                min_regions=len(self.regions),
                min_clients=min(len(own) for own in self.regions.values()),
                report_timeout_s=120.0,
            ),
            arithmetic=Arithmetic(k=self.k),
            app={
                "held_out": HELD_OUT,
                "split_seed": self.seed,
                "steps": STEPS,
                "learning_rate": LEARNING_RATE,
            },
        )

    def federation(self, data: Path) -> FederationConfig:
        """One combiner a region, one client a hospital; the hospitals' files lie in ``data``."""
        options = {"data": str(data)}
        return FederationConfig(
            name="stroke",
            regions=tuple(
                RegionConfig(
                    name=RegionId(region),
                    sites=tuple(SiteConfig(name=SiteId(site), app=str(APP_FILE), options=options) for site in sites),
                    k=self.k,
                )
                for region, sites in self.sites.items()
            ),
        )
