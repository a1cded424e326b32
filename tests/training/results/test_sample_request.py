"""Requests for samples: settings of a prompt that the model does not support, before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.prompts import parse_prompt
from dora_diffusion.models.load import load_empty
from dora_diffusion.training.results.write import SampleRequest
from tests.refusal import refused
from tests.z_image import write_z_image


def test_sizes_are_the_models_and_settings_without_effect_are_named(tmp_path: Path) -> None:
    components = load_empty(write_z_image(tmp_path / "model"))

    def request(line: str) -> SampleRequest:
        return SampleRequest.of(parse_prompt(line), TrainConfig(resolution=64))

    with refused("width", "72", "64"):
        request("a dog --w 72").for_model(components)
    with pytest.warns(UserWarning, match="scheduler has no effect on Z-Image"):
        settings = request("a dog --w 80 --ss euler").for_model(components).settings
    assert (settings.width, settings.height, settings.scheduler) == (80, 64, None)
