"""Progress: bars on a terminal, or a job's file; and lines that never land on a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Protocol, TextIO


class Sink(Protocol):
    """Receiver of progress: ``phase``, ``done`` of ``total`` in ``unit``, other figures."""

    def __call__(self, **figures: Any) -> None:
        """Receive the figures that have changed."""


_sinks: list[Sink] = []


@contextmanager
def telling(sink: Sink) -> Iterator[None]:
    """Report the progress of commands inside the block to a sink instead of bars."""
    _sinks.append(sink)
    try:
        yield
    finally:
        _sinks.remove(sink)


def tell(**figures: Any) -> None:
    """Report figures to the sinks, see `Sink`; a terminal shows bars and lines, and needs none."""
    for sink in _sinks:
        sink(**figures)


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


class ProgressBar:
    """A progress bar that is told (done, total), and begins where it is told first.

    Args:
        unit: What is counted.
        options: Further keywords of ``tqdm``.
    """

    def __init__(self, unit: str, **options: Any) -> None:
        self._options = {"unit": unit, "dynamic_ncols": True, **options}
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, initial=done, **self._options)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def progress(phase: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (done, total); a bar of it leaves no line.

    Args:
        phase: What is done, in words.
        unit: What is counted; "B" is bytes, with the rate.
    """
    if _sinks:
        tell(phase=phase, unit=unit, done=0, total=0)
        yield lambda done, total: tell(done=done, total=total)
        return
    # What takes less than a second, such as a refusal, shows no bar of bytes.
    options: dict[str, Any] = {"unit_scale": True, "delay": 1} if unit == "B" else {}
    with closing(ProgressBar(unit, desc=phase, leave=False, **options)) as bar:
        yield bar
