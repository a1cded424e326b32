"""Names of files and folders: those made from users' words, and where a pipeline lies."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

PIPELINE_NAME = "model"
"""Folder of the model in that of a run of full fine-tuning."""
_LONGEST = 60
# Windows keeps them for devices, whatever suffix they have.
_DEVICE = re.compile(r"con|nul|aux|prn|com\d|lpt\d")


def file_stem(words: str, default: str) -> str:
    """Words as the first part of a file's name: small ASCII letters and digits, joined by "-".

    Letters lose their accents, and what is left of none is ``default``.

    Example:
        >>> file_stem("sks Käthe's mug: 1/2?", "subject"), file_stem("猫", "subject")
        ('sks-kathe-s-mug-1-2', 'subject')
        >>> file_stem("con", "subject")
        'con-subject'
    """
    letters = unicodedata.normalize("NFKD", words.casefold()).encode("ascii", "ignore").decode()
    stem = re.sub("[^a-z0-9]+", "-", letters).strip("-")[:_LONGEST].rstrip("-") or default
    return f"{stem}-{default}" if _DEVICE.fullmatch(stem) else stem


def pipeline_in(folder: Path) -> Path | None:
    """The pipeline that a folder is, or that a run of full fine-tuning left in it; else None."""
    places = (folder, folder / PIPELINE_NAME)
    return next((place for place in places if (place / "model_index.json").is_file()), None)
