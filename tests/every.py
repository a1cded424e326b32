"""One test of many trivial cases: all that fail are named, and none costs a test's set-up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest


@contextlib.contextmanager
def every() -> Iterator[Callable[[object], AbstractContextManager[None]]]:
    """Run the cases of a loop to its end, and fail with the names of those that do not hold.

    Example:
        >>> with every() as case:
        ...     for name in ("rank", "seed"):
        ...         with case(name):
        ...             assert name.islower()

    Raises:
        AssertionError: If a case failed, with its name and why.
    """
    failed: dict[str, BaseException] = {}
    count = 0

    @contextlib.contextmanager
    def case(name: object) -> Iterator[None]:
        nonlocal count
        count += 1
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            failed[str(name)] = error

    yield case
    assert count, "there was no case"
    if failed:
        lines = [f"{name}: {type(e).__name__}: {e}" for name, e in failed.items()]
        text = f"{len(failed)} of {count} cases fail:\n" + "\n".join(lines)
        raise AssertionError(text) from next(iter(failed.values()))
