"""Output of commands: lines, rows and JSON; and progress, as bars or in a job's file.

A line of `say` never lands on a bar.
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
from typing import Any, Protocol, TextIO

from dora_diffusion import system


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
    """Names in one column and texts in the other, each on one line; a name said once."""
    indent = max(len(name) for name, _ in rows) + 2
    names = [name for name, _ in rows]
    shown = [
        "" if name == before else name for name, before in zip(names, ["", *names], strict=False)
    ]
    return "\n".join(f"{name:<{indent}}{text}" for name, (_, text) in zip(shown, rows, strict=True))


def print_json(value: Any) -> None:
    """Print a report for scripts; what JSON does not have, such as a path, as text."""
    print(json.dumps(value, indent=2, default=str))


_PLAIN = re.compile(r"[\w./:\\=+-]+")


def shown_command(lines: Sequence[Iterable[object]], environment: str = "") -> str:
    r"""A command for a POSIX shell; on Windows for PowerShell.

    Args:
        lines: Its words, as they are to be broken into lines.
        environment: A variable that it needs, as ``NAME=VALUE``.

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
