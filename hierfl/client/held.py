"""Updates kept on the site's own disk until their last word, and the tensors that never leave it.

An update is held under its *work*: (run, task, round, base model, task hash), without the attempt. A new
attempt at the same work is answered with the same bytes, so nobody trains twice for it.

    DIR/updates/<id>.values    the vectors, little-endian, one after the other; written first
    DIR/updates/<id>.residual  what it leaves out, where it is kept (hierfl/client/residuals.py); written next
    DIR/updates/<id>.json      all else; its presence makes the update held
    DIR/local/<run>/<round>.safetensors    local tensors as that round left them
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from hierfl import documents
from hierfl.client.files import make_folder, write_durably
from hierfl.errors import StoreDamaged, WireError
from hierfl.failpoints import reach
from hierfl.plan import Plan
from hierfl.receipts import ReceiptState
from hierfl.records import UpdateHead
from hierfl.types import AttemptKey, ModelHash, RunId, TaskKind
from hierfl.wire import transfer

__all__ = ["Held", "HeldUpdates", "LocalTensors", "Work", "encode_update"]

SMALL_BYTES = 65_536
"""An update of that size is encoded once, for its digest and for sending; a larger one chunk by chunk as it is sent."""

KEEP_LOCAL_ROUNDS = 2
"""Of local tensors: the round before this one, in case this one is asked again, and this one."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an update answers, whatever the attempt."""

    run: RunId
    task: TaskKind
    round: int
    base_model_hash: ModelHash
    task_hash: str

    @classmethod
    def of(cls, plan: Plan) -> Work:
        """The work that a plan asks for."""
        return cls(
            run=plan.run,
            task=plan.task.kind,
            round=plan.round,
            base_model_hash=plan.base.model_hash,
            task_hash=plan.task.hash,
        )

    @cached_property
    def id(self) -> str:
        """A file name for it: 32 hex digits of a SHA-256."""
        return hashlib.sha256(documents.encode(self)).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Held:
    """One update as held. ``attempt`` is the newest that it was addressed to."""

    work: Work
    attempt: int
    digest: str
    """Of its transfer, ``alg:hex``: over values and head, not over the key."""
    layout_hash: str
    vectors: tuple[transfer.VectorSpec, ...]
    head: UpdateHead
    state: ReceiptState
    made_unix_ns: int
    """Wall clock of the site: ``hold_s`` has to outlast restarts."""
    hold_s: float
    encoding: str = "float32"

    @property
    def key(self) -> AttemptKey:
        return AttemptKey(self.work.run, self.work.task, self.work.round, self.attempt)

    def expired(self, now_unix_ns: int) -> bool:
        return now_unix_ns > self.made_unix_ns + int(self.hold_s * 1e9)


