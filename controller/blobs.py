"""Large things as files, named by what they contain: models, strategy states, partial aggregates.

A blob is written beside its place, fsynced and renamed into it, so that a name never shows half a file. It is
checked against its name whenever it is read. All controllers of a federation share this directory.

Models are mapped, not read: their pages belong to the system, which takes them back when it needs them, and a model
that is served takes no memory of the process. So a file here may be removed, or another be renamed into its place, at
any time, but is never written to or cut: the mapping of a file that was cut ends the process.

    models/HASH      64 bytes: the layout's hash in hex; then the vectors, little-endian float32, in its order
    layouts/HASH     the layout's canonical bytes
    states/SHA256    safetensors
    partials/DIGEST  the frames of its transfer, as they came, under its digest (``hierfl/wire/framefile.py``)
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hierfl import documents
from hierfl.aggregation import ColumnGroup
from hierfl.errors import DiskFull, NotFound, StorageError, StoreDamaged, ValueOutOfRange, WireError
from hierfl.failpoints import reach
from hierfl.layout import Layout, model_hash
from hierfl.packing import PackedSums
from hierfl.records import PartialHead
from hierfl.steadyfile import SteadyFile
from hierfl.types import Float32Array, ModelHash
from hierfl.wire import digest as digests
from hierfl.wire.framefile import read_frames, write_frames
from hierfl.wire.packed import expect_partial, packed_sums
from hierfl.wire.transfer import Incoming, Outgoing

__all__ = ["ArrivingPartial", "Blobs", "durable_directory", "state_bytes", "storage_errors", "sync_directory"]

LAYOUT_HASH_BYTES = 64
MODELS_MAPPED = 8
"""The models that were stored or asked for last."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class _Mapped(NamedTuple):
    """A model whose file is mapped, and was found right."""

    layout: Layout
    vectors: dict[str, Float32Array]
    outgoing: Outgoing


