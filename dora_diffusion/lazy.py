"""Packages whose public names are imported when they are first used."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

_IMPORT = re.compile(r"from dora_diffusion\.([\w.]+) import \(?\s*(\w+) as")


def lazy_names(package: str, file: str) -> tuple[dict[str, str], Callable[[str], object]]:
    """Return the homes of a package's names, which its stub lists, and its ``__getattr__``.

    Args:
        package: Name of the package.
        file: Its ``__init__.py``; type checkers read the stub next to it.
    """
    stub = Path(file).with_suffix(".pyi").read_text(encoding="utf-8")
    homes = dict(sorted((name, home) for home, name in _IMPORT.findall(stub)))

    def find(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"dora_diffusion.{homes[name]}"), name)

    return homes, find
