"""What became of each of a site's updates: from the clients' folders, and from their combiner where it can be asked.

Reads only, and takes no lock: the clients may be running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from hierfl import documents
from hierfl.client.held import Held
from hierfl.client.intakes import Intakes
from hierfl.client.link import receipts_at
from hierfl.client.receiptlog import FILE, KeptReceipt, read_log, receipt_of
from hierfl.errors import HierFLError, NotFound, Unreachable, WireError
from hierfl.pki import Kit
from hierfl.receipts import Receipt
from hierfl.types import AttemptKey, ClientId, ClientRef, RegionId, SiteId

__all__ = ["Told", "ask_anew", "find_folders", "kept_of_run"]

Folders: TypeAlias = Mapping[ClientRef, Sequence[Path]]
Say = Callable[[str], None]

KEYS_A_CALL = 500


@dataclass(frozen=True, kw_only=True)
class Told:
    """One update of one client, and what is known of it."""

    client: ClientRef
    kept: KeptReceipt
    """The last that the site has."""
    is_held: bool
    """Whether the update itself is still here."""
    now: Receipt | None = None
    """What the combiner says, where it was asked and has a receipt."""

    @property
    def contradicts(self) -> bool:
        """Whether the combiner gives another last word than it gave before: it never may."""
        kept, now = self.kept, self.now
        if now is None or not (kept.state.is_last_word and now.digest == kept.digest):
            return False
        return (now.state, now.version, now.reason) != (kept.state, kept.version, kept.reason)


def find_folders(directory: Path) -> dict[ClientRef, list[Path]]:
    """Folders of clients in ``directory``, or one level below it (a process each, as ``hierfl up`` makes them)."""
    found: dict[ClientRef, list[Path]] = {}
    for path in sorted((*directory.glob("*/updates"), *directory.glob("*/*/updates"))):
        names = path.parent.name.split(".")
        if len(names) == 3:
            client = ClientRef(RegionId(names[0]), SiteId(names[1]), ClientId(names[2]))
            found.setdefault(client, []).append(path.parent)
    return found


def kept_of_run(folders: Folders, run: str) -> list[Told]:
    """Every update of a run that a line or the update itself is still kept of, by client and key.

    Raises:
        NotFound: Nothing here is of that run.
        StorageError: A log cannot be read.
    """
    everything = [told for client, paths in folders.items() for path in paths for told in _kept(client, path)]
    found = {(told.client, told.kept.key): told for told in everything if told.kept.key.run == run}
    if not found:
        there = ", ".join(sorted({told.kept.key.run for told in everything})[-5:]) or "none"
        raise NotFound("run", run, f"updates kept here, or receipts of them, are of {there}")
    return [found[key] for key in sorted(found)]


def _kept(client: ClientRef, folder: Path) -> Iterable[Told]:
    """Updates that are held, then lines of the log, which know more."""
    held = {one.key: one for path in sorted((folder / "updates").glob("*.json")) if (one := _held(path)) is not None}
    for one in held.values():
        as_made = replace(receipt_of(one, one.state), at_unix_ns=one.made_unix_ns)
        yield Told(client=client, kept=as_made, is_held=True)
    for receipt in read_log(folder / FILE):
        yield Told(client=client, kept=receipt, is_held=receipt.key in held)


def _held(path: Path) -> Held | None:
    try:
        return documents.decode(path.read_bytes(), Held, "held update")
    except (OSError, WireError):  # dropped in this moment, or damaged
        return None


def ask_anew(told: Sequence[Told], kits: Mapping[ClientRef, Kit], folders: Folders, say: Say) -> list[Told]:
    """Ask each client's combiner for all of its keys; one that cannot be reached is said, and left as it is."""
    return asyncio.run(_ask_all(told, kits, folders, say))


async def _ask_all(told: Sequence[Told], kits: Mapping[ClientRef, Kit], folders: Folders, say: Say) -> list[Told]:
    answers: dict[tuple[ClientRef, AttemptKey], Receipt] = {}
    for client in sorted({one.client for one in told}):
        keys = [one.kept.key for one in told if one.client == client]
        if client not in kits:
            say(f"{client.site}/{client.client}: its combiner was not asked; --kit names the client's kit")
            continue
        try:
            found = await _ask(kits[client], folders[client][0], keys, say)
        except HierFLError as error:
            say(f"{client.site}/{client.client}: its combiner was not asked: {error}")
            continue
        answers.update({(client, receipt.key.attempt): receipt for receipt in found if receipt.digest})
    return [replace(one, now=answers.get((one.client, one.kept.key))) for one in told]


async def _ask(kit: Kit, folder: Path, keys: Sequence[AttemptKey], say: Say) -> list[Receipt]:
    """From the first intake that answers."""
    words = "the kit names no address"
    for target in Intakes(kit, folder / "endpoints", say).targets(kit.addresses):
        try:
            parts = [keys[n : n + KEYS_A_CALL] for n in range(0, len(keys), KEYS_A_CALL)]
            return [receipt for part in parts for receipt in await receipts_at(kit, target.address, part)]
        except Unreachable as error:
            words = str(error)
    raise Unreachable(words)
