"""Index of a pipeline's folder: the classes of the pipeline and of its components."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Indexes of Diffusers' pipelines, and of those that are built of blocks.
INDEXES = ("model_index.json", "modular_model_index.json")


def index_file(folder: Path | str) -> Path:
    """Return the index of a pipeline's folder; without one, the path of a usual index."""
    files = [Path(folder, name) for name in INDEXES]
    return next(filter(Path.is_file, files), files[0])


def is_pipeline(folder: Path | str) -> bool:
    """Return whether a folder is that of a pipeline."""
    return index_file(folder).is_file()


def component_classes(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the class names of a pipeline's components, by the content of its index.

    A modular index has a third value, which names the class of a component that was not loaded when
    the index was written.
    """
    classes = dict[str, str]()
    for name, value in index.items():
        if isinstance(value, list):
            hint = value[2].get("type_hint") if value[1] is None and len(value) > 2 else None
            classes[name] = hint[1] if hint else value[1]
    return classes
