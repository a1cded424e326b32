"""Where a pipeline lies: a Diffusers folder, or the one in the folder of a run."""

from __future__ import annotations

from pathlib import Path

PIPELINE_NAME = "model"
"""Folder of the model in that of a run of full fine-tuning."""


def pipeline_in(folder: Path) -> Path | None:
    """The pipeline that a folder is, or that a run of full fine-tuning left in it; else None."""
    places = (folder, folder / PIPELINE_NAME)
    return next((place for place in places if (place / "model_index.json").is_file()), None)
