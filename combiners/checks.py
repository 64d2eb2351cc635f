"""Is this update what the plan asked for? Checked whole, before anything of it is claimed or folded. Pure."""

from __future__ import annotations

from hierfl import documents, encodings
from hierfl.errors import LayoutMismatch, ValueOutOfRange, WireError
from hierfl.metrics import check_metric_sums
from hierfl.plan import Plan
from hierfl.records import UpdateHead
from hierfl.wire.transfer import Expect, Incoming, VectorSpec

__all__ = ["check_announced", "check_head", "check_update", "expect_update"]


def expect_update(plan: Plan, digest: str | None = None) -> Expect:
    """The transfer that an update of this plan is."""
    expected = encodings.wire_vectors(plan.task.update_encoding, plan.task.groups)
    vectors = tuple(VectorSpec(name=name, dtype=dtype, num_values=num_values) for name, dtype, num_values in expected)
    return Expect(
        kind="update",
        layout_hash=plan.base.layout_hash,
        vectors=vectors,
        max_bytes=plan.caps.max_upload_bytes,
        digest=digest,
        encoding=plan.task.encoding.name,
    )


def check_announced(plan: Plan, weight: int, length_bytes: int) -> None:
    """What a client says of its update before it sends it.

    Raises:
        ValueOutOfRange: Its weight.
        LayoutMismatch: Its length.
    """
    if not 1 <= weight <= plan.caps.max_weight:
        raise ValueOutOfRange(f"the update's weight is {weight}: must be from 1 to {plan.caps.max_weight}")
    expected = encodings.length_bytes(plan.task.update_encoding, plan.task.groups)
    if length_bytes != expected:
        raise LayoutMismatch(f"the update has {length_bytes} bytes of values, the plan's layout {expected}")


def check_update(incoming: Incoming, plan: Plan, weight: int) -> UpdateHead:
    """Check a received update as a whole (100 MB: 30 ms, without the GIL); its layout was checked as it came.

    Raises:
        ValueOutOfRange: A value out of range; and as ``check_head``.
    """
    head = check_head(incoming, plan, weight)
    encodings.check_update(plan.task.update_encoding, plan.task.groups, incoming.chunks)
    return head


def check_head(incoming: Incoming, plan: Plan, weight: int) -> UpdateHead:
    """Check all of a received update but its values.

    Raises:
        ValueOutOfRange: A metric out of range, or undeclared, or another weight than announced.
        WireError: Its head is none, or made for another base model or task.
    """
    head = documents.decode(incoming.meta, UpdateHead, "update head")
    if head.weight != weight:
        raise ValueOutOfRange(f"the update's weight is {head.weight}, it was announced as {weight}")
    if head.base_model_hash != plan.base.model_hash or head.task_hash != plan.task.hash:
        raise WireError("the update was made for another base model or task than this round's; train on this round's")
    check_metric_sums(plan.task.metrics, head.metrics, 1)
    return head
