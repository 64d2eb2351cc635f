"""What a region believes of its controller: plans and commit records that the controller has signed. Pure.

The connection's certificate is not enough: clients check the same signatures, and a record outlives its
connection.
"""

from __future__ import annotations

from datetime import UTC, datetime

from cryptography import x509

from hierfl import documents
from hierfl.border import head_statement
from hierfl.errors import CertificateUntrusted, PolicyRefused, StaleEpoch, WireError
from hierfl.identity import Identity, RoleName
from hierfl.pki import TrustStore, verify, verify_leaf
from hierfl.plan import PLAN_CONTEXT, Plan, plan_statement
from hierfl.records import COMMIT_CONTEXT, LEDGER_HEAD_CONTEXT, CommitRecord
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.convert import key_from_proto

__all__ = ["accept_offer", "accept_record", "check_countersignature"]


def accept_offer(offer: pb.Offer, own: Identity, trust: TrustStore, known_epoch: int, now: datetime) -> Plan:
    """The plan of an offer that this region obeys.

    Raises:
        CertificateUntrusted, CertificateExpired: Not signed by this federation's controller.
        StaleEpoch: From a leader that has been replaced.
        WireError, RequirementUnknown: No plan, or one that this release cannot obey.
        PolicyRefused: For another region or federation.
    """
    leaf = _controller_leaf(offer.certificate, trust, now)
    verify(leaf, offer.signature, plan_statement(offer.leader_epoch, offer.plan), PLAN_CONTEXT)
    if offer.leader_epoch < known_epoch:
        raise StaleEpoch(f"the offer is of leader epoch {offer.leader_epoch}, the newest seen is {known_epoch}")
    plan = Plan.from_bytes(offer.plan)
    if key_from_proto(offer.key) != plan.key:
        raise WireError(f"the offer's key is not its plan's, {plan.key}")
    _ = plan.drop_bits
    if (plan.federation, plan.region) != (own.federation, own.region):
        raise PolicyRefused(f"the plan is for region {plan.region} of {plan.federation}, this is {own}")
    return plan


def accept_record(verdict: pb.Verdict, trust: TrustStore) -> CommitRecord:
    """The commit record of a verdict, checked at the time that it says it was signed.

    Raises:
        CertificateUntrusted, CertificateExpired: Not signed by this federation's controller.
        WireError: It is no record, or of another round or version than the verdict says. Its attempt may be a
            later one: a partial counts in whichever attempt at its round is committed.
    """
    record = documents.decode(verdict.record, CommitRecord, "commit record")
    signed_at = datetime.fromtimestamp(record.committed_unix_ns / 1e9, UTC)
    leaf = _controller_leaf(verdict.certificate, trust, signed_at)
    verify(leaf, verdict.signature, verdict.record, COMMIT_CONTEXT)
    key = key_from_proto(verdict.key)
    said = (key.run, key.round, verdict.model_version, trust.federation)
    if said != (record.run, record.round, record.version, record.federation):
        raise WireError(f"the verdict on {key} came with the record of another round or version")
    return record


def check_countersignature(response: pb.UplinkResponse, head: str, trust: TrustStore, now: datetime) -> None:
    """Raise unless the controller has signed this border ledger's head."""
    leaf = _controller_leaf(response.certificate, trust, now)
    verify(leaf, response.countersignature, head_statement(head), LEDGER_HEAD_CONTEXT)


def _controller_leaf(der: bytes, trust: TrustStore, now: datetime) -> x509.Certificate:
    signer = verify_leaf(der, trust, now)
    if signer.role is not RoleName.CONTROLLER:
        raise CertificateUntrusted(f"signed by {signer}, not by the controller")
    return x509.load_der_x509_certificate(der)
