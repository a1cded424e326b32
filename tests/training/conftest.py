"""A run of a few steps on a tiny random model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.config import TrainConfig
from tests.shallow import *  # noqa: F403
from tests.training.helpers import small_samples


@pytest.fixture(scope="session")
def small_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photos of 192 pixels with captions; to be copied."""
    folder = tmp_path_factory.mktemp("small") / "photos"
    return Path(shutil.copytree(small_samples() / "bolt_mug", folder))


@pytest.fixture
def photos(tmp_path: Path, small_photos: Path) -> Path:
    """Five photos with captions."""
    return Path(shutil.copytree(small_photos, tmp_path / "photos"))


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


@pytest.fixture
def config(tiny_run: Callable[..., TrainConfig]) -> TrainConfig:
    """Settings of a two-step run that adapts Conv2d layers too, none of them without effect."""
    return tiny_run(max_train_steps=2, targets=["attention+conv"], validation_inference_steps=25)


@pytest.fixture
def shaped_photos(tmp_path: Path, small_photos: Path) -> Path:
    """Five photos of different shapes, each with its own caption and, but for one, its mask."""
    folder = Path(shutil.copytree(small_photos, tmp_path / "photos"))
    for number, old in enumerate(sorted(folder.glob("*.jpg"))):
        with Image.open(old) as image:
            shaped = image.convert("RGB").resize((70 + 9 * number, 110 - 7 * number))
        old.unlink()
        path = old.with_suffix(".png")
        shaped.save(path)
        path.with_suffix(".txt").write_text(f"sks mug, photo number {number}", encoding="utf-8")
        if number:
            rows = np.linspace(0, 255, shaped.height).astype(np.uint8)
            mask = np.repeat(rows[:, None], shaped.width, axis=1)
            Image.fromarray(mask).save(path.with_suffix(".mask.png"))
    return folder
