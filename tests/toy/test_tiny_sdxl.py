"""The shipped SDXL: diffusers' own classes, two encoders, and conditioning that does something."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dora_diffusion.models.embedded import model_folder


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(
        model_folder("tiny-sdxl"), local_files_only=True
    )


def test_everything_that_ships_is_within_its_budget() -> None:
    files = [f for f in model_folder("tiny-sd").parent.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files if "__pycache__" not in f.parts) < 40e6
    suffixes = {f.suffix for f in model_folder("tiny-sdxl").rglob("*") if f.is_file()}
    assert suffixes <= {".safetensors", ".json", ".txt", ".md", ".jpg"}


def test_the_weights_are_float16() -> None:
    from safetensors import safe_open

    files = list(model_folder("tiny-sdxl").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        with safe_open(file, "pt") as weights:
            assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float16}  # noqa: SIM118


def test_it_is_sdxl_of_diffusers_own_classes(pipeline: Any) -> None:
    kinds = {name: type(part).__name__ for name, part in pipeline.components.items()}
    assert kinds["unet"] == "UNet2DConditionModel"
    assert kinds["text_encoder"] == "CLIPTextModel"
    assert kinds["text_encoder_2"] == "CLIPTextModelWithProjection"
    assert kinds["tokenizer"] == kinds["tokenizer_2"] == "CLIPTokenizer"
    assert pipeline.unet.config.addition_embed_type == "text_time"
    widths = [part.config.hidden_size for part in (pipeline.text_encoder, pipeline.text_encoder_2)]
    assert widths[0] != widths[1]
    assert pipeline.unet.config.cross_attention_dim == sum(widths)
    assert pipeline.default_sample_size * pipeline.vae_scale_factor == 128
