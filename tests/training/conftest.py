"""A run of a few steps on a tiny random model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion.config import TrainConfig

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five photos with captions."""
    return Path(shutil.copytree(SAMPLES / "bolt_mug", tmp_path / "photos"))


@pytest.fixture
def tiny_run(sd1_folder: Path, photos: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a four-step run into ``out``, with changes."""

    def make(**changes: object) -> TrainConfig:
        settings = {
            "pretrained_model_name_or_path": str(sd1_folder),
            "instance_data_dir": str(photos),
            "instance_prompt": "a photo of a sks mug",
            "output_dir": str(tmp_path / "out"),
            "resolution": 32,
            "rank": 2,
            "conv_rank": 2,
            "targets": ["cross-attention"],
            "max_train_steps": 4,
            "num_validation_images": 0,
            "validation_inference_steps": 2,
            "checkpointing_steps": 0,
        }
        return TrainConfig(**{**settings, **changes})

    return make
