"""Features from outside in a run: copies of their files, and errors of their code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.features.outside import place_in
from dora_diffusion.config.train import using
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.training.metrics import TrainingError


def digests_of(config: TrainConfig) -> dict[str, str]:
    """Return the SHA-256 of the file of each feature from outside, by name."""
    texts = type(config).files.items()
    return {file.name: hashlib.sha256(text.encode()).hexdigest() for file, text in texts}


def copied(config: TrainConfig, folder: Path) -> TrainConfig:
    """Copy the files of features from outside to a folder. Returns settings that name the copies.

    A class has no file: the settings have its name, so that readers of the run see it.
    """
    names = [*type(config).classes]
    for file, text in type(config).files.items():
        names.append(str(save_text(folder / file.name, text)))
    return replace(config, feature=names) if names else config


def named(error: Exception, kind: Any) -> Exception:
    """Return an error of a feature from outside with its file and line, and others as they are.

    Args:
        error: The error.
        kind: Class of the run's settings (`with_features`).
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):  # It has advice of its own.
        return error
    place = place_in(kind.files, error)
    return TrainingError(f"feature {place}") if place else error


@contextmanager
def naming_features(kind: Any) -> Iterator[None]:
    """Use the settings of a class inside the block, and name its features' errors (`named`)."""
    try:
        with using(kind):
            yield
    except Exception as error:
        if (other := named(error, kind)) is error:
            raise
        raise other from error
