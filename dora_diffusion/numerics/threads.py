"""Parallel work in threads that use one core each.

The last bits of a matrix product may depend on the number of threads of BLAS. With one thread per
product, results are reproducible, and many small products are faster.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_WORKERS = 4


class SharedSwitch:
    """Context for a process-wide setting that several threads may change at once.

    The first thread changes the setting, and the last one to leave restores it.

    Args:
        switch: Changes the setting, and returns a function that restores it; None if no change is
            needed. It is called again for the next thread then.
    """

    def __init__(self, switch: Callable[[], Callable[[], None] | None]) -> None:
        self._switch = switch
        self._lock = threading.Lock()
        self._users = 0
        self._restore: Callable[[], None] | None = None

    def __enter__(self) -> None:
        """Change the setting, unless another thread has changed it."""
        with self._lock:
            if self._restore is None:
                self._restore = self._switch()
            self._users += 1

    def __exit__(self, *error: object) -> None:
        """Restore the setting, unless another thread is inside."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._restore is not None:
                self._restore()
                self._restore = None


def _limit_cores() -> Callable[[], None] | None:
    """Limit this thread and new ones to one core, if they have more."""
    before = torch.get_num_threads()
    if before == 1:
        return None
    torch.set_num_threads(1)
    return partial(torch.set_num_threads, before)


_ONE_CORE = SharedSwitch(_limit_cores)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit this thread, and threads that start inside the block, to one core each."""
    before = torch.get_num_threads()
    with _ONE_CORE:
        try:
            torch.set_num_threads(1)
            yield
        finally:
            if before != 1:
                torch.set_num_threads(before)
                # The call also affects new threads, which have one core while another thread is
                # inside. Calling it in another thread resets that without affecting this thread.
                thread = threading.Thread(target=torch.set_num_threads, args=(1,))
                thread.start()
                thread.join()


def map_ahead(
    make: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """Call ``make`` for each item in threads, a few items ahead. Yields results in order."""
    # One more than the number of cores, since some threads wait for the disk.
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
