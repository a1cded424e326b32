"""Work spread over threads that compute with one core each.

A matrix product of BLAS may differ in its last bits with the number of threads that share it. What
one thread computes alone does not, and many small products run faster side by side than each of
them split up.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_WORKERS = 4


class SharedSwitch:
    """A setting of the whole process that several threads want otherwise at once, as a context.

    The first one that needs to sets it, and the last one to leave restores it.

    Args:
        switch: Sets it, and returns what restores it; None if it is as wanted.
    """

    def __init__(self, switch: Callable[[], Callable[[], None] | None]) -> None:
        self._switch = switch
        self._lock = threading.Lock()
        self._users = 0
        self._restore: Callable[[], None] | None = None

    def __enter__(self) -> None:
        """Set it, unless it is set."""
        with self._lock:
            if self._restore is None:
                self._restore = self._switch()
            self._users += 1

    def __exit__(self, *error: object) -> None:
        """Restore it, unless another thread is inside."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._restore is not None:
                self._restore()
                self._restore = None


class _Cores:
    """Number of cores that torch's threads compute with: one, while anybody wants that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._outside = 1

    def enter(self) -> int:
        """Limit this thread, and new ones, to one core. Returns what this one had."""
        with self._lock:
            before = torch.get_num_threads()
            self._outside = max(before, self._outside if self._users else 1)
            self._users += 1
            if before != 1:
                torch.set_num_threads(1)
        return before

    def leave(self, before: int) -> None:
        """Restore this thread's cores; those of new ones too, where nobody else is inside."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._outside != 1:
                torch.set_num_threads(self._outside)
            elif self._users and before != 1:
                torch.set_num_threads(before)
                # That was for new threads too, which are to have one still: who sets it sets its
                # own, so that another thread does.
                other = threading.Thread(target=torch.set_num_threads, args=(1,))
                other.start()
                other.join()


_CORES = _Cores()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit this thread, and those that start inside, to one core each."""
    before = _CORES.enter()
    try:
        yield
    finally:
        _CORES.leave(before)


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
