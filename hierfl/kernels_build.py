"""Kernels as machine code: without the GIL, no fastmath, from numba's cache where a directory can be written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

__all__ = ["Form", "build"]

K = TypeVar("K")


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


class Form(Generic[K]):
    """Which form of a module's kernels runs: NumPy's, and after a successful ``warm_up()`` the compiled one."""

    def __init__(self, numpy: K, make: Callable[[Any], K]) -> None:
        """``make``: compiles all of them, one specialisation each; gets ``numba.types``."""
        self.in_use, self._numpy, self._make = numpy, numpy, functools.cache(make)

    def compiled(self) -> K | None:
        """The kernels as machine code; None where numba is not installed."""
        try:
            import numba
        except ImportError:
            return None
        return self._make(numba.types)

    def active(self) -> K:
        """The kernels in use."""
        return self.in_use

    def warm_up(self) -> bool:
        """Compile the kernels, or load them from numba's cache, and use them from now on; whether they are compiled."""
        kernels = self.compiled()
        self.in_use = kernels or self._numpy
        return kernels is not None
