"""Adapters of live modules on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dora_diffusion.adapters.files import load_adapter, save_adapter
from dora_diffusion.adapters.inject import inject_adapters, remove_adapters
from dora_diffusion.adapters.state import adapter_state
from dora_diffusion.config import AdapterConfig
from dora_diffusion.formats.adapter.file import AdapterFormatError, AdapterMetadata
from dora_diffusion.numerics.weights import LayerWeights


class Blocks(nn.Module):
    """Modules with names of a UNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(5, 5)})


@pytest.fixture
def model() -> Blocks:
    """A model with a trained-looking adapter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Blocks()
        inject_adapters(model, AdapterConfig(targets=("*",), rank=2, alpha=3.0))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def assert_same(first: dict[str, LayerWeights], second: dict[str, LayerWeights]) -> None:
    assert first.keys() == second.keys()
    for name, layer in first.items():
        other = second[name]
        assert torch.equal(layer.down, other.down)
        torch.testing.assert_close(layer.scale * layer.up, other.scale * other.up)
        assert torch.equal(layer.magnitude, other.magnitude)
        assert layer.norm_axis == other.norm_axis


@pytest.mark.parametrize("target", ["diffusers", "kohya", "peft"])
def test_what_is_saved_is_loaded(tmp_path: Path, model: Blocks, target: str) -> None:
    state, metadata = adapter_state({"unet": model}), AdapterMetadata("sd1", trigger="sks mug")
    path = save_adapter(model, tmp_path, target, metadata=metadata)
    remove_adapters(model)
    assert load_adapter(model, path).trigger == "sks mug"
    assert_same(adapter_state({"unet": model}), state)


def test_the_weights_of_the_modules_tell_the_axis_of_flat_magnitudes(tmp_path: Path) -> None:
    """Of a square layer, which fits both."""
    model = Blocks()
    weight = model.time_embedding["linear_1"].weight
    weight.data *= torch.arange(1.0, 6.0)[:, None]  # rows and columns of different norms
    inject_adapters(model, AdapterConfig(targets=("time_embedding.*",), rank=2))
    state = adapter_state({"unet": model})
    path = save_adapter(model, tmp_path, "kohya", metadata=AdapterMetadata("sd1"))
    tensors = {k: t.flatten() if "dora_scale" in k else t for k, t in load_file(path).items()}
    with safe_open(path, "pt") as file:
        facts = {k: v for k, v in file.metadata().items() if "axis" not in k}
    save_file(tensors, path, facts)
    remove_adapters(model)
    load_adapter(model, path)
    assert_same(adapter_state({"unet": model}), state)


def test_an_adapter_of_another_family_is_named(tmp_path: Path, model: Blocks) -> None:
    path = save_adapter(model, tmp_path, metadata=AdapterMetadata("sdxl"))
    other = nn.ModuleDict({"conv_in": nn.Conv2d(4, 8, 3)})
    with pytest.raises(AdapterFormatError, match=r"Stable Diffusion XL \(sdxl\), the base is"):
        load_adapter(other, path, family="sd1")


def test_an_alpha_that_is_assumed_is_said(tmp_path: Path, model: Blocks) -> None:
    path = save_adapter(model, tmp_path, "kohya", metadata=AdapterMetadata("sd1"))
    tensors = {key: t for key, t in load_file(path).items() if not key.endswith(".alpha")}
    save_file(tensors, path)
    remove_adapters(model)
    with pytest.warns(UserWarning, match="alpha = rank is assumed; if it was trained with another"):
        load_adapter(model, path)
    remove_adapters(model)
    load_adapter(model, path, alpha=3.0)
    assert {layer.alpha for layer in adapter_state({"unet": model}).values()} == {3.0}
