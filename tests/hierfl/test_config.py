"""Files of an operator: read strictly, every mistake found at once, each named with its file and key."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hierfl.config import Address, FederationConfig, RegionConfig, SiteConfig, load_federation, load_job
from hierfl.errors import ConfigError, ConfigErrors, NotFound
from hierfl.toml import build, open_toml
from hierfl.types import RegionId, SiteId

JOB = """
[job]
name = "digits"
app = "digits"
rounds = 3
"""

FEDERATION = """
[federation]
name = "clinics"

[regions.eu-west]
sites = 3

[regions.us-east]
sites = 4
intakes = 2
listen = "127.0.0.1:4433"
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "file.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def errors_of(raised: pytest.ExceptionInfo[ConfigError]) -> list[str]:
    """Messages without the path of the file."""
    found = getattr(raised.value, "errors", (raised.value,))
    return [str(error).removeprefix(f"{error.source}: ") for error in found]


# --- job.toml


def test_a_job_needs_only_its_head_and_the_rest_has_defaults(write):
    job = load_job(write(JOB))
    assert (job.job.name, job.job.rounds, job.job.seed) == ("digits", 3, 0)
    assert job.strategy.name == "fedavg"
    assert job.round.report_timeout_s == 300.0


def test_every_other_key_of_strategy_is_an_option_and_app_is_free(write):
    text = JOB + '[strategy]\nname = "fedprox"\nproximal_mu = 0.1\n[app]\nlr = 0.1\ndeep = { a = [1, 2] }\n'
    job = load_job(write(text))
    assert job.strategy.options == {"proximal_mu": 0.1}
    assert job.app == {"lr": 0.1, "deep": {"a": [1, 2]}}


def test_all_mistakes_of_a_job_are_found_in_one_reading(write):
    text = """
[job]
name = ""
rounds = 0
seeds = 1
[round]
min_regions = "two"
report_timeout_s = -1
silence_s = true
[arithmetic]
k = 1
max_abs = 0
[strateg]
"""
    with pytest.raises(ConfigErrors) as raised:
        load_job(write(text))
    assert sorted(errors_of(raised)) == [
        "arithmetic.k = 1 must be at least 2: one site's sum is its update",
        "arithmetic.max_abs = 0.0 must be above 0, at most 2**20",
        "job.app is missing; it must be text in quotes",
        "job.name = '' must not be empty",
        "job.rounds = 0 must be from 1 to 1,000,000",
        "job.seeds is unknown; did you mean 'seed'?",
        "round.min_regions = 'two' must be a whole number",
        "round.report_timeout_s = -1.0 must be above 0 s",
        "round.silence_s = True must be a number",
        "strateg is unknown; did you mean 'strategy'?",
    ]


def test_one_mistake_is_one_error_that_names_its_file(write):
    path = write(JOB.replace("rounds = 3", "rounds = 3.5"))
    with pytest.raises(ConfigError) as raised:
        load_job(path)
    assert str(raised.value) == f"{path}: job.rounds = 3.5 must be a whole number"
    assert not isinstance(raised.value, ConfigErrors)


def test_an_option_that_the_strategy_does_not_have_is_refused(write):
    with pytest.raises(ConfigError) as raised:
        load_job(write(JOB + "[strategy]\nname = 'fedprox'\nproximal_mus = 0.1\n"))
    assert "strategy.proximal_mus" in str(raised.value)


def test_every_other_key_of_updates_is_an_option_of_their_encoding(write):
    job = load_job(write(JOB + '[updates]\nencoding = "int8"\nblock = 64\n'))
    assert (job.updates.encoding, job.updates.options) == ("int8", {"block": 64})
    assert load_job(write(JOB)).updates.encoding == "float32"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("encoding = 'int9'", "updates.encoding = 'int9' is no encoding; did you mean 'int8'?"),
        ("encoding = 'int8'\nblocks = 64", "updates.blocks = 64 is no option of int8; did you mean 'block'?"),
        ("encoding = 'int8'\nblock = 65", "updates.block = 65 must be a power of two from 16 to 65536"),
        ("encoding = 'topk'\nfraction = 1", "updates.fraction = 1.0 must be above 0, at most 0.5"),
        ("encoding = 'topk'\nfraction = 'all'", "updates.fraction = 'all' must be above 0, at most 0.5"),
        ("encodin = 'int8'", "updates.encodin = 'int8' is no option of float32"),
    ],
)
def test_nonsense_in_updates_is_refused_by_its_key(write, table, words):
    with pytest.raises(ConfigError) as raised:
        load_job(write(JOB + f"[updates]\n{table}\n"))
    assert words in str(raised.value)


def test_an_unknown_strategy_is_refused_and_the_near_one_named(write):
    with pytest.raises(ConfigError) as raised:
        load_job(write(JOB + "[strategy]\nname = 'fedavgg'\n"))
    assert "strategy.name = 'fedavgg'" in str(raised.value)
    assert "fedavg" in str(raised.value).split("'fedavgg'")[1]


