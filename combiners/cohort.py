"""Who takes part in one attempt, and how far each has come. Nothing is granted beyond the plan's caps.

No I/O and no clock. A member's claim is what the region granted: one live claim per key, with its
digest, its weight and the incarnation that holds its bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum, StrEnum

from combiners.messages import Answer, Claim, ClaimAnswer
from hierfl.plan import Plan
from hierfl.receipts import Reason, Receipt, ReceiptEvent, ReceiptState, next_receipt
from hierfl.types import ClientRef, SiteId

__all__ = ["Cohort", "Member", "Outlook", "Standing"]


class Standing(StrEnum):
    """Where a member is."""

    EXPECTED = "expected"  # offered, no answer yet
    CLAIMED = "claimed"  # its update is granted and being folded
    FOLDED = "folded"  # in an accumulator
    DECLINED = "declined"  # said no, or its bytes were refused
    GONE = "gone"  # away for longer than the grace: may come back, is not waited for


class Outlook(Enum):
    """What the region can expect of an attempt."""

    WAIT = "wait"
    COMPLETE = "complete"  # enough, and nobody else is expected
    HOPELESS = "hopeless"  # too few can still answer


@dataclass(frozen=True, kw_only=True)
class Member:
    """``claim`` and ``incarnation`` are set while the standing is CLAIMED or FOLDED."""

    client: ClientRef
    standing: Standing = Standing.EXPECTED
    claim: Claim | None = None
    incarnation: str = ""

    @property
    def is_in(self) -> bool:
        """Whether its update is granted."""
        return self.claim is not None

    def receipt(self) -> Receipt | None:
        """What is known of its update: a granted one is CLAIMED."""
        if self.claim is None:
            return None
        staged = Receipt(key=self.claim.key, digest=self.claim.digest, state=ReceiptState.STAGED)
        return next_receipt(staged, ReceiptEvent.CLAIM)


class Cohort:
    """Members of one attempt by client; how many stand where is counted as they move, never looked for."""

    def __init__(self, plan: Plan, k: int) -> None:
        self.plan = plan
        self.k = k
        self.weight = 0
        """Sum of the weights granted."""
        self._members: dict[ClientRef, Member] = {}
        self._sites: dict[Standing, Counter[SiteId]] = {standing: Counter() for standing in Standing}
        """Members of each site, by standing."""
        self._num = dict.fromkeys(Standing, 0)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    @property
    def members(self) -> Mapping[ClientRef, Member]:
        return self._members

    def count(self, *standings: Standing) -> int:
        """Members with one of these standings."""
        return sum(self._num[standing] for standing in standings)

    def enough(self, clients: Iterable[ClientRef]) -> bool:
        """Whether these clients are as many, from as many sites, as the plan and the zone ask for."""
        sites = set[SiteId]()
        for num_clients, client in enumerate(clients, 1):
            sites.add(client.site)
            if num_clients >= self.plan.min_clients and len(sites) >= self.k:
                return True
        return False

    def enough_with(self, *standings: Standing) -> bool:
        """Whether the members with one of these standings are ``enough``."""
        if self.count(*standings) < self.plan.min_clients:
            return False
        sites = [self._sites[standing].keys() for standing in standings]
        return max(map(len, sites)) >= self.k or len(set().union(*sites)) >= self.k

    def outlook(self) -> Outlook:
        """The closing rule: wait for all that are expected, and for those that went while too few are in.

        In is who was granted: a freeze waits for what is being folded, and what an intake lets go then is asked again.
        """
        standing = Standing
        granted = (standing.CLAIMED, standing.FOLDED)
        if self.enough_with(*granted):
            return Outlook.WAIT if self.count(standing.EXPECTED) else Outlook.COMPLETE
        hoped_for = self.enough_with(*granted, standing.EXPECTED, standing.GONE)
        return Outlook.WAIT if hoped_for else Outlook.HOPELESS

    def _put(self, member: Member) -> None:
        """The only place where a member is added or moves."""
        site, before = member.client.site, self._members.get(member.client)
        if before is not None:
            left = self._sites[before.standing]
            left[site] -= 1
            if not left[site]:
                del left[site]
            self._num[before.standing] -= 1
        self._sites[member.standing][site] += 1
        self._num[member.standing] += 1
        self._members[member.client] = member

    def expect(self, client: ClientRef) -> None:
        """The client is connected and has the offer. One that had left or declined is asked again."""
        member = self._members.get(client)
        if member is None or not member.is_in:
            self._put(Member(client=client))

    def decline(self, client: ClientRef) -> None:
        self._set_aside(client, Standing.DECLINED)

    def miss(self, client: ClientRef) -> None:
        """The client has been away for the grace."""
        member = self._members.get(client)
        if member is not None and member.standing is Standing.EXPECTED:
            self._set_aside(client, Standing.GONE)

    def _set_aside(self, client: ClientRef, standing: Standing) -> None:
        member = self._members.get(client)
        if member is not None and not member.is_in:
            self._put(Member(client=client, standing=standing))

    def claim(self, incarnation: str, claim: Claim) -> ClaimAnswer:
        """Grant a claim, or say why not. Asked twice, it answers the same."""
        member = self._members.get(claim.key.client)
        if member is not None and member.claim is not None:
            return self._claimed_before(member, incarnation, claim)
        if not 1 <= claim.weight <= self.plan.caps.max_weight:
            return ClaimAnswer(key=claim.key, answer=Answer.REFUSED, reason=Reason.INVALID)
        if self.weight + claim.weight > self.plan.caps.region_weight:
            self.decline(claim.key.client)
            return ClaimAnswer(key=claim.key, answer=Answer.REFUSED, reason=Reason.WEIGHT_SHARE)
        self._put(Member(client=claim.key.client, standing=Standing.CLAIMED, claim=claim, incarnation=incarnation))
        self.weight += claim.weight
        return ClaimAnswer(key=claim.key, answer=Answer.GRANTED)

    def _claimed_before(self, member: Member, incarnation: str, claim: Claim) -> ClaimAnswer:
        assert member.claim is not None
        if member.claim.digest != claim.digest:
            return ClaimAnswer(key=claim.key, answer=Answer.REFUSED, reason=Reason.DIGEST_CONFLICT)
        if member.standing is Standing.CLAIMED and member.incarnation == incarnation:
            return ClaimAnswer(key=claim.key, answer=Answer.GRANTED)  # the answer was lost on its way
        return ClaimAnswer(key=claim.key, answer=Answer.KNOWN, receipt=member.receipt())

    def fold(self, incarnation: str, client: ClientRef) -> None:
        """The claim's bytes are in the accumulator of ``incarnation``. Another's word is ignored."""
        member = self._members.get(client)
        if member is not None and member.is_in and member.incarnation == incarnation:
            self._put(replace(member, standing=Standing.FOLDED))

    def let_go(self, incarnation: str, clients: Iterable[ClientRef] | None = None) -> list[ClientRef]:
        """Free the claims of ``incarnation`` (those of ``clients``, or all): they are expected again."""
        held = self.claims_of(incarnation)
        freed = list(held) if clients is None else [client for client in clients if client in held]
        for client in freed:
            self.weight -= held[client].weight
            self._put(Member(client=client))
        return freed

    def claims_of(self, incarnation: str) -> dict[ClientRef, Claim]:
        """What ``incarnation`` was granted."""
        return {
            member.client: member.claim
            for member in self
            if member.claim is not None and member.incarnation == incarnation
        }

    def receipts(self) -> list[Receipt]:
        """Of every granted update."""
        return [receipt for member in self if (receipt := member.receipt()) is not None]
