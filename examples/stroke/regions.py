"""Countries to regions, hospitals to sites. Geography decides, never data.

A region with fewer than ``k`` hospitals could release nothing, so it joins the nearest one that has hospitals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prepare import Hospital

from hierfl.errors import ConfigError

__all__ = ["COUNTRIES", "NEIGHBOURS", "group"]

COUNTRIES: Mapping[str, tuple[str, ...]] = {
    "eu-west": ("UK", "EIRE", "FRAN", "BELG", "NETH"),
    "eu-north": ("SWED", "NORW", "FINL", "DENM"),
    "eu-central": ("SWIT", "AUST", "POLA", "CZEC", "SLOK", "HUNG", "SLOV", "ROMA"),
    "eu-south": ("ITAL", "SPAI", "PORT", "GREE", "TURK", "ISRA"),
    "americas": ("USA", "CANA", "ARGE", "BRAS", "CHIL"),
    "asia-pacific": ("AUSL", "NEW", "HONG", "INDI", "JAPA", "SING", "SRI"),
    "africa": ("SOUT",),
}
"""Region: its countries, four letters as published (AUST is Austria, AUSL Australia, NEW New Zealand)."""

NEIGHBOURS: Mapping[str, tuple[str, ...]] = {
    "eu-west": ("eu-central", "eu-north", "eu-south", "americas", "asia-pacific", "africa"),
    "eu-north": ("eu-central", "eu-west", "eu-south", "americas", "asia-pacific", "africa"),
    "eu-central": ("eu-south", "eu-west", "eu-north", "africa", "asia-pacific", "americas"),
    "eu-south": ("eu-central", "eu-west", "eu-north", "africa", "asia-pacific", "americas"),
    "americas": ("eu-west", "eu-south", "eu-north", "eu-central", "asia-pacific", "africa"),
    "asia-pacific": ("africa", "eu-south", "eu-central", "eu-west", "eu-north", "americas"),
    "africa": ("eu-south", "asia-pacific", "eu-west", "eu-central", "eu-north", "americas"),
}
"""Region: the others, the nearest first."""

_REGION_OF = {country: region for region, countries in COUNTRIES.items() for country in countries}


def group(hospitals: Sequence[Hospital], k: int) -> dict[str, list[Hospital]]:
    """Hospitals by region, each of at least ``k``; regions in the table's order, hospitals in their own.

    Raises:
        ConfigError: A country that the table lacks, or fewer than ``k`` hospitals in all.
    """
    if len(hospitals) < k:
        raise ConfigError("--min-patients", None, f"leaves {len(hospitals)} hospitals; k is {k}: lower it")
    home = {hospital.name: _region_of(hospital) for hospital in hospitals}
    while small := _smallest_below(k, list(home.values())):
        nearest = next(region for region in NEIGHBOURS[small] if region in home.values())
        home = {name: nearest if region == small else region for name, region in home.items()}
    found = {region: [hospital for hospital in hospitals if home[hospital.name] == region] for region in COUNTRIES}
    return {region: own for region, own in found.items() if own}


def _region_of(hospital: Hospital) -> str:
    region = _REGION_OF.get(hospital.country)
    if region is None:
        raise ConfigError(
            "COUNTRY", hospital.country, f"of {hospital.name} is in no region (examples/stroke/regions.py)"
        )
    return region


def _smallest_below(k: int, regions: Sequence[str]) -> str:
    """The region with the fewest hospitals, if these are fewer than ``k``; else nothing."""
    smallest = min(sorted(set(regions)), key=regions.count)
    return smallest if regions.count(smallest) < k else ""
