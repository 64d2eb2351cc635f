"""What a person gets wrong, and what a machine refuses: each gives one clear line, the hint where to read
more, the right exit code, no traceback, and leaves nothing half-done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from commands import Ended, hierfl
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from disks import SmallDisk, small_disk
from federations import InProcess, job, noisy_app

from combiners.local import LocalCombiner
from controller.app import ControllerApp
from hierfl import modelfile, operator, provision
from hierfl.certificates import Authority, certificate_pem, issue_leaf
from hierfl.cli.runs import write_history
from hierfl.errors import DiskFull
from hierfl.explain import pages
from hierfl.operator import connect
from hierfl.pki import Kit

__all__ = ["hierfl", "small_disk"]

NOBODY = "127.0.0.1:1"
"""An address at which no program listens."""


def one_line(ended: Ended, code: str, *words: str) -> None:
    """It ended with one error, of this code, with these words, and its exit code; nothing went to stdout."""
    lines = ended.err.splitlines()
    errors = [line for line in lines if line.startswith("error ")]
    assert lines[-2:] == [*errors, f"more: hierfl explain {code}"], ended.err
    assert errors[0].startswith(f"error {code}: "), ended.err
    assert [word for word in words if word not in errors[0]] == [], errors[0]
    assert "Traceback" not in ended.err
    assert (ended.code, ended.out) == (pages()[code].exit_code, "")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `provision` makes it: two regions, a site, an operator; nobody listens at its addresses."""
    folder = tmp_path_factory.mktemp("made")
    provision.init(folder, "acme", (NOBODY,))
    provision.add_region(folder, "eu", (NOBODY,))
    provision.add_region(folder, "us", (NOBODY,))
    provision.add_site(folder, "eu", "charite")
    provision.add_operator(folder, "ana")
    (folder / "app.py").write_text("def init(config): ...\n\ndef train(task): ...\n")
    return folder


PROGRAMS = {
    "controller": (("controller",), "pki/controller", ("controller", "serve")),
    "combiner": (("regions", "eu", "combiner"), "pki/regions/eu", ("combiner", "serve")),
    "client": (("sites", "eu", "charite", "client-00"), "pki/regions/eu", ("client", "run", "APP")),
    "operator": (("operators", "ana"), "pki/controller", ("status",)),
}
"""By role: its kit, whose authority signed it, the command that uses it."""


@pytest.fixture(params=list(PROGRAMS))
def program(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> tuple[Path, Authority, list[object]]:
    """A copy of a kit, who issued it, and a command line that uses it, with a folder that is not there yet."""
    parts, issuer, command = PROGRAMS[request.param]
    kit = tmp_path / "kit"
    shutil.copytree(made.joinpath("kits", *parts), kit)
    argv = [made / "app.py" if word == "APP" else word for word in command] + ["--kit", kit]
    if command != ("status",):
        argv += ["--dir", tmp_path / "dir"]
    return kit, authority(made / issuer, "" if issuer.endswith("controller") else "eu"), argv


def authority(folder: Path, region: str) -> Authority:
    certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    return Authority("acme", region, certificate, key)


# --- files that people write


def edited(hierfl: Callable[..., Ended], folder: Path, name: str, *changes: tuple[str, str]) -> Path:
    """A file of `hierfl init`, changed."""
    assert hierfl("init", folder).code == 0
    path = folder / name
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("min_regions = 2", "min_region = 2", ("round.min_region", "did you mean 'min_regions'")),
        ("min_regions = 2", 'min_regions = "two"', ("round.min_regions = 'two'", "whole number")),
        ("rounds = 5", "rounds = true", ("job.rounds = True", "whole number")),
        ("rounds = 5", "rounds = 0", ("job.rounds = 0", "from 1 to")),
        ("rounds = 5", "", ("job.rounds", "missing")),
        ("[round]", "[rounds]", ("rounds", "did you mean 'round'")),
        ('name = "fedavg"', 'name = "fedaveg"', ("fedaveg", "did you mean 'fedavg'")),
        ('name = "fedavg"', 'name = "fedprox"\nmew = 1.0', ("mew", "mu")),
        ("rounds = 5", "rounds = ", ("line 9", "not TOML")),
    ],
)
def test_a_job_with_a_mistake_names_file_key_and_rule(hierfl, tmp_path, old, new, words):
    path = edited(hierfl, tmp_path, "job.toml", (old, new))
    for command in (("train", path), ("job", "check", path)):
        one_line(hierfl(*command), "HFL-101", "job.toml", *words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("sites = 3\n", "site = 3\n", ("regions.us-east", "'sites'")),
        ("sites = 3\n", 'sites = "three"\n', ("regions.us-east.sites = 'three'", "whole number")),
        ("[regions.us-east]", "[regions.eu-west]", ("[regions.eu-west]", "second time")),
        ("[regions.us-east]", "[regions.US_East]", ("US_East", "lower-case")),
        ("# k = 3", "k = 1", ("regions.eu-west.k = 1", "at least 2")),
        ('# listen = "127.0.0.1:0"  ', 'listen = "here"  ', ("listen = 'here'", "HOST:PORT")),
        ('app = "app.py"', 'app = "none.py"', ("none.py",)),
    ],
)
def test_a_federation_with_a_mistake_names_file_key_and_rule_before_anything_starts(hierfl, tmp_path, old, new, words):
    path = edited(hierfl, tmp_path, "federation.toml", (old, new))
    one_line(hierfl("up", path), "HFL-101", "federation.toml", *words)
    assert not (tmp_path / ".hierfl").exists()