@pytest.mark.parametrize("value", ["1979-05-27", "nan", "inf", "[1, nan]", "{ a = 07:32:00 }"])
def test_free_values_that_no_document_can_carry_are_refused(write, value):
    with pytest.raises(ConfigError, match=r"app\.x .*must be text, a number, true or false, a list or a table"):
        load_job(write(JOB + f"[app]\nx = {value}\n"))


def test_a_number_must_be_finite(write):
    with pytest.raises(ConfigError, match=r"round\.hold_s = inf must be a number"):
        load_job(write(JOB + "[round]\nhold_s = inf\n"))


# --- --set


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("job.rounds=50", 50),
        ("job.rounds = 50", 50),
        ('job."rounds"=50', 50),
    ],
)
def test_an_override_takes_the_place_of_the_files_value(write, override, expected):
    assert load_job(write(JOB), [override]).job.rounds == expected


def test_overrides_may_add_tables_and_take_bare_words_as_text(write):
    job = load_job(write(JOB), ["strategy.name=fedavgm", "app.lr=0.5", "app.layers=[1, 2]", "app.path=/srv/a=b"])
    assert job.strategy.name == "fedavgm"
    assert job.app == {"lr": 0.5, "layers": [1, 2], "path": "/srv/a=b"}


def test_a_wrong_override_is_said_to_come_from_set(write):
    with pytest.raises(ConfigErrors) as raised:
        load_job(write(JOB + "[round]\nmin_clients = 0\n"), ["job.rounds=0", "round.minregions=1"])
    assert {(error.source, error.key) for error in raised.value.errors if error.source == "--set"} == {
        ("--set", "job.rounds"),
        ("--set", "round.minregions"),
    }
    assert any(error.key == "round.min_clients" and error.source != "--set" for error in raised.value.errors)


@pytest.mark.parametrize("override", ["job.rounds", "=3", "job.rounds=[1", 'job.name="x', "a=1\nb=2", "a b=1"])
def test_an_override_that_is_none_is_refused(write, override):
    with pytest.raises(ConfigError, match=r"(?s)--set: .*must be KEY=VALUE"):
        load_job(write(JOB), [override])


# --- files


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(NotFound, match="hierfl init"):
        load_job(tmp_path / "job.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[job]\nname = \n", "line 2, column 8 is not TOML"),
        ("[job\n", "line 1, column 5 is not TOML"),
        ("[regions.eu]\nsites = 3\n[regions.eu]\nsites = 4\n", "line 3, column 12 has [regions.eu] a second time"),
    ],
)
def test_broken_toml_is_named_with_its_line(write, text, expected):
    with pytest.raises(ConfigError) as raised:
        load_federation(write(text))
    assert errors_of(raised)[0].startswith(expected)


