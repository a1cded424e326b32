"""Names and bytes on disk. Imports no model code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def facts(file: str) -> Any:
    """The tables of a data file of this room, such as ``names/names.yaml``."""
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    # The loader in C is ten times as fast: every --help waits for it.
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