def test_all_mistakes_of_a_file_are_said_at_once(hierfl, tmp_path):
    path = edited(hierfl, tmp_path, "job.toml", ("rounds = 5", "rounds = 0\nround = 1"), ("min_clients", "clients"))
    ended = hierfl("train", path)
    said = [line for line in ended.err.splitlines() if line.startswith("error HFL-101: ")]
    assert (ended.code, len(said)) == (3, 3), ended.err


def test_files_that_are_not_there_are_named(hierfl, tmp_path):
    one_line(hierfl("train", tmp_path / "job.toml"), "HFL-110", "job.toml", "hierfl init")
    one_line(hierfl("up", tmp_path / "federation.toml"), "HFL-110", "federation.toml", "hierfl init")


def test_a_region_or_site_that_exists_is_not_made_again(hierfl, made):
    before = sorted(path for path in made.rglob("*") if path.is_file())
    one_line(hierfl("provision", "region", "eu", "--dir", made), "HFL-101", "'eu' exists already")
    one_line(hierfl("provision", "site", "eu", "charite", "--dir", made), "HFL-101", "'charite' exists already")
    one_line(hierfl("provision", "site", "asia", "x", "--dir", made), "HFL-110", "'asia'", "eu, us")
    assert sorted(path for path in made.rglob("*") if path.is_file()) == before


# --- certificates


def test_a_certificate_that_is_missing_is_named(hierfl, program, tmp_path):
    kit, _, command = program
    (kit / "identity.pem").unlink()
    one_line(hierfl(*command), "HFL-301", "identity.pem", "hierfl provision")
    shutil.rmtree(kit)
    one_line(hierfl(*command), "HFL-301", str(kit), "hierfl provision")
    assert not (tmp_path / "dir").exists()


def test_a_certificate_that_has_expired_says_when_and_who_renews_it(hierfl, program, tmp_path):
    kit, issuer, command = program
    loaded = Kit.load(kit)
    issued = datetime.now(UTC) - timedelta(days=40)
    leaf = issue_leaf(issuer, loaded.identity, loaded.key.public_key(), issued, timedelta(days=30))
    (kit / "identity.pem").write_bytes(certificate_pem(leaf))
    until = f"{leaf.not_valid_after_utc:%Y-%m-%d}"
    one_line(hierfl(*command), "HFL-302", "identity.pem", until, "hierfl provision renew")
    assert not (tmp_path / "dir").exists()


def test_a_certificate_that_is_somebody_elses_is_refused(hierfl, program, made, tmp_path):
    kit, _, command = program
    role = Kit.load(kit).identity.role
    other = "regions/us/combiner" if role != "operator" else "sites/eu/charite/client-00"
    if role in ("operator", "combiner"):
        shutil.copy(made / "kits" / "controller" / "identity.pem", kit)
        one_line(hierfl(*command), "HFL-303", "identity.pem")
        return
    shutil.rmtree(kit)
    shutil.copytree(made / "kits" / other, kit)
    one_line(hierfl(*command), "HFL-101", str(kit), "combiner of us")
    assert not (tmp_path / "dir").exists()
