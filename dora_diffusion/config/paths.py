"""Paths in the settings file of a run; paths near the file are relative to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_diffusion.config.train import settings


def relative_paths(values: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Rewrite the paths of settings for a file in a folder; the inverse of `resolve_paths`.

    Paths inside the folder or its parent become relative to the folder and begin with ``./`` or
    ``../``. Other paths become absolute. Hub ids are kept.
    """
    names = {setting.name for setting in settings() if setting.is_path}
    start = Path(os.path.abspath(folder))

    def rewrite(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [{n: rewrite(n, v) for n, v in entry.items()} for entry in value]
        path = Path(value).expanduser() if isinstance(value, str) and value else None
        if path is None or name not in names or not (path.exists() or name.endswith("_dir")):
            return value
        path = Path(os.path.abspath(path))
        if not path.is_relative_to(start.parent):
            return str(path)
        text = Path(os.path.relpath(path, start)).as_posix()
        return {".": "./", "..": "../"}.get(text, text if text.startswith("../") else f"./{text}")

    rewritten = {name: rewrite(name, value) for name, value in values.items() if name in names}
    return {**values, **rewritten}
