"""Paths in the settings file of a run: relative to the file where they move together with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_diffusion.config.train import settings


def relative_paths(values: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Settings, with paths as a file in a folder holds them; `resolve_paths` reads them.

    What is in the folder, or in the folder around it, is relative to it and begins with ``./`` or
    ``../``. Any other path is absolute, and the name of a model of the hub stays.
    """
    names = {setting.name for setting in settings() if setting.is_path}
    start = Path(os.path.abspath(folder))

    def written(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [{n: written(n, v) for n, v in entry.items()} for entry in value]
        path = Path(value).expanduser() if isinstance(value, str) and value else None
        if path is None or name not in names or not (path.exists() or name.endswith("_dir")):
            return value
        path = Path(os.path.abspath(path))
        if not path.is_relative_to(start.parent):
            return str(path)
        text = Path(os.path.relpath(path, start)).as_posix()
        return {".": "./", "..": "../"}.get(text, text if text.startswith("../") else f"./{text}")

    moved = {name: written(name, value) for name, value in values.items() if name in names}
    return {**values, **moved}
