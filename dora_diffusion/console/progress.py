"""Progress bars, and lines that never land on one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line, above any progress bar.

    Args:
        line: What to print.
        file: Default: standard output.
    """
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:  # then there is no bar
        print(line, file=file or sys.stdout, flush=True)
    else:
        tqdm.tqdm.write(line, file=file or sys.stdout)


@contextmanager
def step_progress() -> Iterator[Callable[[int, int], None]]:
    """Yield what to call with (steps done, steps in all)."""
    with counting("step", leave=False) as show:
        yield show


@contextmanager
def counting(unit: str, *, leave: bool, description: str = "") -> Iterator[Callable[..., None]]:
    """A bar over (done, total)."""
    counter = Counter(unit, leave=leave, description=description)
    try:
        yield counter
    finally:
        counter.close()


class Counter:
    """A progress bar that is told (done, total), and begins where it is told first."""

    def __init__(self, unit: str, *, leave: bool = True, description: str = "") -> None:
        self._options = {"unit": unit, "leave": leave, "desc": description or None}
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, initial=done, dynamic_ncols=True, **self._options)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()
