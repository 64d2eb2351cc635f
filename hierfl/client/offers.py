"""Whether a client obeys an offer. Pure: nothing is fetched or trained before ``accept`` has returned.

The client believes the controller's signature over the plan, not the combiner that passed it on; it adds
the site's own rules (fewest sites in a sum, apps installed here) and never takes one away.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from hierfl.client.app import App
from hierfl.errors import (
    CertificateUntrusted,
    HierFLError,
    LayoutMismatch,
    PolicyRefused,
    RequirementUnknown,
    StaleEpoch,
    StorageError,
    WireError,
)
from hierfl.layout import Layout
from hierfl.pki import Kit, RoleName, TrustStore, verify, verify_leaf
from hierfl.plan import PLAN_CONTEXT, Plan, plan_statement
from hierfl.types import TaskKind
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.convert import key_from_proto

__all__ = ["AppUnknown", "SitePolicy", "accept", "check_groups", "decline_code"]


class AppUnknown(PolicyRefused):
    """The plan is for an app, or a version of it, that does not run here."""


_CODES: Mapping[type[HierFLError], str] = {
    AppUnknown: "app_unknown",
    RequirementUnknown: "requirement_unknown",
    LayoutMismatch: "layout_mismatch",
    StorageError: "storage",
}
"""What a refusal is called upstream; every other one is the site's ``policy``."""


def decline_code(error: HierFLError) -> str:
    """The code, of the fixed list, that stands for an error."""
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), "policy")


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """The site's own rules."""

    app: App
    min_k: int = 2
    """Fewest distinct sites in any sum that this site takes part in."""


def accept(offer: pb.Offer, kit: Kit, policy: SitePolicy, known_epoch: int, now: datetime) -> Plan:
    """The plan of an offer that this client obeys.

    Args:
        known_epoch: Highest leader epoch this client has seen.
        now: Wall time, for the validity of the controller's certificate.
    Raises:
        CertificateUntrusted, CertificateExpired: Not signed by this federation's controller.
        StaleEpoch: From a leader that has been replaced.
        WireError, RequirementUnknown: No plan, or one that this release cannot obey.
        PolicyRefused: For another region or federation, or against the site's rules.
        AppUnknown: For an app that does not run here.
    """
    _check_signature(offer, kit.trust, now)
    if offer.leader_epoch < known_epoch:
        raise StaleEpoch(f"the offer is of leader epoch {offer.leader_epoch}, the newest seen is {known_epoch}")
    plan = _read_plan(offer.plan)
    if key_from_proto(offer.key) != plan.key:
        raise WireError(f"the offer's key is not its plan's, {plan.key}")
    _check_addressee(plan, kit)
    _check_rules(plan, policy)
    return plan


_read_plan = functools.lru_cache(maxsize=16)(Plan.from_bytes)
"""All clients of a process get the same plan: it is read, and its task hashed, once."""


def _check_signature(offer: pb.Offer, trust: TrustStore, now: datetime) -> None:
    signed = (offer.certificate, offer.signature, plan_statement(offer.leader_epoch, offer.plan))
    last_moment = _verified.get((signed, trust.controller))
    if last_moment is not None and now <= last_moment:
        return  # another client of this process has checked the same bytes
    signer = verify_leaf(offer.certificate, trust, now)
    if signer.role is not RoleName.CONTROLLER:
        raise CertificateUntrusted(f"the plan is signed by {signer}, not by the controller")
    leaf = x509.load_der_x509_certificate(offer.certificate)
    verify(leaf, signed[1], signed[2], PLAN_CONTEXT)
    if len(_verified) >= MAX_REMEMBERED:
        _verified.clear()
    authority = trust.authority(signer)
    _verified[signed, trust.controller] = min(leaf.not_valid_after_utc, authority.not_valid_after_utc)


MAX_REMEMBERED = 64
_verified: dict[tuple[tuple[bytes, bytes, bytes], x509.Certificate | None], datetime] = {}
"""Offers whose signature was found right under a controller's CA, and until when its certificates last."""


def _check_addressee(plan: Plan, kit: Kit) -> None:
    own = kit.identity
    if (plan.federation, plan.region) != (own.federation, own.region):
        raise PolicyRefused(f"the plan is for region {plan.region} of {plan.federation}, this is {own}")


def _check_rules(plan: Plan, policy: SitePolicy) -> None:
    if plan.k < policy.min_k:
        raise PolicyRefused(
            f"the plan lets sums over {plan.k} sites leave, this site asks for at least {policy.min_k} (--min-k)"
        )
    if not policy.app.serves(plan.task.app, plan.task.app_version):
        wanted = "@".join(part for part in (plan.task.app, plan.task.app_version) if part)
        raise AppUnknown(f"the plan is for the app {wanted}, here runs {policy.app}")


def check_groups(plan: Plan, layout: Layout) -> None:
    """Whether the plan's column groups are the layout's vectors.

    Raises:
        RequirementUnknown: The plan wants a vector that no layout of this release has.
        LayoutMismatch: Other lengths, or a vector left out.
    """
    wanted = {group.name: group.num_values for group in plan.task.groups}
    unknown = ", ".join(sorted(wanted.keys() - layout.vectors.keys()))
    if unknown:
        raise RequirementUnknown(f"the plan asks for {unknown}, unknown to this release; upgrade hierfl")
    if plan.task.kind is TaskKind.TRAIN and wanted != dict(layout.vectors):
        raise LayoutMismatch(f"the plan asks for vectors {wanted}, the layout has {dict(layout.vectors)}")
