"""Commands to be pasted, in the words of the shell that a system has."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from dora_diffusion import system

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
