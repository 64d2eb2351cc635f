"""Named points at the steps that can fail, where a test makes a process die, freeze or meet a disk's error.

Only tests arm them: ``HIERFL_FAILPOINTS`` in a process's environment names a folder, and a file there with the name
of a point says what happens to whoever reaches it first. That one takes the file away (``POINT.PID`` stands in its
place), so one file does one harm. Without the variable a point is one comparison.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from hierfl.errors import Unreachable

__all__ = ["ACTIONS", "POINTS", "VARIABLE", "reach"]

VARIABLE = "HIERFL_FAILPOINTS"
ACTIONS = ("kill", "freeze", "lost", "EIO", "ENOSPC")
"""What a file may say: SIGKILL, SIGSTOP, an answer that is lost on its way, or an ``OSError`` with this number."""

POINTS: Mapping[str, str] = MappingProxyType(
    {
        "client.hold": "an update is made, and not on the site's disk yet",
        "client.send": "an update is on the site's disk, and nothing of it is sent yet",
        "client.answered": "the combiner has answered, and the client has not heard",
        "client.receipt": "a last word has come, and is not acted upon yet",
        "client.logged": "a last word is in the client's log, and its update is not dropped yet",
        "intake.stage": "an update is there whole, and not checked yet",
        "intake.claim": "an update is checked, and not claimed yet",
        "intake.fold": "a claim is granted, and nothing is folded yet",
        "intake.folded": "an update is in the sum, and the Region has not heard",
        "intake.hand_over": "the sums are ready, and not handed over yet",
        "region.offer": "a plan is accepted, and nothing is done about it yet",
        "region.claim": "claims are answered, and the intake has not heard",
        "region.refuse": "a refusal for good is durable, and nobody has heard",
        "region.seal": "all sums are handed over, and nothing is sealed yet",
        "region.seal.write": "a file of a seal is written, and its name is not in place yet",
        "region.seal.residual": "what rounding left over, if anything, is durable, nothing of the partial is",
        "region.seal.file": "the partial's file is durable, its rows are not written yet",
        "region.transaction": "the rows of a change are written, and not committed yet",
        "region.sealed": "the seal is durable, and nobody has heard",
        "region.uplink": "the ledger's row is durable, and nothing has left yet",
        "region.acknowledged": "the controller has the partial, and the ledger does not say so yet",
        "region.verdict": "a verdict is believed, and not written yet",
        "region.settled": "last words are durable, and no client has heard",
        "store.volume": "the name of a shared store is written, and not in its folder yet",
        "store.run": "what a run was submitted as is written, and its name is not in place yet",
        "controller.open": "an attempt is durable, and no region has been offered it",
        "controller.accept": "a partial is there whole, and not durable yet",
        "controller.accepted": "a partial's bytes are durable, its row is not",
        "controller.answered": "a partial's row is durable, and its region has not heard",
        "controller.merge": "a round is closed, and nothing is merged yet",
        "controller.blob": "a blob is written, and its name is not in place yet",
        "controller.record": "the next model is durable, its commit record is not there yet",
        "controller.link": "a commit record is written, and its name is not in place yet",
        "controller.recorded": "the commit record is there, the rows do not say so yet",
        "controller.write": "a change is decided, and nothing of it is written",
        "controller.transaction": "the rows of a change are written, and not committed yet",
        "controller.announce": "a round is committed, and nobody has heard",
        "controller.ended": "a run has ended, and nobody has heard",
    }
)
"""Every point, and what stands and what does not when it is reached."""

_SIGNALS = {"kill": "SIGKILL", "freeze": "SIGSTOP"}
_folder = os.environ.get(VARIABLE)


def reach(point: str) -> None:
    """Say that this step is reached. Raises ``OSError`` or ``Unreachable`` where a test says so."""
    if _folder is not None:
        _obey(Path(_folder, point))


def _obey(order: Path) -> None:
    taken = order.with_name(f"{order.name}.{os.getpid()}")
    try:
        order.rename(taken)
    except FileNotFoundError:
        return
    match taken.read_text().strip():
        case ("kill" | "freeze") as action:
            os.kill(os.getpid(), getattr(signal, _SIGNALS[action]))  # by name: Windows has neither
        case "lost":
            raise Unreachable(f"the answer was lost at {order.name}")
        case action:
            raise OSError(getattr(errno, action), os.strerror(getattr(errno, action)), str(order))
