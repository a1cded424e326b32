"""A module tree of early 2023, and the LoRA trainer of that time (cloneofsimo/lora) on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

# A module tree as Diffusers 0.9 to 0.14 registered it: what a UNet holds, and in which order.


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        weights = (self.to_q(x) @ self.to_k(context).transpose(1, 2)).softmax(dim=-1)
        return self.to_out[0](weights @ self.to_v(context))


class GEGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return hidden * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width), nn.Dropout(0.0), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, is_early: bool) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, width)
        if is_early:
            self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context)
        if not is_early:
            self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        x = x + self.attn2(x, context)
        return x + self.ff(x)


class Transformer2DModel(nn.Module):
    def __init__(self, width: int, context: int, is_early: bool) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(width, context, is_early)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        batch, width, *size = x.shape
        tokens = self.proj_in(x).flatten(2).transpose(1, 2)
        tokens = self.transformer_blocks[0](tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(batch, width, *size))


class ResnetBlock2D(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(6, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(into, out, 1) if into != out else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = F.silu(self.conv1(x)) + self.time_emb_proj(time)[:, :, None, None]
        return self.conv2(hidden) + (self.conv_shortcut(x) if self.conv_shortcut else x)


class Block(nn.Module):
    def __init__(
        self, widths: list[tuple[int, int]], context: int, is_early: bool, has_attention: bool
    ) -> None:
        super().__init__()
        if has_attention:
            self.attentions = nn.ModuleList(
                Transformer2DModel(out, context, is_early) for _, out in widths
            )
        self.resnets = nn.ModuleList(ResnetBlock2D(into, out) for into, out in widths)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
        return x


class UNet2DConditionModel(nn.Module):
    """Two levels; the middle block is made before those on the way up and registered behind."""

    def __init__(self, is_early: bool) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.down_blocks = nn.ModuleList([])
        self.mid_block = None
        self.up_blocks = nn.ModuleList([])
        self.down_blocks.append(Block([(8, 8), (8, 8)], 10, is_early, True))
        self.down_blocks.append(Block([(8, 12), (12, 12)], 10, is_early, False))
        self.mid_block = Block([(12, 12)], 10, is_early, True)
        self.up_blocks.append(Block([(12, 12)] * 3, 10, is_early, False))
        self.up_blocks.append(Block([(12, 8), (8, 8), (8, 8)], 10, is_early, True))

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            x = block(x, time, context)
        return x


class CLIPAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q_proj(x) @ self.k_proj(x).transpose(1, 2)).softmax(dim=-1)
        return self.out_proj(weights @ self.v_proj(x))


class TextEncoder(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.text_model = nn.Module()
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        for layer in self.text_model.encoder.layers:
            layer.self_attn = CLIPAttention(width)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.text_model.encoder.layers:
            x = x + layer.self_attn(x)
        return x


# The trainer: which layers it found, what it put there, and what it saved.


class Injected(nn.Module):
    """A Linear or convolution with a trained pair beside it, at scale 1."""

    def __init__(self, layer: Any, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        out, into, *kernel = layer.weight.shape
        self.down = torch.randn(rank, into, *kernel, generator=generator) * 0.2
        self.up = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * 0.2

    def forward(self, x: Tensor) -> Tensor:
        if self.down.ndim == 2:
            return self.layer(x) + x @ self.down.T @ self.up.T
        padding = (self.down.shape[-1] - 1) // 2
        return self.layer(x) + F.conv2d(F.conv2d(x, self.down, padding=padding), self.up)


def find(
    model: nn.Module, classes: list[str], kinds: tuple[type[nn.Module], ...]
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and layer of each: below every module of one of the classes, in their order."""
    for ancestor in [m for m in model.modules() if type(m).__name__ in classes]:
        for path, layer in list(ancestor.named_modules()):
            if isinstance(layer, kinds):
                above, _, name = path.rpartition(".")
                yield ancestor.get_submodule(above), name, layer


def inject(model: nn.Module, classes: list[str], kinds: tuple[type[nn.Module], ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    for number, (parent, name, layer) in enumerate(find(model, classes, kinds)):
        setattr(parent, name, Injected(layer, 1 + number % 3, generator))


def save(
    path: Path, models: dict[str, tuple[nn.Module, list[str]]], tokens: dict[str, Tensor]
) -> Path:
    tensors, metadata = dict(tokens), dict.fromkeys(tokens, "<embed>")
    for component, (model, classes) in models.items():
        metadata[component] = json.dumps(classes)
        for number, (_, _, layer) in enumerate(find(model, classes, (Injected,))):
            metadata[f"{component}:{number}:rank"] = str(len(layer.down))
            tensors[f"{component}:{number}:up"] = layer.up
            tensors[f"{component}:{number}:down"] = layer.down
    save_file(tensors, path, metadata)
    return path
