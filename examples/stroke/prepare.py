"""From the trial's published CSV to a model's inputs: the same at every hospital, from its own patients only.

Nothing here is learnt from data. The constants that centre and scale the inputs are round figures after the
trial's marginals (Lancet 1997; 349: 1569-81), so a hospital needs to know of no other one.
Inputs are what was known at randomisation; what came later (``ID14``) or was made from outcomes (``EXPD6``)
is never read. Columns are found by name, so the published file and any extract of it will do.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from hierfl.errors import ConfigError, NotFound
from hierfl.types import Float64Array

__all__ = [
    "COLUMNS",
    "INPUTS",
    "Hospital",
    "Row",
    "Sample",
    "hospitals_of",
    "is_held_out",
    "read_hospital",
    "read_rows",
    "sample_of",
    "split",
    "write_hospitals",
]

Row = Mapping[str, str]
"""One patient: the values of ``COLUMNS`` as published, without white space, in capitals; empty where missing."""

NUMBERS: Mapping[str, tuple[float, float, bool]] = {
    "AGE": (72.0, 24.0, True),
    "RSBP": (160.0, 54.0, True),
    "RDELAY": (20.0, 24.0, False),
}
"""Column: centre, two standard deviations, and whether its square is an input too.

Two, so that numbers move as much as the 0 and 1 of the other inputs do (Gelman 2008, Stat Med 27: 2865-73).
A square lets both ends be worse, as they are for blood pressure (Leonardi-Bee et al. 2002, Stroke 33: 1315-20).
"""

LEVELS: Mapping[str, Mapping[str, float]] = {
    "RCONSC": {"F": 0.77, "D": 0.22, "U": 0.01},
    "SEX": {"M": 0.54, "F": 0.46},
    "RSLEEP": {"N": 0.71, "Y": 0.29},
    "RATRIAL": {"N": 0.83, "Y": 0.17},
    "RCT": {"N": 0.33, "Y": 0.67},
    "RVISINF": {"N": 0.67, "Y": 0.33},
    "RHEP24": {"N": 0.98, "Y": 0.02},
    "RASP3": {"N": 0.79, "Y": 0.21},
    "RDEF1": {"N": 0.27, "Y": 0.72, "C": 0.01},
    "RDEF2": {"N": 0.13, "Y": 0.86, "C": 0.01},
    "RDEF3": {"N": 0.24, "Y": 0.75, "C": 0.01},
    "RDEF4": {"N": 0.53, "Y": 0.44, "C": 0.03},
    "RDEF5": {"N": 0.64, "Y": 0.16, "C": 0.20},
    "RDEF6": {"N": 0.66, "Y": 0.16, "C": 0.18},
    "RDEF7": {"N": 0.81, "Y": 0.11, "C": 0.08},
    "RDEF8": {"N": 0.88, "Y": 0.06, "C": 0.06},
    "STYPE": {"PACS": 0.40, "TACS": 0.24, "LACS": 0.24, "POCS": 0.12, "OTH": 0.0},
    "RXASP": {"N": 0.50, "Y": 0.50},
    "RXHEP": {"N": 0.50, "L": 0.25, "M": 0.25},
}
"""Column: its values with their share of patients, by which the input of each is centred. The first has no input."""

SAME_AS = {("RXHEP", "H"): "M"}
"""The pilot's high dose of heparin is the main trial's medium one."""

OUTCOMES = {"1": 1.0, "2": 1.0, "3": 0.0, "4": 0.0}
"""``OCCODE``, six months later: dead or dependent is 1, not recovered or recovered is 0; any other is missing."""

COLUMNS = ("HOSPNUM", "COUNTRY", *NUMBERS, *LEVELS, "OCCODE")


def _names() -> tuple[str, ...]:
    numbers = [name for column, (_, _, squared) in NUMBERS.items() for name in (column, f"{column}^2")[: 1 + squared]]
    levels = [f"{column}={value}" for column, values in LEVELS.items() for value in list(values)[1:]]
    return (*numbers, *levels, *(f"{column} missing" for column in (*NUMBERS, *LEVELS)))


INPUTS = _names()
"""Names of the model's inputs, in order: numbers and their squares, one for each value, one for each that may lack."""


@dataclass(frozen=True)
class Sample:
    """Patients as a model sees them: ``inputs`` of shape ``(n, len(INPUTS))``, ``outcomes`` ``(n,)`` of 0 and 1."""

    inputs: Float64Array
    outcomes: Float64Array

    def __len__(self) -> int:
        return len(self.outcomes)

    def __getitem__(self, chosen: np.ndarray) -> Sample:
        return Sample(self.inputs[chosen], self.outcomes[chosen])

    @classmethod
    def concatenate(cls, samples: Iterable[Sample]) -> Sample:
        """All patients of several samples in one place: what a federation does without."""
        parts = list(samples)
        return cls(np.concatenate([part.inputs for part in parts]), np.concatenate([part.outcomes for part in parts]))


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """A hospital and its patients whose outcome is known. ``name`` is that of its site: ``site-h123``."""

    name: str
    country: str
    rows: tuple[Row, ...]