class HeldUpdates:
    """The updates of one client. Everything in memory is on disk, but for states that are no last word; a damaged file
    is dropped."""

    def __init__(self, folder: Path) -> None:
        """Find what an earlier process left.

        Raises:
            StorageError: The folder cannot be made or read.
        """
        self.folder = make_folder(folder / "updates")
        self._held: dict[str, Held] = {}
        for path in sorted(self.folder.glob("*.json")):
            held = _read(path)
            if held is not None and held.work.id == path.stem and path.with_suffix(".values").is_file():
                self._held[path.stem] = held
        self._remove_strays()

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._held.values()))

    def __len__(self) -> int:
        return len(self._held)

    def find(self, work: Work) -> Held | None:
        return self._held.get(work.id)

    def find_key(self, key: AttemptKey) -> Held | None:
        """The held update that was last addressed to ``key``."""
        return next((held for held in self._held.values() if held.key == key), None)

    def save(
        self, held: Held, vectors: Mapping[str, np.ndarray], left_out: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Hold an update, and what it leaves out where it carries its run's residual: durable when this returns.

        Raises:
            DiskFull, StorageError: Nothing is held; nothing half-written remains.
        """
        values, residual = self._path(held.work, ".values"), self.residual(held.work)
        reach("client.hold")
        try:
            write_durably(values, (_bytes_of(vectors[spec.name]) for spec in held.vectors))
            if left_out is not None:
                write_durably(residual, map(_bytes_of, left_out.values()))
            self._record(held)
        except BaseException:
            values.unlink(missing_ok=True)
            residual.unlink(missing_ok=True)
            raise

    def residual(self, work: Work) -> Path:
        """The file with what an update leaves out; it is there where the update carries its run's residual."""
        return self._path(work, ".residual")

    def carrier(self, work: Work) -> Held | None:
        """The other update of the same run that carries its residual and may yet be counted."""
        others = (held for held in self._held.values() if held.work.run == work.run and held.work != work)
        may_count = (held for held in others if held.state is not ReceiptState.NOT_COUNTED)
        return next((held for held in may_count if self.residual(held.work).exists()), None)

    def address(self, held: Held, attempt: int) -> Held:
        """The same update, for a new attempt at the same work."""
        return self._record(replace(held, attempt=attempt, state=ReceiptState.OFFERED))

    def mark(self, held: Held, state: ReceiptState) -> Held:
        """Note what the combiner says of it: STAGED and SEALED in memory only, they are asked for at each start."""
        if held.state is state:
            return held
        marked = replace(held, state=state)
        if state.is_last_word:
            return self._record(marked)
        self._held[held.work.id] = marked
        return marked

    def drop(self, work: Work) -> None:
        """Forget an update: its last word has come, or its time is over."""
        self._held.pop(work.id, None)
        self._path(work, ".json").unlink(missing_ok=True)
        self._path(work, ".values").unlink(missing_ok=True)
        self.residual(work).unlink(missing_ok=True)

    def drop_expired(self) -> list[Held]:
        """Drop what was held longer than its plan asks; returns it."""
        now = time.time_ns()
        expired = [held for held in self._held.values() if held.expired(now)]
        for held in expired:
            self.drop(held.work)
        return expired

    def outgoing(self, held: Held) -> transfer.Outgoing:
        """The transfer of a held update, read from disk.

        Raises:
            StoreDamaged: The bytes on disk no longer have the digest they had; the update is dropped.
        """
        outgoing = encode_update(held.layout_hash, self._vectors(held), held.head, held.encoding)
        if outgoing.digest != held.digest:
            self.drop(held.work)
            raise StoreDamaged(f"the update held for {held.key} changed on disk; it was dropped and is made again")
        return outgoing

    def _vectors(self, held: Held) -> dict[str, np.ndarray]:
        vectors, offset = {}, 0
        path = self._path(held.work, ".values")
        for spec in held.vectors:
            dtype = np.dtype(spec.dtype).newbyteorder("<")
            values = np.fromfile(path, dtype=dtype, count=spec.num_values, offset=offset)
            vectors[spec.name] = values.astype(spec.dtype, copy=False)
            offset += spec.num_values * dtype.itemsize
        return vectors

    def _record(self, held: Held) -> Held:
        write_durably(self._path(held.work, ".json"), (documents.encode(held),))
        self._held[held.work.id] = held
        return held

    def _path(self, work: Work, suffix: str) -> Path:
        return self.folder / f"{work.id}{suffix}"

    def _remove_strays(self) -> None:
        """Values whose record was never written, and what a crash left half-written."""
        for path in self.folder.iterdir():
            if path.suffix == ".part" or path.stem not in self._held:
                path.unlink(missing_ok=True)


def _read(path: Path) -> Held | None:
    try:
        return documents.decode(path.read_bytes(), Held, f"held update {path.name}")
    except (WireError, OSError):
        return None


def _bytes_of(vector: np.ndarray) -> memoryview:
    """A flat vector's values, little-endian; no copy on the usual machine."""
    return np.ascontiguousarray(vector, vector.dtype.newbyteorder("<")).view(np.uint8).data


def encode_update(
    layout_hash: str, vectors: Mapping[str, np.ndarray], head: UpdateHead, encoding: str = "float32"
) -> transfer.Outgoing:
    """An update as a transfer, from its wire vectors: equal values and head give equal bytes and digest."""
    is_small = sum(vector.nbytes for vector in vectors.values()) <= SMALL_BYTES
    return transfer.Outgoing("update", layout_hash, vectors, documents.encode(head), encoding, keeps_copy=is_small)


class LocalTensors:
    """Tensors with the role ``local``, one set a round and run.

    A round starts from the newest set of an earlier round, so work that is asked again, after a crash or
    in a new attempt, starts from what it started from before.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder / "local")

    def load(self, run: RunId, before_round: int) -> dict[str, np.ndarray]:
        """The newest set of a round below ``before_round``; empty where there is none."""
        rounds = [number for number in self._rounds(run) if number < before_round]
        if not rounds:
            return {}
        path = self._path(run, rounds[-1])
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise StoreDamaged(f"the local tensors in {path} cannot be read ({error}); restore or remove it") from None

    def save(self, run: RunId, round_number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep what a round made, and drop rounds that no task can start from any more."""
        if not arrays:
            return
        make_folder(self.folder / run)
        packed = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
        write_durably(self._path(run, round_number), (packed,))
        for old in [number for number in self._rounds(run) if number <= round_number][:-KEEP_LOCAL_ROUNDS]:
            self._path(run, old).unlink(missing_ok=True)

    def _rounds(self, run: RunId) -> list[int]:
        names = (path.stem for path in (self.folder / run).glob("*.safetensors"))
        return sorted(int(name) for name in names if name.isdigit())

    def _path(self, run: RunId, round_number: int) -> Path:
        return self.folder / run / f"{round_number}.safetensors"
