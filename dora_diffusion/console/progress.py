"""Progress bars, and lines that never land on one."""

from __future__ import annotations

import sys
from contextlib import closing
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


def step_progress() -> closing[ProgressBar]:
    """A context with a bar over denoising steps, which leaves no line."""
    return closing(ProgressBar("step", leave=False))


def byte_progress(what: str) -> closing[ProgressBar]:
    """A context with a bar in bytes, with the rate and the time left; it leaves no line.

    Args:
        what: What happens to the bytes.
    """
    # What takes less than a second, such as a refusal, shows no bar.
    return closing(ProgressBar("B", desc=what, unit_scale=True, leave=False, delay=1))
