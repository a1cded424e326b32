"""Work spread over threads that compute with one core each.

A matrix product of BLAS may differ in its last bits with the number of threads that share it. What
one thread computes alone does not, and many small products run faster side by side than each of
them split up.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_WORKERS = 4


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let this thread, and those that start inside, compute with one core each."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def map_ahead(
    make: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """Call ``make`` for each item in threads, a few ahead of their use; results keep the order."""
    # One more than there are cores: some of them wait for the disk.
    workers = min(_MOST_WORKERS, (os.cpu_count() or 1) + 1)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(workers)
    with one_thread():
        try:
            for item in items:
                waiting.append((item, pool.submit(make, item)))
                if len(waiting) > workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