class Blobs:
    """Blobs under one directory. Methods block: call them in a worker thread where they may be large."""

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        """``read_only``: another process writes here, whose half-written files are left alone."""
        self._directory = directory
        self._mapped: OrderedDict[ModelHash, _Mapped] = OrderedDict()
        self._lock = threading.Lock()
        if read_only:
            return
        for kind in ("models", "layouts", "states", "partials"):
            durable_directory(directory / kind)
        for left in directory.glob("*/.part-*"):
            left.unlink(missing_ok=True)  # of a writer that died: we are the only one now

    # -------------------------------------------------------------- models

    def put_model(self, layout: Layout, vectors: Mapping[str, Float32Array]) -> ModelHash:
        """Store a model and its layout, durably. Storing it again changes nothing."""
        layout.check_vectors(vectors)
        if not self._path("layouts", layout.hash).is_file():
            self._write("layouts", [layout.to_bytes()], layout.hash)
        parts = {vector: np.ascontiguousarray(vectors[vector], dtype="<f4") for vector in layout.vectors}
        outgoing = _transfer(layout, parts)
        with ThreadPoolExecutor(2) as beside:  # hashed, and its digest made, while it is written: each takes its time
            hashed = beside.submit(model_hash, layout, parts)
            digested = beside.submit(outgoing.encode)
            self._write("models", [layout.hash.encode(), *parts.values()], hashed.result)
        name = hashed.result()
        digested.result()
        mapped = self._map(name, layout)
        self._keep(name, _Mapped(layout, mapped, outgoing.over(mapped)))
        return name

    def has_model(self, name: str) -> bool:
        return _is_hash(name) and self._path("models", name).is_file()

    def layout_of(self, name: ModelHash) -> Layout:
        """The layout of a stored model.

        Raises:
            NotFound: No such model here.
            StoreDamaged: The layout's file has another hash than its name.
        """
        if not self.has_model(name):
            raise NotFound("model", name, "upload it first")
        with storage_errors(self._directory), self._path("models", name).open("rb") as file:
            layout_hash = file.read(LAYOUT_HASH_BYTES).decode("ascii", "replace")
        try:
            layout = Layout.from_bytes(self._read("layouts", f"sha256:{layout_hash}"))
        except WireError as error:
            raise StoreDamaged(f"layout {layout_hash} is damaged: {error}; restore {self._directory}") from None
        return layout

    def model(self, name: ModelHash) -> tuple[Layout, dict[str, Float32Array]]:
        """A stored model: its layout, and flat float32 vectors by name, read-only and mapped; checked against its hash
        when it is mapped.

        Raises:
            NotFound: No such model here.
            StoreDamaged: The file is not the model that its name says.
        """
        found = self._find(name)
        return found.layout, dict(found.vectors)

    def model_transfer(self, name: ModelHash) -> Outgoing:
        """A stored model as it is sent: frames are made from its file one by one. Raises as ``model``."""
        return self._find(name).outgoing

    def _find(self, name: ModelHash) -> _Mapped:
        with self._lock:
            found = self._mapped.get(name)
        if found is None:
            layout = self.layout_of(name)
            vectors = self._map(name, layout)
            if model_hash(layout, vectors) != name:
                raise self._damaged(name)
            found = _Mapped(layout, vectors, _transfer(layout, vectors))
            found.outgoing.encode()
        self._keep(name, found)
        return found

    def _keep(self, name: ModelHash, model: _Mapped) -> None:
        with self._lock:
            self._mapped[name] = model
            self._mapped.move_to_end(name)
            while len(self._mapped) > MODELS_MAPPED:
                self._mapped.popitem(last=False)

    def _map(self, name: ModelHash, layout: Layout) -> dict[str, Float32Array]:
        """A model's vectors, as its file has them. Raises ``StoreDamaged`` where that is too short."""
        with storage_errors(self._directory), self._path("models", name).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        vectors, start = {}, LAYOUT_HASH_BYTES
        for vector, size in layout.vectors.items():
            if start + 4 * size > len(mapped):
                raise self._damaged(name)
            vectors[vector] = np.frombuffer(mapped, "<f4", size, start)
            start += 4 * size
        return vectors

    def _damaged(self, name: ModelHash) -> StoreDamaged:
        return StoreDamaged(f"model {name} in {self._directory} is damaged; restore it from a backup")

    # -------------------------------------------------------------- strategy states

    def put_state(self, state: Mapping[str, np.ndarray]) -> str:
        """Store a strategy's state; returns its digest ``sha256:hex``, or ``""`` for a state without arrays."""
        return self._write("states", [state_bytes(state)]) if state else ""

    def state(self, digest: str) -> dict[str, np.ndarray]:
        """A strategy's state by its digest. Raises ``StoreDamaged`` where the file has another one."""
        if not digest:
            return {}
        from safetensors.numpy import load

        return dict(load(self._read("states", digest)))

    # -------------------------------------------------------------- partial aggregates

    @contextmanager
    def arriving_partial(self) -> Iterator[ArrivingPartial]:
        """A partial to be written frame by frame; it is gone afterwards unless it was kept."""
        temporary = self._path("partials", f".part-{uuid.uuid4().hex}")
        with storage_errors(self._directory):
            file = SteadyFile(temporary)
        try:
            yield ArrivingPartial(file, temporary, self._directory)
        finally:
            with storage_errors(self._directory):
                temporary.unlink(missing_ok=True)
                file.close()

    def partial(self, digest: str, groups: tuple[ColumnGroup, ...]) -> PackedSums:
        """A stored partial over ``groups``, packed as it came.

        Raises:
            StoreDamaged: The file is not there, has another digest, or is of other groups.
        """
        with self._partial(digest, groups) as incoming:
            return packed_sums(incoming, groups)

    def partial_head(self, digest: str, groups: tuple[ColumnGroup, ...]) -> tuple[PartialHead, int]:
        """What a stored partial says of itself, and the bytes of its transfer. Raises as ``partial``."""
        with self._partial(digest, groups) as incoming:
            head = documents.decode(incoming.meta, PartialHead, "partial head")
            return head, sum(map(len, incoming.frames))

    @contextmanager
    def _partial(self, digest: str, groups: tuple[ColumnGroup, ...]) -> Iterator[Incoming]:
        """A stored partial's transfer; what is wrong with it is ``StoreDamaged``."""
        name = digest.partition(":")[2]
        try:
            with storage_errors(self._directory), _found("partials", name, self._directory):
                incoming = read_frames(self._path("partials", name), expect_partial(groups, None, digest))
            yield incoming
        except (WireError, ValueOutOfRange) as error:
            raise StoreDamaged(
                f"partials/{name} in {self._directory} is damaged ({error}); restore it from a backup"
            ) from None

    # -------------------------------------------------------------- files

    def _path(self, kind: str, name: str) -> Path:
        return self._directory / kind / name

    def _write(self, kind: str, parts: Iterable[Any], name: str | Callable[[], str] = "", alg: str = "sha256") -> str:
        """Write durably under ``name``, or the hex of the content's digest if none is given; returns the digest.

        A ``name`` that is still being made is asked for once all is written.
        """
        temporary = self._path(kind, f".part-{uuid.uuid4().hex}")
        state = digests.new(alg)
        with storage_errors(self._directory):
            try:
                with SteadyFile(temporary) as file:
                    for part in parts:
                        if not name:
                            state.update(memoryview(part).cast("B"))
                        file.write(part)
                    file.sync()
                named = name() if callable(name) else name
                reach("controller.blob")
                temporary.replace(self._path(kind, named or state.hexdigest()))
                sync_directory(self._directory / kind)
            finally:
                temporary.unlink(missing_ok=True)
        return f"{alg}:{state.hexdigest()}"

    def _read(self, kind: str, digest: str) -> bytes:
        """A whole file, checked against the digest that names it."""
        alg, _, name = digest.partition(":")
        with storage_errors(self._directory), _found(kind, name, self._directory):
            data = self._path(kind, name).read_bytes()
        state = digests.new(alg)
        state.update(data)
        if state.hexdigest() != name:
            raise StoreDamaged(f"{kind}/{name} in {self._directory} is damaged; restore it from a backup")
        return data


