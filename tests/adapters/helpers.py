"""Helpers of the tests of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.config import AdapterConfig

AXES = ("output", "input")


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


def kept_by(
    layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, model: nn.Module
) -> tuple[torch.Tensor, dict[int, int]]:
    """The output, and storages kept for the backward pass that are not parameters: bytes by name.

    Nor what a scope made of them, which the scope keeps.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *prepared(model)]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    return y, kept


def prepared(model: nn.Module) -> Iterator[torch.Tensor]:
    """Factors that an open scope's plan has made for a model computing in its weights' dtype."""
    for _, layer in adapted_layers(model):
        for scales in (layer.route.norms if layer.route else {}).values():
            factors = scales.factors(layer.weight.dtype)
            yield from (part for part in factors if isinstance(part, torch.Tensor))


class Block(nn.Module):
    """Norms and an activation before layers, as in a residual block and in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.GroupNorm(2, 8), nn.SiLU()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.layer_norm = nn.LayerNorm(8)
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.conv(self.act(self.norm(x)))
        tokens = self.layer_norm(x.flatten(2).mT)
        return torch.softmax(self.query(tokens) @ self.key(tokens).mT, -1)


def block(axis: str) -> Block:
    torch.manual_seed(0)
    model = Block()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    config = AdapterConfig(targets=("full",), rank=2, conv_rank=2, norm_axis=axis)
    inject_adapters(model, config)
    for parameter in adapter_parameters(model):
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def gradients(model: nn.Module, x: torch.Tensor, times: int = 1) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    with norm_scope(model):
        loss = model(x).square().sum()
        for number in range(times):
            loss.backward(retain_graph=number + 1 < times)
    return [x.grad, *(p.grad for p in adapter_parameters(model))]
