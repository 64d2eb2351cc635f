"""The region's signed endpoint list: what is believed, what is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hierfl import provision
from hierfl.client.intakes import PASSED_OVER_S, Intakes, Target, candidates
from hierfl.endpoints import Endpoint, EndpointList, Signed, accept_endpoints, sign_endpoints
from hierfl.errors import CertificateExpired, CertificateUntrusted, PolicyRefused, StaleEpoch, WireError
from hierfl.pki import Kit
from hierfl.rendezvous import preference
from hierfl.wire import hierfl_pb2 as pb

LISTED = EndpointList(
    federation="fed",
    region="eu",
    region_epoch=2,
    version=3,
    endpoints=tuple(Endpoint(name=f"intake-{n}", address=f"10.0.0.{n}:7444") for n in range(1, 5)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    provision.init(folder, "fed")
    for region in ("eu", "us"):
        provision.add_region(folder, region)
        provision.add_site(folder, region, "site-00")
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Kit:
    return Kit.load(folder / "kits" / "sites" / "eu" / "site-00" / "client-00")


@pytest.fixture(scope="module")
def combiner(folder: Path) -> Kit:
    return Kit.load(folder / "kits" / "regions" / "eu" / "combiner")


def accept(signed: Signed, client: Kit, known: tuple[int, int] = (0, 0), now: datetime | None = None) -> EndpointList:
    return accept_endpoints(signed, client.identity, client.trust, known, now or datetime.now(UTC))


def test_a_list_signed_by_the_regions_combiner_is_believed(client, combiner):
    assert accept(sign_endpoints(combiner, LISTED), client) == LISTED
    assert accept(sign_endpoints(combiner, LISTED), client, known=LISTED.age) == LISTED


def test_a_list_of_anybody_else_is_refused(folder, client, combiner):
    signed = sign_endpoints(combiner, LISTED)
    with pytest.raises(CertificateUntrusted):
        accept(replace(signed, document=signed.document.replace(b"10.0.0.1", b"10.6.6.6")), client)
    for signer in (
        client,
        Kit.load(folder / "kits" / "controller"),
        Kit.load(folder / "kits" / "regions" / "us" / "combiner"),
    ):
        with pytest.raises(CertificateUntrusted):
            accept(sign_endpoints(signer, LISTED), client)
    other_kind = replace(signed, signature=combiner.sign(signed.document, b"hierfl.plan/1"))
    with pytest.raises(CertificateUntrusted):
        accept(other_kind, client)
    with pytest.raises(CertificateExpired):
        accept(signed, client, now=datetime.now(UTC) + timedelta(days=400))


@pytest.mark.parametrize("known", [(2, 4), (3, 1)])
def test_an_older_list_is_refused(client, combiner, known):
    with pytest.raises(StaleEpoch):
        accept(sign_endpoints(combiner, LISTED), client, known=known)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"region": "us"}, PolicyRefused),
        ({"federation": "other"}, PolicyRefused),
        ({"endpoints": (LISTED.endpoints[0],) * 2}, WireError),
        ({"endpoints": (Endpoint(name="intake-0", address="nowhere"),)}, WireError),
        ({"endpoints": (Endpoint(name="intake-0", address="host:0"),)}, WireError),
        ({"endpoints": (Endpoint(name="", address="host:1"),)}, WireError),
        ({"endpoints": (Endpoint(name="x" * 256, address="host:1"),)}, WireError),
    ],
)
def test_a_list_that_cannot_be_right_is_refused(client, combiner, changes, error):
    with pytest.raises(error):
        accept(sign_endpoints(combiner, replace(LISTED, **changes)), client)


# ---------------------------------------------------------------- what a client makes of it


def message(kit: Kit, listed: EndpointList) -> pb.Endpoints:
    signed = sign_endpoints(kit, listed)
    return pb.Endpoints(document=signed.document, signature=signed.signature, certificate=signed.certificate)


def test_the_kits_addresses_come_after_two_of_the_list_and_each_address_once():
    preferred = [Endpoint(name=name, address=f"{name}:1") for name in "abcd"]
    found = candidates(preferred, ["boot:1", "c:1"])
    assert [target.address for target in found] == ["a:1", "b:1", "boot:1", "c:1", "d:1"]
    assert [target.address for target in candidates([], ["x:1", "y:1", "x:1"])] == ["x:1", "y:1"]


def test_what_did_not_answer_is_passed_over_for_a_while(client, combiner, tmp_path):
    intakes = Intakes(client, tmp_path / "endpoints", print)
    assert [target.address for target in intakes.targets(["boot:1"])] == ["boot:1"]
    intakes.take(message(combiner, LISTED), client)
    order = preference(client.identity.uri, [one.name for one in LISTED.endpoints])
    names = [target.name for target in intakes.targets(["boot:1"], now_s=0.0)]
    assert names == [*order[:2], "", *order[2:]]
    assert intakes.home == intakes.targets([], now_s=0.0)[0]
    intakes.failed(intakes.targets(["boot:1"], now_s=0.0)[0], now_s=0.0)
    intakes.failed(intakes.targets(["boot:1"], now_s=1.0)[0], now_s=1.0)
    assert [t.name for t in intakes.targets(["boot:1"], now_s=2.0)] == ["", *order[2:], *order[:2]]
    assert intakes.targets(["boot:1"], now_s=PASSED_OVER_S + 0.5)[0].name == order[0]
    intakes.answered(Target(intakes.targets([], now_s=PASSED_OVER_S + 0.5)[0].address))


def test_the_newest_list_is_kept_and_neither_an_older_nor_a_forged_one_takes_its_place(client, combiner, tmp_path):
    said: list[str] = []
    file = tmp_path / "endpoints"
    intakes = Intakes(client, file, said.append)
    intakes.take(message(combiner, LISTED), client)
    kept = file.read_bytes()
    intakes.take(message(combiner, replace(LISTED, version=2, endpoints=())), client)
    intakes.take(message(client, replace(LISTED, version=9, endpoints=())), client)
    assert (file.read_bytes(), intakes.age) == (kept, (2, 3))
    assert "older" in said[0]
    assert "refused" in said[1]
    again = Intakes(client, file, said.append)
    assert (again.age, again.home) == ((2, 3), intakes.home)
    file.write_bytes(b"something else")
    assert Intakes(client, file, said.append).home is None
    assert "is not used" in said[-1]