def test_bytes_that_are_no_text_and_folders_are_refused(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b'[job]\nname = "caf\xe9"\n')
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_job(tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_job(tmp_path)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    (tmp_path / "job.toml").write_bytes(b"\xef\xbb\xbf" + JOB.encode())
    assert load_job(tmp_path / "job.toml").job.name == "digits"


# --- federation.toml


def test_numbered_sites_count_through_the_whole_file(write):
    config = load_federation(write(FEDERATION))
    names = {region.name: [site.name for site in region.sites] for region in config.regions}
    assert names == {
        "eu-west": ["site-00", "site-01", "site-02"],
        "us-east": ["site-03", "site-04", "site-05", "site-06"],
    }


def test_a_file_means_the_same_as_the_dataclasses(write, tmp_path):
    app = str(tmp_path / "app.py")
    sites = tuple(SiteConfig(name=SiteId(name), app=app) for name in ("ucl", "kch"))
    region = RegionConfig(name=RegionId("uk"), sites=sites, k=2, max_share=0.7)
    path = write('[federation]\nname="x"\n[regions.uk]\nsites=["ucl", "kch"]\nk=2\nmax_share=0.7\n')
    assert load_federation(path) == FederationConfig(name="x", regions=(region,))


def test_a_site_with_a_table_of_its_own_overrides_what_all_sites_have(write):
    config = load_federation(
        write("""
federation = { name = "x" }
site = { app = "package.module", clients = 2, options = { data = "/srv", gpu = "no" } }
[regions.uk]
k = 2
sites.ucl = { clients = 1, options = { data = "/ucl" } }
sites.kch = {}
""")
    )
    assert [(s.name, s.app, s.clients, dict(s.options)) for s in config.regions[0].sites] == [
        ("ucl", "package.module", 1, {"data": "/ucl", "gpu": "no"}),
        ("kch", "package.module", 2, {"data": "/srv", "gpu": "no"}),
    ]


def test_each_intake_has_an_address(write):
    eu, us = load_federation(write(FEDERATION), ["regions.eu-west.intakes=2"]).regions
    assert [str(address) for address in eu.addresses] == ["127.0.0.1:0", "127.0.0.1:0"]
    assert [str(address) for address in us.addresses] == ["127.0.0.1:4433", "127.0.0.1:4434"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("federation.name=Clinics", "federation.name = 'Clinics' must be 1 to 63 lower-case"),
        ("regions.eu-west.k=1", "regions.eu-west.k = 1 must be at least 2"),
        ("regions.eu-west.k=4", "regions.eu-west.k = 4 must be at most the region's number of sites, 3"),
        ("regions.eu-west.max_share=0.3", "regions.eu-west.max_share = 0.3 must be at least 1/3"),
        ("regions.eu-west.max_share=1.5", "regions.eu-west.max_share = 1.5 must be above 0, at most 1"),
        ("regions.eu-west.sites=0", "regions.eu-west.sites = 0 must be from 1 to 1,000"),
        ('regions.eu-west.sites=["a","a","b"]', "regions.eu-west.sites = 'a' is there twice"),
        ("regions.eu-west.intakes=0", "regions.eu-west.intakes = 0 must be from 1 to 64"),
        ("regions.eu-west.listen=127.0.0.1", "regions.eu-west.listen = '127.0.0.1' must be HOST:PORT"),
        ("regions.us-east.listen=127.0.0.1:65535", "regions.us-east.listen = '127.0.0.1:65535' must leave room for 2"),
        ("regions.eu-west.listen=127.0.0.1:4434", "regions.us-east.listen = '127.0.0.1:4434' is taken by regions.eu-"),
        ("controller.listen=127.0.0.1:4433", "regions.us-east.listen = '127.0.0.1:4433' is taken by controller"),
        ("controller.listen=here", "controller.listen = 'here' must be HOST:PORT"),
        ("controller.store=http://here", "controller.store = 'http://here' must be redis://"),
        ("controller.store=redis://:secret@h", "controller.store = 'redis://:...@h' must hold no password"),
        ("controller.standbys=1", "controller.standbys = 1 needs a `store`"),
        ("site.clients=0", "site.clients = 0 must be from 1 to 10,000"),
        ("regions.eu_west.sites=3", "regions.eu_west.name = 'eu_west' must be 1 to 63 lower-case"),
        ("regions={}", "regions must have at least one region"),
        ("regions=3", "regions = 3 must be a table"),
    ],
)
def test_a_federation_that_could_not_run_is_refused(write, override, expected):
    text = FEDERATION if not override.startswith("regions=") else '[federation]\nname = "x"\n'
    path = write(text)
    if override == "regions={}":
        path.write_text(text + "[regions]\n")
        override = "federation.name=x"
    with pytest.raises(ConfigError) as raised:
        load_federation(path, [override])
    assert errors_of(raised)[0].startswith(expected)
    assert len(errors_of(raised)) == 1


def test_mistakes_in_several_regions_are_found_together(write):
    text = FEDERATION.replace("sites = 3", "sites = 2").replace("intakes = 2", "intake = 2") + "colour = 1\n"
    with pytest.raises(ConfigErrors) as raised:
        load_federation(write(text))
    assert sorted(error.split(" ")[0] for error in errors_of(raised)) == [
        "regions.eu-west.k",
        "regions.us-east.colour",
        "regions.us-east.intake",
    ]


@pytest.mark.parametrize("text", ["127.0.0.1:0", "[::1]:4433", "combiner.example.org:65535"])
def test_an_address_reads_back_as_it_was_written(text):
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize("text", ["", ":1", "host", "host:", "host:x", "host:65536", "::1:80", "host:-1"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="HOST:PORT"):
        Address.parse(text)


# --- the builder itself


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError("size", self.size, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Outer:
    path: Path
    inner: Inner
    several: tuple[Inner, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)
    ratio: float | None = None


def test_a_path_is_relative_to_its_file_and_rules_get_the_full_key(write, tmp_path):
    reading = open_toml(write('path = "a/b"\ninner = { size = 2 }\nratio = 1\n'))
    outer = build(Outer, reading.table, reading)
    reading.finish()
    assert outer == Outer(path=tmp_path / "a" / "b", inner=Inner(size=2), ratio=1.0)
    assert isinstance(outer.ratio, float)
    assert not math.isnan(outer.ratio)


def test_rules_of_nested_tables_and_lists_are_named_with_their_place(write):
    reading = open_toml(write('path = "x"\ninner = { size = 0 }\nseveral = [{ size = 1 }, { size = -1 }, 3]\n'))
    build(Outer, reading.table, reading)
    with pytest.raises(ConfigErrors) as raised:
        reading.finish()
    assert errors_of(raised) == [
        "inner.size = 0 must be at least 1",
        "several[1].size = -1 must be at least 1",
        "several[2] = 3 must be a table",
    ]
