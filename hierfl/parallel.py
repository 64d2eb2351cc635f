"""A few threads for work that touches every value of a model: parts that share nothing, so that no bit depends on them.

What they run has to release the GIL: kernels, NumPy, digests.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["each", "threads"]

Part = TypeVar("Part")
Result = TypeVar("Result")

MAX_THREADS = 8
"""More would wait for memory."""


def threads() -> int:
    """How many there are."""
    return min(MAX_THREADS, os.cpu_count() or 1)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads(), "parallel")


def each(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """``work`` done to each part, in any order and on several threads; results in the order of ``parts``.

    Not to be called from within ``work``. The first error is raised once all parts are done.
    """
    if len(parts) < 2:
        return [work(part) for part in parts]
    started = [_pool().submit(work, part) for part in parts]
    for future in started:
        future.exception()
    return [future.result() for future in started]
