"""Features from outside in a run: copies of their files, and errors of their code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.features.outside import place_in
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.training.metrics import TrainingError


def digests_of(config: TrainConfig) -> dict[str, str]:
    """Return the SHA-256 of the file of each feature from outside, by name."""
    texts = type(config).files.items()
    return {file.name: hashlib.sha256(text.encode()).hexdigest() for file, text in texts}


def copied(config: TrainConfig, folder: Path) -> TrainConfig:
    """Copy the files of features from outside to a folder. Returns the settings with the copies."""
    for file, text in type(config).files.items():
        save_text(folder / file.name, text)
    copies = [str(folder / file.name) for file in type(config).files]
    return replace(config, feature=copies) if copies else config


@contextmanager
def naming_features(config: TrainConfig) -> Iterator[None]:
    """Name the file and the line of a feature from outside in an error that it raises.

    Raises:
        TrainingError: Instead of the error.
    """
    try:
        yield
    except Exception as error:
        if place := place_in(type(config).files, error):
            raise TrainingError(f"feature {place}") from error
        raise
