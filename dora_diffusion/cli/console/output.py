"""Output of commands: lines, rows and JSON, and progress as bars or in a job's file.

`say` prints lines above a progress bar.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, TextIO

from dora_diffusion import system

Sink = Callable[..., None]
"""Receiver of changed figures of progress: ``phase``, ``done`` of ``total`` in ``unit``, others."""

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
    """Report figures to all sinks (see `Sink`). A terminal has none: it shows bars and lines."""
    for sink in _sinks:
        sink(**figures)


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line, above any progress bar.

    Args:
        line: The text.
        file: Default: standard output.
    """
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:  # Without tqdm there cannot be a bar.
        print(line, file=file or sys.stdout, flush=True)
    else:
        tqdm.tqdm.write(line, file=file or sys.stdout)


class ProgressBar:
    """Progress bar, called with (done, total). It starts at the first call's ``done``.

    Args:
        unit: Unit of the count.
        options: Further keyword arguments of ``tqdm``.
    """

    def __init__(self, unit: str, **options: Any) -> None:
        self._options = {"unit": unit, "dynamic_ncols": True, **options}
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Update the bar."""
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
    """Yield a function to call with (done, total). Its bar is erased at the end.

    Args:
        phase: Description of the work.
        unit: Unit of the count; "B" is bytes, with the rate.
    """
    if _sinks:
        tell(phase=phase, unit=unit, done=0, total=0)
        yield lambda done, total: tell(done=done, total=total)
        return
    # Bars of bytes appear after a second, so that an early error shows none.
    options: dict[str, Any] = {"unit_scale": True, "delay": 1} if unit == "B" else {}
    with closing(ProgressBar(unit, desc=phase, leave=False, **options)) as bar:
        yield bar


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print names in one column and texts in the other, wrapped to the terminal."""
    indent = max(len(name) for name, _ in rows) + 2
    width = min(shutil.get_terminal_size().columns, 120)
    for name, text in rows:
        first, *rest = textwrap.wrap(text, max(width - indent, 40)) or [""]
        print(f"{name:<{indent}}{first}".rstrip())
        for line in rest:
            print(" " * indent + line)


def rows_text(rows: Sequence[tuple[str, str]]) -> str:
    """Return names in one column and texts in the other; repeated names are left blank."""
    indent = max(len(name) for name, _ in rows) + 2
    names = [name for name, _ in rows]
    labels = [
        "" if name == before else name for name, before in zip(names, ["", *names], strict=False)
    ]
    return "\n".join(
        f"{name:<{indent}}{text}" for name, (_, text) in zip(labels, rows, strict=True)
    )


def print_json(value: Any) -> None:
    """Print a value as JSON for scripts; types that JSON lacks, such as paths, become text."""
    print(json.dumps(value, indent=2, default=str))


_PLAIN = re.compile(r"[\w./:\\=+-]+")


def shown_command(lines: Sequence[Iterable[object]], environment: str = "") -> str:
    r"""Return a command for a POSIX shell, or for PowerShell on Windows.

    Args:
        lines: The words of each line.
        environment: An environment variable to set, as ``NAME=VALUE``.

    Example:
        >>> print(shown_command([["python", "app.py"], ["--auth", "Ann B:pass word"]]))
        python app.py \
            --auth 'Ann B:pass word'
    """
    quote, end = (_powershell, "`") if system.is_windows() else (shlex.quote, "\\")
    if environment and system.is_windows():
        name, _, value = environment.partition("=")
        environment = f"$env:{name} = {_powershell(value)};"
    first = f"{environment} " if environment else ""
    text = (" ".join(quote(str(word)) for word in words) for words in lines)
    return first + f" {end}\n    ".join(text)


def _powershell(word: str) -> str:
    return word if _PLAIN.fullmatch(word) else "'" + word.replace("'", "''") + "'"
