"""A run of two steps on a tiny random model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.config import TrainConfig
from tests.shallow import *  # noqa: F403
from tests.training.conftest import small_photos  # noqa: F401


@pytest.fixture
def photos(tmp_path: Path, small_photos: Path) -> Path:  # noqa: F811
    """Five photos with captions."""
    return Path(shutil.copytree(small_photos, tmp_path / "photos"))


@pytest.fixture
def run(tmp_path: Path, photos: Path) -> Callable[..., TrainConfig]:
    """Settings of a run of two steps."""

    def make(folder: Path, output: str, **changes: Any) -> TrainConfig:
        settings = {
            "pretrained_model_name_or_path": str(folder), "instance_data_dir": str(photos),
            "instance_prompt": "a photo of a sks mug", "output_dir": str(tmp_path / output),
            "resolution": 32, "rank": 2, "max_train_steps": 2, "learning_rate": 1e-3,
            "text_encoder_lr": 1e-3, "num_validation_images": 0, "validation_inference_steps": 2,
            "checkpointing_steps": 0, "seed": 3, "mixed_precision": "no",
        }  # fmt: skip
        return TrainConfig(**{**settings, **changes})

    return make
