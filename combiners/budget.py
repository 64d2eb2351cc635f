"""What fits into the memory that an intake may use: updates in flight, and when sums have to be sharded.

An intake needs for each open attempt the sums (8 bytes a value) and the model that it sends down (4), and beside them
every update until it is folded. What it may use is said (``--memory``), or its share of what the machine or the
container that it runs in has. All but ``machine_bytes`` is arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hierfl.columns import ColumnGroup

__all__ = ["Need", "machine_bytes", "need_of", "shards_needed", "share", "staging_bytes"]

PROGRAM_BYTES = 256 * 2**20
"""Of the program itself, and its connections' buffers."""
USED_SHARE = 0.6
"""Of a machine's memory is for a combiner's processes: Ray, its object store and the system have the rest."""
ENOUGH_BYTES = 512 * 2**20
ENOUGH_UPDATES = 4
"""Updates in flight beyond both make a round no faster. Where memory is given by hand, all of it is used."""
MOST_SHARDS = 64
"""Of one attempt: a process each."""


@dataclass(frozen=True)
class Need:
    """What one open attempt needs, in bytes."""

    model: int
    """Its values as float32; its sums are twice that."""
    update: int
    """An update as it travels."""
    shards: int = 0
    """Processes that share its sums; 0: the intake has them itself."""


def need_of(groups: Sequence[ColumnGroup], update_bytes: int, shards: int = 0) -> Need:
    return Need(4 * sum(group.num_values for group in groups), update_bytes, shards)


def share(total_bytes: int, actors: int) -> int:
    """What each of ``actors`` processes on one machine may use."""
    return int(USED_SHARE * total_bytes) // actors


def staging_bytes(memory_bytes: int, needs: Sequence[Need], *, is_given: bool = False) -> int:
    """Bytes of updates that may be in flight at an intake beside its open attempts; one always goes alone.

    Args:
        memory_bytes: What the intake may use; each shard has as much.
        needs: Of the open attempts.
        is_given: Whether that memory was said by hand: to use more than is enough is then what was meant.
    """
    own = memory_bytes - PROGRAM_BYTES - 3 * sum(need.model for need in needs if not need.shards)
    rooms = [own] if not needs or any(not need.shards for need in needs) else []
    sharded = [need for need in needs if need.shards]
    if sharded:  # staged at the shards, beside the sums of all
        shards = max(need.shards for need in sharded)
        rooms.append(shards * (memory_bytes - PROGRAM_BYTES) - 2 * sum(need.model for need in sharded))
    enough = max(ENOUGH_BYTES, *(ENOUGH_UPDATES * need.update for need in needs), 0)
    room = max(0, min(rooms))
    return room if is_given else min(room, enough)


def shards_needed(memory_bytes: int, need: Need) -> int:
    """Processes of ``memory_bytes`` each that an attempt's sums and one update take; 0 where the intake has room."""
    room = memory_bytes - PROGRAM_BYTES
    if 3 * need.model + need.update <= room:
        return 0
    return min(MOST_SHARDS, max(2, -(-(2 * need.model + need.update) // max(room, 1))))


def machine_bytes(root: Path = Path("/")) -> int:
    """Memory of this machine, or what the container around this process is limited to where that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [_number(root / path) for path in _limit_files(root)]
    return min([physical, *(limit for limit in limits if limit)])


def _limit_files(root: Path) -> list[Path]:
    """Files that may say a limit: of every control group (version 2, then 1) from this process's own upwards."""
    files: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else ("sys/fs/cgroup", "memory.max")
        )
        own = Path(path.lstrip("/"))
        files += [Path(top) / folder / name for folder in (own, *own.parents)]
    return files


def _number(path: Path) -> int:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else 0  # "max", or no such file


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
