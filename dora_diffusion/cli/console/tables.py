"""Results on a terminal: rows of name and text, and JSON."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from dora_diffusion import system


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
