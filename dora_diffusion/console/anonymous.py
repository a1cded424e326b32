"""Texts for others to read, without the names of this machine's people and of the machine."""

from __future__ import annotations

import getpass
import os
import platform
import re
from pathlib import Path

_CASE = re.IGNORECASE if os.name == "nt" else re.RegexFlag(0)


def without_names(text: str) -> str:
    """The text with ``~`` for the home folder, and other folders called as the user is hidden.

    Example:
        >>> without_names(f"{Path.home()}/models")
        '~/models'
    """
    for home in sorted(_homes(), key=len, reverse=True):
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text, flags=_CASE)
    for name in _names():
        # As a part of a path only: some users are called as words of a sentence are.
        text = re.sub(rf"(?<=[/\\]){re.escape(name)}(?![\w.-])", "NAME", text, flags=_CASE)
    return text


def _homes() -> set[str]:
    """The home folder as it may be written; not where it is the root of the disk."""
    home = Path(os.path.expanduser("~"))
    paths = [path for path in (home, Path(os.path.realpath(home))) if path.parent != path]
    return {form for path in paths for form in (str(path), path.as_posix())}


def _names() -> set[str]:
    """What the user and the machine are called."""
    try:
        user = getpass.getuser()
    except (ImportError, KeyError, OSError):  # nobody knows this process's user
        user = ""
    return {user, Path(os.path.expanduser("~")).name, platform.node()} - {""}
