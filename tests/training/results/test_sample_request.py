"""Requests for samples: settings of a prompt that the model does not support, before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.images import parse_prompt
from dora_diffusion.models.load import load_empty
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.training.results.write import sample_settings
from tests.refusal import refused
from tests.z_image import write_z_image


def test_sizes_are_the_models_and_settings_without_effect_are_named(tmp_path: Path) -> None:
    components = load_empty(write_z_image(tmp_path / "model"))

    def settings(line: str) -> SamplingSettings:
        return sample_settings(parse_prompt(line), TrainConfig(resolution=64), components)

    with refused("width", "72", "64"):
        settings("a dog --w 72")
    with pytest.warns(UserWarning, match="scheduler has no effect on Z-Image"):
        found = settings("a dog --w 80 --ss euler")
    assert (found.width, found.height, found.scheduler) == (80, 64, None)