class ArrivingPartial:
    """See ``Blobs.arriving_partial``. Methods block."""

    def __init__(self, file: SteadyFile, temporary: Path, directory: Path) -> None:
        self._file, self._temporary, self._directory = file, temporary, directory

    def write(self, frame: bytes) -> None:
        """Append the next frame.

        Raises:
            DiskFull, StorageError: It cannot be written.
        """
        with storage_errors(self._directory):
            write_frames(self._file, (frame,))

    def keep(self, digest: str) -> None:
        """All frames are there and have this digest: make them durable under its name."""
        kind = self._directory / "partials"
        with storage_errors(self._directory):
            self._file.sync()
            reach("controller.accept")
            self._temporary.replace(kind / digest.partition(":")[2])
            sync_directory(kind)


def state_bytes(state: Mapping[str, np.ndarray]) -> bytes:
    """A strategy's state as it is stored; its digest names it."""
    from safetensors.numpy import save

    return bytes(save({name: np.asarray(state[name], order="C") for name in sorted(state)}))


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn the system's errors into ours: ``DiskFull`` where there is no room, else ``StorageError``."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(f"no space left for {where}: make room and resume the run") from None
        raise StorageError(f"{where}: {error.strerror or error}") from None


@contextmanager
def _found(kind: str, name: str, directory: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise StoreDamaged(f"{kind}/{name} is missing in {directory}; restore it") from None


def durable_directory(path: Path) -> None:
    """Make a directory that outlives a crash."""
    with storage_errors(path):
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and links in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _transfer(layout: Layout, vectors: Mapping[str, Float32Array]) -> Outgoing:
    return Outgoing("model", layout.hash, vectors, meta=layout.to_bytes(), keeps_copy=False)


def _is_hash(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")
