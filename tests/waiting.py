"""Waiting for what happens, on a machine as slow as it may be.

A test waits for an event, never for a time in which a machine should be ready. What may hang (a
process, a page, a lock) is waited for until `WAIT_SECONDS`, which tells a hang from a machine that
does ten other things. `tools/rules/suite.py` finds every other limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

WAIT_SECONDS = float(os.environ.get("WAIT", 900))
"""Seconds after which a wait is given up; WAIT=60 for who looks at a test that hangs."""
PAUSE_SECONDS = 0.1


class Clock:
    """Time that stands still until a test turns it: in the place of the module `time` of others.

    Attributes:
        now: Seconds that it shows.
        step: Seconds that each look at it takes.
        slept: Seconds of each sleep; none takes any real time.
    """

    def __init__(self, now: float = 1.8e9) -> None:
        self.now, self.step, self.slept = now, 0.0, list[float]()

    def time(self) -> float:
        self.now += self.step
        return self.now

    monotonic = perf_counter = time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)  # localtime, strftime


STAY = f"import time; print('ready', flush=True); time.sleep({WAIT_SECONDS})"
"""Code of a process that must be there until a test ends it."""


def wait_until(
    look: Callable[[], Any],
    check: Callable[[], object] = lambda: None,
    moved: Callable[[], object] = lambda: None,
) -> Any:
    """Look until there is something to see, and return it.

    Args:
        look: Returns something true when what is waited for is there.
        check: Raises AssertionError when it can no longer come.
        moved: Returns something else when anything has moved: the wait starts again then.

    Raises:
        AssertionError: If nothing has moved for `WAIT_SECONDS`.
    """
    before, since = moved(), time.monotonic()
    while not (found := look()):
        check()
        if (now := moved()) != before:
            before, since = now, time.monotonic()
        assert time.monotonic() - since < WAIT_SECONDS, f"nothing moves any more: {now}"
        time.sleep(PAUSE_SECONDS)
    return found
