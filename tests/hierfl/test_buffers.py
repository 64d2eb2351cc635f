"""Memory of arrays that have died is used again, and never while a view of it lives."""

from __future__ import annotations

import gc
import threading

import numpy as np

from hierfl.buffers import LEAST_BYTES, Pool, keep_freed_memory

SIZE = LEAST_BYTES // 4
"""float32 values of the smallest array that the pool keeps."""


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_the_memory_of_an_array_that_died_is_used_again():
    pool = Pool()
    first = pool.empty(SIZE, np.float32)
    where = address(first)
    assert pool.num_bytes == 0
    del first
    assert pool.num_bytes == LEAST_BYTES
    again = pool.empty((2, SIZE // 2), np.float32)
    assert address(again) == where
    assert again.shape == (2, SIZE // 2)
    assert again.flags.c_contiguous
    assert again.flags.writeable


def test_a_view_keeps_its_memory_from_being_used_again():
    pool = Pool()
    array = pool.empty(SIZE, np.float32)
    view = array[10:20].view(np.int32).reshape(2, 5)
    buffer = memoryview(array[5:6])
    where = address(array)
    del array
    assert pool.num_bytes == 0
    assert address(pool.empty(SIZE, np.float32)) != where
    del view
    assert address(pool.empty(SIZE, np.float32)) != where
    buffer.release()
    del buffer
    gc.collect()
    held = [pool.empty(SIZE, np.float32) for _ in range(2)]
    assert where in {address(one) for one in held}


def test_small_arrays_are_not_kept():
    pool = Pool()
    del (small := {"array": pool.empty(SIZE - 1, np.float32)})["array"]
    assert not small
    assert pool.num_bytes == 0


def test_what_waits_is_bounded_by_size_and_by_number_of_sizes():
    pool = Pool(kept=2, sizes=2)
    arrays = [pool.empty(SIZE, np.float32) for _ in range(5)]
    del arrays
    assert pool.num_bytes == 2 * LEAST_BYTES
    others = [pool.empty(SIZE * n, np.float32) for n in (2, 3)]  # two newer sizes: the first is forgotten
    assert pool.num_bytes == 0
    del others
    assert pool.num_bytes == 5 * LEAST_BYTES


def test_threads_never_share_memory():
    pool = Pool()

    def work(number: int) -> None:
        for _ in range(200):
            array = pool.empty(SIZE, np.int32)
            array[:100] = number
            assert (array[:100] == number).all()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    errors: list[BaseException] = []
    threading.excepthook, before = lambda told: errors.append(told.exc_value), threading.excepthook
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = before
    assert not errors


def test_keeping_freed_memory_can_be_asked_for_again():
    keep_freed_memory()
    keep_freed_memory()
