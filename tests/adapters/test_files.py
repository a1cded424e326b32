"""Adapters of live modules on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_diffusion.adapters.inject import inject_adapters, merge_adapters, remove_adapters
from dora_diffusion.adapters.state import adapter_state, load_adapter, save_adapter
from dora_diffusion.config import AdapterConfig
from dora_diffusion.formats.adapter.file import AdapterMetadata
from dora_diffusion.numerics.weights import LayerWeights
from tests.adapters.helpers import move


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


class Kinds(nn.Module):
    """Every kind of layer that PEFT knows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.first = Conv1D(8, 8)
        self.second = Conv1D(6, 8)
        self.along = nn.Conv1d(6, 5, 3, padding=1)
        self.last = nn.Linear(5, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.tanh(self.first(self.table(ids))))
        return self.last(self.along(x.mT).mT)


IDS = torch.tensor([[3, 0, 10, 3, 7], [1, 1, 2, 0, 9]])


def kinds() -> Kinds:
    torch.manual_seed(0)
    return Kinds().requires_grad_(False)


@pytest.mark.parametrize("target", ["diffusers", "peft"])
def test_every_kind_of_layer_is_loaded_as_it_was_saved(tmp_path, target):
    model = kinds()
    inject_adapters(model, AdapterConfig(targets=("*",), rank=2, alpha=3.0))
    move(model)
    y = model(IDS)
    path = save_adapter(model, tmp_path, target)
    other = kinds()
    load_adapter(other, path)
    torch.testing.assert_close(other(IDS), y, rtol=1e-6, atol=1e-6)
    merge_adapters(other)
    torch.testing.assert_close(other(IDS), y, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(kinds()(IDS), y, atol=1e-2)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_peft_loads_every_kind_of_layer(tmp_path):
    from peft import PeftModel

    model = kinds()
    inject_adapters(model, AdapterConfig(targets=("*",), rank=2, alpha=3.0))
    move(model)
    save_adapter(model, tmp_path, "peft")
    twin = PeftModel.from_pretrained(kinds(), tmp_path / "unet")
    torch.testing.assert_close(twin(IDS), model(IDS), rtol=1e-5, atol=1e-5)
