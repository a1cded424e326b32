"""Paths in the settings file of a run: relative to the file where they move together with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dora_diffusion.config.fields import require
from dora_diffusion.config.file import PATHS
from dora_diffusion.config.train import settings

RELATIVE = "relative to this file"


def relative_paths(values: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Settings, with paths as a file in a folder holds them.

    What is in the folder, or in the folder around it, is relative to it and begins with a dot. Any
    other path is absolute, and the name of a model of the hub stays.
    """
    start = Path(os.path.abspath(folder))

    def relative(name: str, value: str) -> str:
        path = Path(value).expanduser()
        if not (path.exists() or name.endswith("_dir")):
            return value
        path = Path(os.path.abspath(path))
        if not path.is_relative_to(start.parent):
            return str(path)
        text = Path(os.path.relpath(path, start)).as_posix()
        return text if text.split("/")[0] in (".", "..") else f"./{text}"

    return _with_paths(values, relative)


def resolve_paths(values: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Settings of a file, with the paths that `relative_paths` made relative to its folder.

    Raises:
        ConfigError: If the file says something else of its paths.
    """
    values = dict(values)
    meaning = values.pop(PATHS, None)
    require(
        meaning in (None, RELATIVE),
        f"{PATHS} is {meaning!r}; write '{PATHS}: {RELATIVE}', or leave the line out",
    )

    def resolved(name: str, value: str) -> str:
        is_relative = value.split("/")[0] in (".", "..")
        return os.path.normpath(Path(folder) / value) if is_relative else value

    return values if meaning is None else _with_paths(values, resolved)


def _with_paths(values: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """Settings with their paths changed, those of a dataset's entries too."""
    names = {setting.name for setting in settings() if setting.is_path}

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [_with_paths(e, change) if isinstance(e, Mapping) else e for e in value]
        return change(name, value) if value and isinstance(value, str) else value

    return {n: changed(n, value) if n in names else value for n, value in values.items()}
