"""The models and judges that ship, opened once per module."""

from __future__ import annotations

from typing import Any

import pytest

from dora_diffusion.models.embedded import model_folder
from dora_diffusion.toy.instrument import Instrument, load_instrument


@pytest.fixture(scope="module")
def tiny_sd() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(model_folder("tiny-sd"), local_files_only=True)


@pytest.fixture(scope="module")
def tiny_sdxl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(
        model_folder("tiny-sdxl"), local_files_only=True
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(model_folder("tiny-sd") / "tokenizer")


@pytest.fixture(scope="module")
def instrument() -> Instrument:
    return load_instrument()
