"""Cost constants, fitted to measured rounds: CPU seconds a round, a region, a client, a megabyte.

Each part of a federation (client, intake, region, controller, Ray's own processes) has its CPU time in a round as a
sum of a few terms, with coefficients that are not negative. They are fitted to the runs that calibrate, by least
squares on relative errors; the others are for the prediction only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["TERMS", "Constants", "Run", "Size", "fit", "read_run"]

MB = 1e6
SWEEPS = 20_000
"""Of coordinate descent; the problems have up to four unknowns."""
FLOOR_S = 0.005
"""CPU times are counted in ticks of 10 ms over several rounds: below this a relative error says nothing."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One round: how many, of what."""

    clients: int
    """In all regions."""
    params: int
    """float32 values of the model."""
    regions: int = 1
    intakes: int = 1
    """Of each region."""
    virtual: bool = False
    """Many clients in a process."""

    @property
    def model_mb(self) -> float:
        return 4 * self.params / MB

    def __str__(self) -> str:
        kind = "virtual clients" if self.virtual else "clients"
        size = "1,000 values" if self.params == 1000 else f"{self.model_mb:g} MB"
        return f"{self.clients:,} {kind} x {size}, {self.regions} region{'s' * (self.regions > 1)}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What ``bench_round`` measured of one size."""

    size: Size
    round_s: float
    """Median."""
    cpu_s: Mapping[str, float]
    """Of a round, by part."""
    bytes: Mapping[str, int]
    load: float
    intake_mib: float = 0.0
    """Most private memory of an intake; 0 where it was not noted."""


def read_run(document: Mapping[str, Any]) -> Run | None:
    """A result of ``bench_round``; None where it is none, or of rounds that are not simulated: encodings, disks,
    clients that come and go, or that hold nothing."""
    if document.get("schema") != "hierfl.bench_round/1" or "cpu_s_by_part" not in document:
        return None
    if document.get("encoding") != "float32" or any(map(document.get, ("client_disk", "connected", "light"))):
        return None
    size = Size(**{name: document[name] for name in ("clients", "params", "regions", "intakes", "virtual")})
    return Run(
        size=size,
        round_s=document["round_s"]["median"],
        cpu_s=dict(document["cpu_s_by_part"]),
        bytes=dict(document["bytes"]),
        load=document["load"],
        intake_mib=document.get("peak_rss_mib", {}).get("intake", 0.0),
    )


Terms = Mapping[str, float]

TERMS: Mapping[str, Any] = {
    "client": lambda n: {
        "client": 0.0 if n.virtual else n.clients,
        "virtual_client": n.clients if n.virtual else 0.0,
        "client_mb": n.clients * n.model_mb,
    },
    "intake": lambda n: {
        "region": n.regions,
        "client": n.clients,
        "client_mb": n.clients * n.model_mb,
        "region_mb": n.regions * n.model_mb,
    },
    "region": lambda n: {"region": n.regions, "client": n.clients, "region_mb": n.regions * n.model_mb},
    "controller": lambda n: {
        "round": 1.0,
        "region": n.regions,
        "round_mb": n.model_mb,
        "region_mb": n.regions * n.model_mb,
    },
    "ray": lambda n: {"region": n.regions, "client": n.clients},
}
"""By part: what its CPU time is a sum of, for a size: how often each term counts."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """CPU seconds of each term of each part, and the seconds of a round in which nobody works."""

    cpu_s: Mapping[str, Mapping[str, float]]
    slowdown: float = 1.0
    """How much longer work takes than its CPU seconds on as many cores: shared caches, other programs."""
    wait_s: float = 0.0
    """Of a round: commits to disk, hops between processes, wake-ups. Like the slowdown, what the simulation lacks."""
    wait_s_mb: float = 0.0
    """More for each MB of the model: sum and model are written and synced, one after the other, while nobody works."""

    def of(self, part: str, term: str) -> float:
        return self.cpu_s[part][term]

    def cpu_of(self, size: Size) -> dict[str, float]:
        """CPU seconds of a round, by part."""
        return {
            part: sum(times * self.cpu_s[part][term] for term, times in terms(size).items())
            for part, terms in TERMS.items()
        }


def fit(runs: Sequence[Run]) -> Constants:
    """The constants that fit ``runs`` best.

    Raises:
        ValueError: Too few runs for the number of constants.
    """
    most = max(len(terms(runs[0].size)) for terms in TERMS.values()) if runs else 1
    if len(runs) < most:
        raise ValueError(f"{most} runs are needed to calibrate, there are {len(runs)}")
    return Constants(cpu_s={part: _fit_part(part, runs) for part in TERMS})


def _fit_part(part: str, runs: Sequence[Run]) -> dict[str, float]:
    names = list(TERMS[part](runs[0].size))
    counts = np.array([[TERMS[part](run.size)[name] for name in names] for run in runs], float)
    taken = np.array([run.cpu_s.get(part, 0.0) for run in runs])
    weights = 1 / np.maximum(taken, FLOOR_S)
    found = nonnegative_least_squares(counts * weights[:, None], taken * weights)
    return {name: float(f"{value:.4g}") for name, value in zip(names, found, strict=True)}


def nonnegative_least_squares(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """``x >= 0`` that makes ``|matrix @ x - wanted|`` least, by coordinate descent (the problem is convex).

    Args:
        matrix: Shape ``(num_equations, num_unknowns)``, float64.
        wanted: Shape ``(num_equations,)``.
    Returns:
        Shape ``(num_unknowns,)``; 0 where a column is all zeros.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    gram, right = (matrix / scale).T @ (matrix / scale), (matrix / scale).T @ wanted
    x = np.zeros(len(right))
    for _ in range(SWEEPS):
        before = x.copy()
        for number in range(len(x)):
            if gram[number, number]:
                rest = right[number] - gram[number] @ x + gram[number, number] * x[number]
                x[number] = max(0.0, rest / gram[number, number])
        if np.allclose(before, x, rtol=1e-10, atol=1e-12):
            break
    return x / scale
