"""A received model is what its hash says, or it is refused. Hashed chunk by chunk, on the received frames."""

from __future__ import annotations

import hashlib

from hierfl.errors import DigestMismatch, LayoutMismatch
from hierfl.layout import MODEL_HASH_CONTEXT, Layout
from hierfl.types import ModelHash
from hierfl.wire.transfer import Incoming

__all__ = ["check_model", "hash_of", "layout_of"]


def layout_of(incoming: Incoming) -> Layout:
    """The layout that a transfer of kind "model" came with.

    Raises:
        LayoutMismatch: It has another hash than the transfer says, or other vectors than it holds.
        WireError: It is no layout.
    """
    layout = Layout.from_bytes(incoming.meta)
    descriptor = incoming.descriptor
    if layout.hash != descriptor.layout_hash:
        raise LayoutMismatch(f"model: its layout is {layout.hash[:12]}, its header says {descriptor.layout_hash[:12]}")
    held = [(spec.name, spec.dtype, spec.num_values) for spec in descriptor.vectors]
    if held != [(name, "float32", size) for name, size in layout.vectors.items()]:
        raise LayoutMismatch("model: its vectors are not those of its layout")
    return layout


def hash_of(incoming: Incoming) -> ModelHash:
    """The model's identity (``hierfl.layout.model_hash``) of a complete transfer.

    Raises:
        LayoutMismatch, WireError: As ``layout_of``.
    """
    state = hashlib.sha256(MODEL_HASH_CONTEXT + bytes.fromhex(layout_of(incoming).hash))
    for chunks in incoming.chunks.values():
        for chunk in chunks:
            state.update(chunk.data)
    return ModelHash(state.hexdigest())


def check_model(incoming: Incoming, model_hash: str) -> None:
    """Refuse a model that is another than the one asked for.

    Raises:
        DigestMismatch: Another hash.
        LayoutMismatch, WireError: As ``layout_of``.
    """
    found = hash_of(incoming)
    if found != model_hash:
        raise DigestMismatch(f"model: {model_hash[:12]} was asked for, {found[:12]} came; fetch it again")
