"""Encodings by name. A built-in one is a line here; others register in the entry-point group ``hierfl.encodings``.

A registered one has to be installed at the controller, the combiners and the sites: whoever lacks it declines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from hierfl.encodings.base import Encoding
from hierfl.encodings.bfloat16 import BFloat16
from hierfl.encodings.blocks import Int8
from hierfl.encodings.plain import Float32
from hierfl.encodings.sparse import RandomK, TopK
from hierfl.registry import Registry

__all__ = ["EncodingSpec", "get", "names", "spec"]

BUILT_IN: Mapping[str, type[Encoding]] = {
    "bfloat16": BFloat16,
    "float32": Float32,
    "int8": Int8,
    "randomk": RandomK,
    "topk": TopK,
}

_ENCODINGS: Registry[Encoding] = Registry(
    noun="encoding",
    group="hierfl.encodings",
    table="updates",
    key="encoding",
    needs="encode",
    built_in=BUILT_IN,
)

names, get = _ENCODINGS.names, _ENCODINGS.get


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodingSpec:
    """An encoding as a plan names it: with every option, also those that the job left at their defaults."""

    name: str = "float32"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def spec(name: str, options: Mapping[str, object] | None = None) -> EncodingSpec:
    """The spec of an encoding. Raises ``ConfigError`` as ``get`` does."""
    encoding = get(name, options)
    return EncodingSpec(name=name, options=dataclasses.asdict(cast("Any", encoding)))
