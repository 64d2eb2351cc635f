"""Identities, certificates and kits: what is believed, and what is refused in which words."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hierfl import pki, provision
from hierfl.errors import CertificateExpired, CertificateMissing, CertificateUntrusted, ConfigError
from hierfl.pki import Authority, Identity, Kit, RoleName, TrustStore
from hierfl.types import NAME_PATTERN, ClientRef

NOW = datetime(2026, 6, 1, tzinfo=UTC)
NAMES = st.from_regex(NAME_PATTERN, fullmatch=True)

EVERYBODY = [
    Identity("acme", RoleName.CLIENT, region="eu", site="charite", client="client-00"),
    Identity("acme", RoleName.COMBINER, region="eu"),
    Identity("acme", RoleName.REGION_OPERATOR, region="eu", operator="bob"),
    Identity("acme", RoleName.CONTROLLER),
    Identity("acme", RoleName.OPERATOR, operator="alice"),
]
CLIENT = EVERYBODY[0]


# --- identities


URIS = [
    "spiffe://acme/region/eu/site/charite/client/client-00",
    "spiffe://acme/region/eu/combiner",
    "spiffe://acme/region/eu/operator/bob",
    "spiffe://acme/controller",
    "spiffe://acme/operator/alice",
]


@pytest.mark.parametrize(("identity", "uri"), list(zip(EVERYBODY, URIS, strict=True)), ids=str)
def test_an_identity_is_its_uri_and_back(identity: Identity, uri: str) -> None:
    assert identity.uri == uri
    assert Identity.parse(uri) == identity


@settings(max_examples=25)
@given(st.sampled_from(list(RoleName)), st.tuples(NAMES, NAMES, NAMES, NAMES, NAMES))
def test_every_legal_name_is_read_back_from_its_uri(role: RoleName, names: tuple[str, ...]) -> None:
    fields = ("federation", "region", "site", "client", "operator")
    template = next(identity for identity in EVERYBODY if identity.role is role)
    named = {field: name for field, name in zip(fields, names, strict=True) if getattr(template, field)}
    identity = replace(template, **named)
    assert Identity.parse(identity.uri) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://acme",
        "spiffe://acme/controller/",
        "spiffe://acme/controller\n",
        "SPIFFE://acme/controller",
        "spiffe://ACME/controller",
        "https://acme/controller",
        "spiffe://acme:1/controller",
        "spiffe://acme/controller?x",
        "spiffe://acme/region/eu",
        "spiffe://acme/region//combiner",
        "spiffe://acme/region/eu/combiner/../../us/combiner",
        "spiffe://acme/region/e%75/combiner",
        "spiffe://acme/region/eu/ledger",
        "spiffe://acme/region/eu/site/s/client/ü",
        "spiffe://acme/region/eu/site/s/client/" + "a" * 64,
    ],
)
def test_a_uri_that_is_not_letter_by_letter_an_identity_is_refused(uri: str) -> None:
    with pytest.raises(CertificateUntrusted, match="no identity of a federation"):
        Identity.parse(uri)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"federation": "Acme", "role": RoleName.CONTROLLER}, "federation"),
        ({"federation": "acme", "role": RoleName.COMBINER}, "region"),
        ({"federation": "acme", "role": RoleName.COMBINER, "region": "a/b"}, "region"),
        ({"federation": "acme", "role": RoleName.CONTROLLER, "region": "eu"}, "region"),
        ({"federation": "acme", "role": RoleName.OPERATOR, "operator": "alice", "site": "x"}, "site"),
    ],
)
def test_an_identity_has_the_names_of_its_role_and_no_others(fields: dict[str, str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Identity(**fields)  # type: ignore[arg-type]
    assert caught.value.key == key


def test_only_servers_have_a_dns_name_and_only_clients_a_reference() -> None:
    assert [i.dns_name for i in EVERYBODY] == ["", "combiner.eu.acme", "", "controller.acme", ""]
    assert CLIENT.client_ref == ClientRef("eu", "charite", "client-00")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no client"):
        _ = EVERYBODY[1].client_ref


def test_everybody_dials_one_server_but_the_controller() -> None:
    combiner, controller = EVERYBODY[1], EVERYBODY[3]
    assert [i.dials for i in EVERYBODY] == [combiner, controller, combiner, None, controller]


# --- leaves


@pytest.fixture(scope="module")
def authorities() -> dict[str, Authority]:
    return {region: pki.make_ca("acme", region, now=NOW) for region in ("", "eu", "us")}


@pytest.fixture(scope="module")
def trust(authorities: dict[str, Authority]) -> TrustStore:
    regions = {region: authorities[region].certificate for region in ("eu", "us")}
    return TrustStore("acme", regions, authorities[""].certificate)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def forged(authority: Authority, identity: Identity = CLIENT, **changes: object) -> bytes:
    """A leaf as ``issue_leaf`` makes it for ``identity``, whoever the authority is, but for ``changes``."""
    key = changes.get("key") or pki.make_key()
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    if identity.dns_name:
        names.append(x509.DNSName(identity.dns_name))
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign")
    usage = dict.fromkeys((*others, "encipher_only", "decipher_only", "key_cert_sign"), False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())  # type: ignore[attr-defined]
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(x509.BasicConstraints(bool(changes.get("ca", False)), None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=bool(changes.get("digital_signature", True)), **usage), critical=True
        )
        .add_extension(x509.SubjectAlternativeName(changes.get("names", names)), critical=False)  # type: ignore[arg-type]
        .add_extension(
            x509.ExtendedKeyUsage(changes.get("uses", [ExtendedKeyUsageOID.CLIENT_AUTH])),  # type: ignore[arg-type]
            critical=False,
        )
    )
    return der(builder.sign(authority.key, hashes.SHA256()))


@pytest.mark.parametrize("identity", EVERYBODY, ids=str)
def test_a_leaf_of_the_right_authority_is_believed(
    identity: Identity, authorities: dict[str, Authority], trust: TrustStore
) -> None:
    leaf = pki.issue_leaf(authorities[identity.region], identity, pki.make_key().public_key(), now=NOW)
    assert pki.verify_leaf(der(leaf), trust, NOW) == identity
    assert leaf.not_valid_after_utc - NOW == pki.LEAF_LIFETIME


def test_an_unchanged_forgery_is_believed_so_that_the_next_tests_mean_something(
    authorities: dict[str, Authority], trust: TrustStore
) -> None:
    assert pki.verify_leaf(forged(authorities["eu"]), trust, NOW) == CLIENT


@pytest.mark.parametrize("identity", EVERYBODY, ids=str)
@pytest.mark.parametrize("signer", ["", "eu", "us"])
def test_an_authority_speaks_for_its_own_and_nobody_else(
    identity: Identity, signer: str, authorities: dict[str, Authority], trust: TrustStore
) -> None:
    if signer == identity.region:
        return
    with pytest.raises(CertificateUntrusted, match="not signed by the CA pinned for it"):
        pki.verify_leaf(forged(authorities[signer], identity), trust, NOW)
    with pytest.raises(ValueError, match="cannot issue"):
        pki.issue_leaf(authorities[signer], identity, pki.make_key().public_key())


def test_an_impostor_that_copies_the_authoritys_name_is_refused(trust: TrustStore) -> None:
    impostor = pki.make_ca("acme", "eu", now=NOW)
    with pytest.raises(CertificateUntrusted, match="not signed"):
        pki.verify_leaf(forged(impostor), trust, NOW)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ca": True}, "another use"),
        ({"digital_signature": False}, "another use"),
        ({"uses": [ExtendedKeyUsageOID.SERVER_AUTH]}, "another use"),
        ({"uses": [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]}, "another use"),
        ({"names": [x509.DNSName("combiner.eu.acme")]}, "0 SAN URIs"),
        (
            {"names": [x509.UniformResourceIdentifier(i.uri) for i in (CLIENT, EVERYBODY[1])]},
            "2 SAN URIs",
        ),
        (
            {"names": [x509.UniformResourceIdentifier(CLIENT.uri), x509.DNSName("combiner.eu.acme")]},
            "other names than its own",
        ),
        ({"names": [x509.UniformResourceIdentifier("spiffe://other/controller")]}, "another federation"),
        (
            {"names": [x509.UniformResourceIdentifier("spiffe://acme/region/apac/combiner")]},
            "CA of region apac is not in the trust folder",
        ),
        ({"key": ec.generate_private_key(ec.SECP384R1())}, "no P-256 key"),
        ({"key": rsa.generate_private_key(65537, 2048)}, "no P-256 key"),
        ({"key": ed25519.Ed25519PrivateKey.generate()}, "no P-256 key"),
    ],
)
def test_a_leaf_that_the_right_authority_signed_for_something_else_is_refused(
    changes: dict[str, object], words: str, authorities: dict[str, Authority], trust: TrustStore
) -> None:
    with pytest.raises(CertificateUntrusted, match=words):
        pki.verify_leaf(forged(authorities["eu"], **changes), trust, NOW)


@pytest.fixture(scope="module")
def good_leaf(authorities: dict[str, Authority]) -> bytes:
    """One for all examples, so that a failing one fails again."""
    return forged(authorities["eu"])


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@given(place=st.integers(0, 1 << 16), value=st.integers(0, 255))
@example(place=12, value=3)  # no version of X.509
@example(place=430, value=1)
def test_a_leaf_with_one_byte_changed_is_untrusted_and_never_crashes(
    place: int, value: int, good_leaf: bytes, trust: TrustStore
) -> None:
    leaf = bytearray(good_leaf)
    place %= len(leaf)
    if leaf[place] == value:
        return
    leaf[place] = value
    try:
        pki.verify_leaf(bytes(leaf), trust, NOW)
    except CertificateUntrusted:
        return
    # DER leaves a signature more than one spelling (unused bits); what it signs must be as it was
    signed = [x509.load_der_x509_certificate(bytes(der)).tbs_certificate_bytes for der in (leaf, good_leaf)]
    assert signed[0] == signed[1]


@given(st.binary(max_size=200))
def test_bytes_that_are_no_certificate_are_untrusted(data: bytes) -> None:
    with pytest.raises(CertificateUntrusted, match="malformed"):
        pki.verify_leaf(data, TrustStore("acme", {}), NOW)


@pytest.mark.parametrize(("days", "words"), [(31, "was valid until"), (-1, "is valid from")])
def test_a_leaf_outside_its_life_is_expired_in_words_with_both_times(
    days: int, words: str, authorities: dict[str, Authority], trust: TrustStore
) -> None:
    leaf = pki.issue_leaf(authorities["eu"], CLIENT, pki.make_key().public_key(), now=NOW)
    later = NOW + timedelta(days=days)
    with pytest.raises(CertificateExpired, match=words) as caught:
        pki.verify_leaf(der(leaf), trust, later)
    assert f"clock here says {later:%Y-%m-%d}" in str(caught.value)


def test_a_leaf_never_outlives_its_authority(authorities: dict[str, Authority]) -> None:
    last = authorities["eu"].certificate.not_valid_after_utc
    leaf = pki.issue_leaf(authorities["eu"], CLIENT, pki.make_key().public_key(), now=last - timedelta(days=1))
    assert leaf.not_valid_after_utc == last


# --- signatures


def test_a_signature_fits_its_key_message_and_context_only(authorities: dict[str, Authority]) -> None:
    key = pki.make_key()
    leaf = pki.issue_leaf(authorities["eu"], CLIENT, key.public_key(), now=NOW)
    signature = pki.sign(key, b"message", b"hierfl.plan/1")
    pki.verify(leaf, signature, b"message", b"hierfl.plan/1")
    for message, context in [(b"massage", b"hierfl.plan/1"), (b"message", b"hierfl.commit/1"), (b"", b"hierfl.plan/1")]:
        with pytest.raises(CertificateUntrusted, match="does not fit"):
            pki.verify(leaf, signature, message, context)
    for other in (pki.make_key().public_key(), authorities["eu"].certificate):
        with pytest.raises(CertificateUntrusted, match="does not fit"):
            pki.verify(other, signature, b"message", b"hierfl.plan/1")
    with pytest.raises(CertificateUntrusted):
        pki.verify(leaf, b"no signature", b"message", b"hierfl.plan/1")


def test_a_context_cannot_flow_into_the_message() -> None:
    key = pki.make_key()
    signature = pki.sign(key, b"xmessage", b"plan")
    with pytest.raises(CertificateUntrusted):
        pki.verify(key.public_key(), signature, b"message", b"planx")
    with pytest.raises(ValueError, match="zero bytes"):
        pki.sign(key, b"message", b"plan\0x")


def test_a_ledger_key_signs_but_opens_no_connection(authorities: dict[str, Authority], trust: TrustStore) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    certificate = der(pki.issue_ledger(authorities["eu"], key.public_key(), now=NOW))
    years_later = NOW + timedelta(days=3000)
    found = pki.verify_ledger(certificate, trust, "eu", years_later)
    pki.verify(found, pki.sign(key, b"head", b"hierfl.ledger-head/1"), b"head", b"hierfl.ledger-head/1")
    for region in ("us", "apac"):
        with pytest.raises(CertificateUntrusted):
            pki.verify_ledger(certificate, trust, region, NOW)
    with pytest.raises(CertificateUntrusted, match="no identity"):
        pki.verify_leaf(certificate, trust, NOW)
    with pytest.raises(CertificateUntrusted, match="not that of"):
        pki.verify_ledger(forged(authorities["eu"]), trust, "eu", NOW)


# --- kits


@pytest.fixture
def kit_path(tmp_path: Path) -> Iterator[Path]:
    provision.init(tmp_path, "acme", ["hub.example:4433"])
    provision.add_region(tmp_path, "eu", ["eu.example:1", "eu.example:2"])
    return provision.add_site(tmp_path, "eu", "charite")[0]


def test_a_kit_says_who_it_is_whom_it_trusts_and_whom_it_dials(kit_path: Path, tmp_path: Path) -> None:
    kit = Kit.load(kit_path)
    assert kit.identity == CLIENT
    assert kit.addresses == ("eu.example:1", "eu.example:2")
    assert set(kit.trust.regions) == {"eu"}
    assert kit.trust.controller is not None
    assert kit.ledger is None
    assert pki.verify_leaf(kit.certificate_der, kit.trust, datetime.now(UTC)) == CLIENT
    combiner = Kit.load(tmp_path / "kits" / "regions" / "eu" / "combiner")
    assert combiner.ledger is not None
    assert "PrivateKey" not in repr(combiner)


@pytest.mark.parametrize("name", ["identity.pem", "key.pem", "kit.toml", "trust"])
def test_a_missing_file_is_named_with_where_kits_come_from(kit_path: Path, name: str) -> None:
    (kit_path / name).rename(kit_path / "elsewhere")
    with pytest.raises(CertificateMissing, match="hierfl provision") as caught:
        Kit.load(kit_path)
    assert name in str(caught.value)


def test_a_folder_that_is_not_there_is_no_kit(tmp_path: Path) -> None:
    with pytest.raises(CertificateMissing, match="is no kit"):
        Kit.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["identity.pem", "key.pem", "trust/controller.pem", "trust/regions/eu.pem"])
def test_a_damaged_file_is_named(kit_path: Path, name: str) -> None:
    (kit_path / name).write_bytes(b"-----BEGIN CERTIFICATE-----\nnonsense")
    with pytest.raises(CertificateUntrusted, match="is damaged") as caught:
        Kit.load(kit_path)
    assert name in str(caught.value)


def test_an_expired_kit_says_when_that_the_clock_may_be_wrong_and_what_renews_it(kit_path: Path) -> None:
    with pytest.raises(CertificateExpired) as caught:
        Kit.load(kit_path, now=datetime.now(UTC) + timedelta(days=31))
    words = str(caught.value)
    assert f"was valid until {Kit.load(kit_path).expires:%Y-%m-%d}" in words
    assert "if that clock is right" in words
    assert "`hierfl provision renew`" in words


def test_files_of_two_kits_do_not_make_one(kit_path: Path, tmp_path: Path) -> None:
    (other,) = provision.add_site(tmp_path, "eu", "inserm")
    (kit_path / "key.pem").write_bytes((other / "key.pem").read_bytes())
    with pytest.raises(CertificateUntrusted, match=r"does not belong to identity\.pem"):
        Kit.load(kit_path)
    (kit_path / "identity.pem").write_bytes((other / "identity.pem").read_bytes())
    with pytest.raises(CertificateUntrusted, match=r"kit.toml says .*charite.*, but identity.pem is .*inserm"):
        Kit.load(kit_path)


def test_a_kit_of_another_federation_with_the_same_names_is_refused(kit_path: Path, tmp_path: Path) -> None:
    provision.init(tmp_path / "two", "acme")
    provision.add_region(tmp_path / "two", "eu")
    ca = (tmp_path / "two" / "pki" / "regions" / "eu" / "ca.pem").read_bytes()
    (kit_path / "trust" / "regions" / "eu.pem").write_bytes(ca)
    with pytest.raises(CertificateUntrusted, match="not signed by the CA pinned"):
        Kit.load(kit_path)


def test_an_unknown_key_in_kit_toml_is_named(kit_path: Path) -> None:
    with (kit_path / "kit.toml").open("a") as file:
        file.write("adresses = []\n")
    with pytest.raises(ConfigError, match="did you mean 'addresses'"):
        Kit.load(kit_path)


def test_identities_survive_pickling() -> None:
    assert [pickle.loads(pickle.dumps(identity)) for identity in EVERYBODY] == EVERYBODY