def read_rows(path: Path) -> list[Row]:
    """Patients with a known outcome, in the file's order.

    Raises:
        NotFound: There is no such file.
        ConfigError: Names the columns that it lacks.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig", "replace")  # only columns that nobody typed freely are read
    except FileNotFoundError:
        raise NotFound("file", str(path), "the trial's data: doi 10.7488/ds/104") from None
    except OSError as error:
        raise ConfigError("--data", str(path), f"cannot be read: {error.strerror}") from None
    reader = csv.DictReader(text.splitlines())
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError("--data", str(path), f"must have a column {', '.join(missing)}, as the trial's CSV has")
    rows = ({column: (line[column] or "").strip().upper() for column in COLUMNS} for line in reader)
    return [row for row in rows if row["OCCODE"] in OUTCOMES]


def hospitals_of(rows: Iterable[Row]) -> list[Hospital]:
    """Patients by hospital, in the order of the hospitals' numbers."""
    by_number: dict[int, list[Row]] = {}
    for row in rows:
        if not row["HOSPNUM"].isdecimal():
            raise ConfigError("HOSPNUM", row["HOSPNUM"], "must be a number")
        by_number.setdefault(int(row["HOSPNUM"]), []).append(row)
    return [
        Hospital(name=f"site-h{number}", country=own[0]["COUNTRY"], rows=tuple(own))
        for number, own in sorted(by_number.items())
    ]


def write_hospitals(hospitals: Iterable[Hospital], folder: Path) -> None:
    """Give each hospital its own file, ``SITE.csv``: nobody's app reads another's."""
    folder.mkdir(parents=True, exist_ok=True)
    for hospital in hospitals:
        with (folder / f"{hospital.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(hospital.rows)


def read_hospital(folder: Path, site: str) -> Sample:
    """The patients of one hospital, from its own file."""
    return sample_of(read_rows(folder / f"{site}.csv"))


# --- inputs


def sample_of(rows: Sequence[Row]) -> Sample:
    """Inputs and outcomes of patients.

    Raises:
        ConfigError: Names a column with a value that is not one of the trial's.
    """
    columns = [input_ for column in NUMBERS for input_ in _number(column, [row[column] for row in rows])]
    columns += [input_ for column in LEVELS for input_ in _levels(column, [row[column] for row in rows])]
    lacks = [np.array([not row[column] for row in rows], np.float64) for column in (*NUMBERS, *LEVELS)]
    inputs = np.stack([*columns, *lacks], axis=1)
    return Sample(inputs, np.array([OUTCOMES[row["OCCODE"]] for row in rows], np.float64))


def _number(column: str, values: list[str]) -> list[Float64Array]:
    """A number, centred and scaled, and its square; 0 where it is missing."""
    centre, two_sd, squared = NUMBERS[column]
    scaled = np.array([(_as_float(column, value) - centre) / two_sd if value else 0.0 for value in values], np.float64)
    return [scaled, scaled * scaled] if squared else [scaled]


def _as_float(column: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(column, value, "must be a number") from None


def _levels(column: str, values: list[str]) -> list[Float64Array]:
    """One input for each value but the first: 1 minus its share where a patient has it; 0 where it is missing."""
    shares = LEVELS[column]
    found = [SAME_AS.get((column, value), value) for value in values]
    for value in found:
        if value and value not in shares:
            raise ConfigError(column, value, f"must be one of {', '.join(shares)}, or empty")
    return [
        np.array([(value == level) - share if value else 0.0 for value in found], np.float64)
        for level, share in list(shares.items())[1:]
    ]


# --- training and held-out patients


def is_held_out(num_patients: int, share: float, seed: int, site: str) -> np.ndarray:
    """Which patients are kept for measuring, boolean of shape ``(n,)``.

    Depends on the seed and the site's name only, so that a hospital and who measures agree without a word;
    and not on outcomes: a split that kept their rate would make each hospital's rate too easy to guess.
    """
    chosen = np.random.default_rng([seed, crc32(site.encode())]).permutation(num_patients)
    return np.isin(np.arange(num_patients), chosen[: round(share * num_patients)])


def split(sample: Sample, share: float, seed: int, site: str) -> tuple[Sample, Sample]:
    """Training and held-out patients of one hospital."""
    held_out = is_held_out(len(sample), share, seed, site)
    return sample[~held_out], sample[held_out]
