"""The order in which the first LoRA trainer counted layers, walked over the real module trees."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from dora_diffusion.formats.layouts.cloneofsimo import positional_names

ATTENTION = ("CrossAttention", "Attention", "GEGLU")
EARLY = ("norm1", "attn1", "ff", "norm2", "attn2", "norm3")


@cache
def released_unet() -> Any:
    """Stable Diffusion 1.5's UNet without its numbers."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def walk(
    model: nn.Module, classes: Collection[str], kinds: tuple[type[nn.Module], ...]
) -> list[tuple[str, tuple[int, ...]]]:
    """Path and weight shape of each layer, as the trainer found them: below each ancestor."""
    found = []
    for above, ancestor in model.named_modules():
        if type(ancestor).__name__ in classes:
            for below, layer in ancestor.named_modules():
                if isinstance(layer, kinds):
                    found.append((f"{above}.{below}", tuple(layer.weight.shape)))
    return found


def in_order(unet: nn.Module, order: tuple[str, ...]) -> None:
    """Register the parts of each transformer block in another order."""
    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            for name in order:
                module._modules[name] = module._modules.pop(name)


@pytest.mark.parametrize("is_early", [True, False])
@pytest.mark.parametrize(
    ("classes", "kinds", "count"),
    [
        (ATTENTION, (nn.Linear,), 144),
        (("Attention",), (nn.Linear,), 128),
        (("GEGLU",), (nn.Linear,), 16),
        ((*ATTENTION, "ResnetBlock2D"), (nn.Linear, nn.Conv2d), 144 + 22 * 3 + 14),
        ((*ATTENTION, "ResnetBlock2D"), (nn.Linear,), 144 + 22),
    ],
)
def test_the_layers_of_the_released_unet(
    is_early: bool, classes: tuple[str, ...], kinds: tuple[type[nn.Module], ...], count: int
) -> None:
    """In the order of early 2023, and in that of the Diffusers that is installed."""
    unet = released_unet()
    later = ("norm1", "attn1", "norm2", "attn2", "norm3", "ff")
    in_order(unet, EARLY if is_early else later)
    layers = walk(unet, classes, kinds)
    assert len(layers) == count
    names = [f"unet.{path}" for path, _ in layers]
    shapes = [shape for _, shape in layers]
    assert positional_names("unet", shapes, classes) == names
    known = {f"unet.{name.removesuffix('.weight')}": tuple(weight.shape)
             for name, weight in unet.state_dict().items() if weight.ndim in (2, 4)}  # fmt: skip
    assert positional_names("unet", shapes, classes[::-1], known) == names


@pytest.mark.parametrize("layers", [12, 23])
def test_the_layers_of_a_text_encoder(layers: int) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=layers
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    found = walk(model, ("CLIPAttention",), (nn.Linear,))
    names = [f"text_encoder.text_model.{path.removeprefix('text_model.')}" for path, _ in found]
    assert len(names) == 4 * layers
    shapes = [shape for _, shape in found]
    assert positional_names("text_encoder", shapes, ["CLIPAttention"]) == names
    assert positional_names("text_encoder", shapes, []) == names
    known = dict.fromkeys(reversed(names), (8, 8))
    assert positional_names("text_encoder", shapes, [], known) == names


def test_shapes_and_classes_that_fit_no_order_are_refused() -> None:
    square = [(8, 8)] * 144
    with pytest.raises(ValueError, match="144 unet layers cannot be matched to a released Stable"):
        positional_names("unet", square, ATTENTION)
    with pytest.raises(ValueError, match="has adapted Mystery, whose layers' order is not known"):
        positional_names("unet", square, ["GEGLU", "Mystery"])
    known = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (4, 4)}
    with pytest.raises(ValueError, match="1 text_encoder layer cannot be matched to this model"):
        positional_names("text_encoder", [(8, 8)], [], known)
