"""Kernels as machine code: without the GIL, no fastmath, from numba's cache where a directory can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

__all__ = ["build"]


def build(function: Callable[..., int], *arguments: object, **options: Any) -> Callable[..., int]:
    """``function``, which returns an int64, compiled for arguments of these numba types.

    ``options`` are numba's. The cache is beside the function's file, in the user's cache directory, or in
    ``NUMBA_CACHE_DIR``; where none of these can be written it is compiled anew, in about a second.
    """
    import numba

    signature = numba.types.int64(*arguments)
    try:
        return cast("Callable[..., int]", numba.njit(signature, nogil=True, cache=True, **options)(function))
    except RuntimeError:  # no directory to cache in
        return cast("Callable[..., int]", numba.njit(signature, nogil=True, **options)(function))
