"""Base models of runs: models that were distilled to few steps are named, and load."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from dora_diffusion.config import TrainConfig
from dora_diffusion.models.load import load_empty
from dora_diffusion.training.inputs.base import configure_reading
from tests.z_image import write_z_image


def test_a_distilled_model_is_named_with_one_to_train_on(tmp_path: Path) -> None:
    base = load_empty(write_z_image(tmp_path / "Z-Image"))
    turbo = load_empty(write_z_image(tmp_path / "Z-Image-Turbo"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        configure_reading(base, TrainConfig())
    advice = "such as Tongyi-MAI/Z-Image, with sample_model .*Turbo; or set assistant_adapter$"
    with pytest.warns(UserWarning, match=rf"\(distilled\).*{advice}"):
        assert configure_reading(turbo, TrainConfig()).family.name == "z-image"
