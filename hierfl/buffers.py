"""Large arrays whose memory is used again: to touch a fresh 100 MB takes 60 to 130 ms, to copy into a used one 15.

The system gives new pages one by one, zeroed, and takes them back when an array dies; the next round of the same model
then pays for them again. Here the memory of an array that has died, and of every view of it, waits for the next array
of the same size. Nobody gives anything back by hand, so nothing can be used by two.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["POOL", "Pool", "empty", "keep_freed_memory", "zeros"]

LEAST_BYTES = 2**20
"""A smaller array is made as ever: malloc keeps such memory itself."""
KEPT = 4
"""Blocks of a size that wait at most: what one model needs at once."""


class Pool:
    """Blocks of memory that wait, by size; the sizes used last are kept. Safe between threads, and between an array's
    death and anything else.
    """

    def __init__(self, kept: int = KEPT, sizes: int = 4) -> None:
        self._kept, self._sizes = kept, sizes
        self._waiting: dict[int, deque[np.ndarray]] = {}
        self._lock = threading.RLock()  # an array may die, and come back here, in the middle of a call

    @property
    def num_bytes(self) -> int:
        """What waits."""
        with self._lock:
            return sum(size * len(blocks) for size, blocks in self._waiting.items())

    def empty(self, shape: int | Sequence[int], dtype: npt.DTypeLike) -> np.ndarray:
        """An array of any contents, C-contiguous."""
        wanted = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = int(np.prod(shape, dtype=np.int64)) * wanted.itemsize
        if size < LEAST_BYTES:
            return np.empty(shape, wanted)
        lease = _Lease(self._take(size))
        weakref.finalize(lease, self._give_back, lease.block).atexit = False
        array: np.ndarray = np.asarray(lease).view(wanted).reshape(shape)
        return array

    def _take(self, size: int) -> np.ndarray:
        with self._lock:
            blocks = self._waiting.pop(size, deque())
            self._waiting[size] = blocks  # the newest last
            while len(self._waiting) > self._sizes:
                del self._waiting[next(iter(self._waiting))]
            if blocks:
                return blocks.pop()
        return np.empty(size, np.uint8)

    def _give_back(self, block: np.ndarray) -> None:
        with self._lock:
            blocks = self._waiting.get(block.size)
            if blocks is not None and len(blocks) < self._kept:
                blocks.append(block)


class _Lease:
    """What an array of the pool, and each view of it, holds on to."""

    def __init__(self, block: np.ndarray) -> None:
        self.block = block

    @property
    def __array_interface__(self) -> dict[str, Any]:
        interface: dict[str, Any] = self.block.__array_interface__
        return interface


POOL = Pool()
"""The process's own."""


def empty(shape: int | Sequence[int], dtype: npt.DTypeLike) -> np.ndarray:
    """As ``numpy.empty``."""
    return POOL.empty(shape, dtype)


def zeros(shape: int | Sequence[int], dtype: npt.DTypeLike) -> np.ndarray:
    """As ``numpy.zeros``, all of it written now."""
    array = POOL.empty(shape, dtype)
    array.fill(0)
    return array


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_TRIM_BYTES, _MMAP_BYTES = 2**30, 32 * 2**20


def keep_freed_memory() -> None:
    """Let malloc keep up to 1 GiB of what is freed, such as the frames of a transfer, for a program that moves models
    round after round; in one arena, since the others give theirs back whatever they are told. Call it before threads
    start. Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
