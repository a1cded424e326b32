"""Canonical names of live modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dora_diffusion.adapters.inject import (
    adapter_parameters,
    inject_adapters,
    remove_adapters,
)
from dora_diffusion.adapters.state import LiveWeights, adapter_state, load_adapter_state
from dora_diffusion.config import AdapterConfig
from dora_diffusion.formats.checkpoint.weights import module_shapes


def test_the_projection_lies_beside_the_text_model(sdxl_folder: Path) -> None:
    """As in the files of diffusers, and as the formats name it."""
    from transformers import CLIPTextModelWithProjection

    encoder = CLIPTextModelWithProjection.from_pretrained(sdxl_folder / "text_encoder_2")
    components = {"text_encoder_2": encoder}
    weights = LiveWeights(components)
    assert module_shapes(weights)["text_encoder_2.text_projection"] == (48, 64)
    assert torch.equal(
        weights["text_encoder_2.text_projection.weight"], encoder.text_projection.weight
    )
    inject_adapters(encoder, AdapterConfig(targets=("text_projection",), rank=2))
    state = adapter_state(components)
    assert set(state) == {"text_encoder_2.text_projection"}
    remove_adapters(encoder)
    load_adapter_state(components, state)
    assert set(adapter_state(components)) == set(state)


class Net(nn.Module):
    """Linear (square and not), 1x1, 3x3 and strided convolutions, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(12, 10, 1)
        self.square = nn.Linear(10, 10)
        self.wide = nn.Linear(10, 17, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.point(nn.functional.silu(self.down(nn.functional.silu(self.conv(x)))))
        return self.wide(nn.functional.gelu(self.square(x.flatten(2).mT)))


def everything(**kwargs) -> AdapterConfig:
    return AdapterConfig(
        targets=("full",), **{"rank": 3, "alpha": 5.0, "conv_alpha": 5.0, **kwargs}
    )


def move(model: nn.Module, seed: int = 0, by: float = 0.2) -> None:
    """Move every adapter parameter, magnitudes too, away from the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    # Kernels may differ, in the last bit, between a weight that trains and one that does not.
    return Net().requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))


def test_state_round_trip_and_misfits(net, x):
    inject_adapters(net, everything())
    move(net)
    y = net(x)
    state = adapter_state({"unet": net})
    assert all(key.startswith("unet.") for key in state)
    remove_adapters(net)
    load_adapter_state({"unet": net}, state)
    assert torch.equal(net(x), y)
    with pytest.raises(ValueError, match="already has an adapter"):
        load_adapter_state({"unet": net}, state)
    with pytest.raises(ValueError, match="components that the model lacks"):
        load_adapter_state({"vae": net}, state)
    state["unet.nowhere"] = state["unet.square"]
    with pytest.raises(ValueError, match="no layer nowhere"):
        load_adapter_state({"unet": Net()}, state)


def test_text_encoder_names_always_have_text_model(sd1_folder):
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(sd1_folder / "text_encoder")
    inject_adapters(encoder, AdapterConfig(targets=("text-encoder-attention",), rank=2))
    state = adapter_state({"text_encoder": encoder})
    assert all(k.startswith("text_encoder.text_model.encoder.layers.") for k in state)
    remove_adapters(encoder)
    load_adapter_state({"text_encoder": encoder}, state)
    assert set(adapter_state({"text_encoder": encoder})) == set(state)
