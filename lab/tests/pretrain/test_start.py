"""Continuing with a model that ships: its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_diffusion.models.embedded import model_folder
from lab.pretrain.diffusion import Denoiser
from lab.pretrain.sd import TextToImage
from lab.pretrain.sdxl import TextToImageXL
from lab.pretrain.start import fill_from_package


@pytest.mark.parametrize(("name", "kind"), [("tiny-sd", TextToImage), ("tiny-sdxl", TextToImageXL)])
def test_a_model_starts_from_the_shipped_weights(
    name: str, kind: type[Denoiser], tokenizer: Any
) -> None:
    model: Any = kind(tokenizer)
    fill_from_package(model, name)
    folder = model_folder(name)
    shipped = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = model.unet.state_dict()
    assert set(loaded) == set(shipped)
    for key, tensor in shipped.items():
        assert torch.equal(loaded[key], tensor.float())
    for part in ("text_encoder", "text_encoder_2") if name == "tiny-sdxl" else ("text_encoder",):
        sums = [
            t.double().abs().sum() for t in load_file(folder / part / "model.safetensors").values()
        ]
        inside = [t.double().abs().sum() for t in getattr(model, part).state_dict().values()]
        assert float(sum(inside)) == pytest.approx(float(sum(sums)), rel=1e-6)
