"""Federation folders: whole or not there, private, and refusing what would make two of one name."""

from __future__ import annotations

import json
import resource
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from hierfl import pki, provision
from hierfl.cli import run
from hierfl.errors import ConfigError, NotFound
from hierfl.pki import Kit, RoleName


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of two regions with one site each, and operators."""
    folder = tmp_path_factory.mktemp("made") / "acme"
    provision.init(folder, "acme", ["hub.example:4433"])
    for region in ("eu", "us"):
        provision.add_region(folder, region, [f"{region}.example:4433"])
        provision.add_site(folder, region, "hospital", clients=2)
        provision.add_operator(folder, "bob", region)
    provision.add_operator(folder, "alice")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of ``made``, modes included, to do as one likes with."""
    return Path(shutil.copytree(made, tmp_path / "acme"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_kit_loads_and_trusts_exactly_whom_it_meets(folder: Path) -> None:
    expected = {
        RoleName.CONTROLLER: ({"eu", "us"}, True),
        RoleName.OPERATOR: (set(), True),
        RoleName.COMBINER: ({"eu"}, True),
        RoleName.CLIENT: ({"eu"}, True),
        RoleName.REGION_OPERATOR: ({"eu"}, False),
    }
    kits = [Kit.load(entry.path) for entry in provision.listing(folder).kits]
    seen = {
        kit.identity.role: (set(kit.trust.regions), kit.trust.controller is not None)
        for kit in kits
        if kit.identity.region in ("", "eu")
    }
    assert seen == expected
    assert len(kits) == 10


def test_kits_carry_the_addresses_of_whom_they_dial(folder: Path) -> None:
    for entry in provision.listing(folder).kits:
        server = entry.identity.dials
        expected = () if server is None else (f"{server.region or 'hub'}.example:4433",)
        assert Kit.load(entry.path).addresses == expected


def test_no_key_leaves_its_authority_and_no_file_can_be_read_by_others(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert not [name for name in files(folder / "kits") if name.endswith("ca.key")]
    assert [name for name in sorted(files(folder / "kits")) if name.endswith("ledger.key")] == [
        "regions/eu/combiner/ledger.key",
        "regions/us/combiner/ledger.key",
    ]
    keys = [data for name, data in files(folder / "kits").items() if name.endswith("key.pem")]
    assert len(set(keys)) == len(keys)


def test_nothing_half_written_remains(folder: Path) -> None:
    assert not list(folder.rglob(".*"))


def test_the_ledger_key_is_certified_by_its_region(folder: Path) -> None:
    kit = Kit.load(folder / "kits" / "regions" / "eu" / "combiner")
    controller = Kit.load(folder / "kits" / "controller")
    assert kit.ledger is not None
    der = kit.ledger.certificate.public_bytes(serialization.Encoding.DER)
    key = pki.verify_ledger(der, controller.trust, "eu", datetime.now(UTC))
    pki.verify(key, pki.sign(kit.ledger.key, b"head", b"x"), b"head", b"x")


@pytest.mark.parametrize(
    ("add", "key"),
    [
        (lambda d: provision.add_region(d, "eu"), "region"),
        (lambda d: provision.add_site(d, "eu", "hospital", clients=2), "site"),
        (lambda d: provision.add_operator(d, "alice"), "operator"),
        (lambda d: provision.add_operator(d, "bob", "eu"), "operator"),
        (lambda d: provision.init(d, "other"), "federation"),
        (lambda d: provision.add_region(d, "EU"), "region"),
        (lambda d: provision.add_region(d, "../x"), "region"),
        (lambda d: provision.add_region(d, ".x"), "region"),
        (lambda d: provision.add_region(d, "apac", ["nowhere"]), "combiner address"),
        (lambda d: provision.add_region(d, "apac", ["host:0"]), "combiner address"),
        (lambda d: provision.add_site(d, "eu", "a b"), "site"),
        (lambda d: provision.add_site(d, "eu", "new", clients=0), "clients"),
        (lambda d: provision.add_operator(d, ""), "operator"),
    ],
)
def test_a_name_twice_or_a_bad_one_is_refused_and_changes_nothing(folder: Path, add: object, key: str) -> None:
    before = files(folder)
    with pytest.raises(ConfigError) as caught:
        add(folder)  # type: ignore[operator]
    assert caught.value.key == key
    assert files(folder) == before


def test_what_is_there_already_stays_where_that_is_asked_for(folder: Path) -> None:
    before = files(folder)
    provision.init(folder, "acme")
    provision.add_region(folder, "eu", exist_ok=True)
    provision.add_site(folder, "eu", "hospital", clients=1, exist_ok=True)
    provision.add_operator(folder, "alice", exist_ok=True)
    assert files(folder) == before


def test_a_site_can_get_more_clients_later(folder: Path) -> None:
    before = files(folder)
    kits = provision.add_site(folder, "eu", "hospital", clients=4)
    assert [kit.name for kit in kits] == ["client-00", "client-01", "client-02", "client-03"]
    assert before.items() < files(folder).items()


def test_a_region_needs_a_federation_and_a_site_a_region(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="provision init"):
        provision.add_region(tmp_path / "empty", "eu")
    with pytest.raises(NotFound, match="there are eu, us"):
        provision.add_site(folder, "apac", "hospital")
    with pytest.raises(NotFound):
        provision.listing(tmp_path / "empty")


def test_a_step_cut_short_is_taken_up_by_calling_it_again(folder: Path) -> None:
    """Killed after the region's authority was written: no kit, no trust, a folder half-written."""
    provision.add_region(folder, "apac")
    authority = (folder / "pki" / "regions" / "apac" / "ca.pem").read_bytes()
    combiner = folder / "kits" / "regions" / "apac" / "combiner"
    combiner.rename(combiner.with_name(".combiner-xyz"))
    (folder / "kits" / "controller" / "trust" / "regions" / "apac.pem").unlink()
    assert len(provision.listing(folder).kits) == 10
    provision.add_region(folder, "apac")
    assert (folder / "pki" / "regions" / "apac" / "ca.pem").read_bytes() == authority
    assert Kit.load(combiner).identity.region == "apac"
    assert "apac" in Kit.load(folder / "kits" / "controller").trust.regions


@contextmanager
def no_room() -> Iterator[None]:
    """No file of this process can grow, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_leaves_nothing_half_written(folder: Path) -> None:
    before = files(folder)
    for add in (
        lambda: provision.add_region(folder, "apac"),
        lambda: provision.add_site(folder, "eu", "new"),
        lambda: provision.renew(folder),
    ):
        with no_room(), pytest.raises(OSError, match="too large"):
            add()
    assert files(folder) == before


def test_renewed_certificates_fit_the_keys_that_were_handed_out(folder: Path) -> None:
    before = {entry.path: Kit.load(entry.path) for entry in provision.listing(folder).kits}
    written = provision.renew(folder, "eu")
    assert len(written) == 4
    for path, old in before.items():
        new = Kit.load(path)
        assert new.identity == old.identity
        assert new.key.private_numbers() == old.key.private_numbers()
        assert (new.certificate != old.certificate) == (old.identity.region == "eu")
    with pytest.raises(NotFound, match="apac"):
        provision.renew(folder, "apac")


def test_a_kits_addresses_can_change_and_nothing_else_of_it(folder: Path) -> None:
    kit = folder / "kits" / "sites" / "eu" / "hospital" / "client-00"
    before = files(folder)
    provision.set_addresses(kit, ["127.0.0.1:4001", "[::1]:4002"])
    assert Kit.load(kit).addresses == ("127.0.0.1:4001", "[::1]:4002")
    assert {name for name, data in files(folder).items() if before[name] != data} == {
        "kits/sites/eu/hospital/client-00/kit.toml"
    }
    with pytest.raises(ConfigError, match="HOST:PORT"):
        provision.set_addresses(kit, ["127.0.0.1:0"])


# --- the commands


def test_the_commands_make_list_and_show_a_federation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["provision", "init", "acme", "--address", "hub.example:1"]) == 0
    assert run(["provision", "region", "eu", "--address", "eu.example:1"]) == 0
    assert run(["provision", "operator", "alice"]) == 0
    capsys.readouterr()
    assert run(["provision", "site", "eu", "charite", "--clients", "2", "-o", "json"]) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert made["schema"] == "hierfl.provision_made/1"
    assert [Path(path).name for path in made["paths"]] == ["client-00", "client-01"]
    assert "site charite in region eu" in err

    assert run(["provision", "list", "-o", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["schema"] == "hierfl.provision_list/1"
    assert listed["regions"] == ["eu"]
    assert {kit["role"] for kit in listed["kits"]} == {"controller", "operator", "combiner", "client"}

    assert run(["provision", "show", made["paths"][0], "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["identity"] == "spiffe://acme/region/eu/site/charite/client/client-00"
    assert shown["addresses"] == ["eu.example:1"]
    assert shown["trusts"] == ["controller", "region eu"]

    assert run(["provision", "renew"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    for command in ("list", "show"):
        assert run(["provision", command, *([made["paths"][0]] if command == "show" else [])]) == 0
        assert "client" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["region", "eu"], 4, "`hierfl provision init NAME` makes one"),
        (["init", "Acme"], 3, "lower-case"),
        (["show", "nowhere"], 3, "is no kit"),
        (["site", "eu"], 2, "Missing argument"),
    ],
)
def test_a_command_that_cannot_be_done_says_why_on_stderr(
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["provision", *arguments]) == code
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""
    assert not list(tmp_path.iterdir())
