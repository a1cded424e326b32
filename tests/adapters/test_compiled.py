"""Blocks under torch.compile: one graph each, the results of the uncompiled layers, few graphs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dora_diffusion.adapters.compiled import compile_blocks, require_compiler, uncompiled
from dora_diffusion.adapters.inject import (
    adapter_parameters,
    disabled,
    inject_adapters,
    merge_adapters,
    norm_scope,
)
from dora_diffusion.config import ConfigError
from dora_diffusion.numerics import fast
from tests.adapters.helpers import everything, move
from tests.conftest import unet_config


class Blocks(nn.Module):
    """A residual block that widens and a transformer block, of a family's narrow UNet."""

    def __init__(self, family: str) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        unet: Any = UNet2DConditionModel(**unet_config(family))
        block = unet.down_blocks[-2 if family == "sd1" else -1]
        self.resnet = block.resnets[0]
        self.transformer = block.attentions[0].transformer_blocks[0]
        # A convolution without a bias, besides those with one.
        self.resnet.conv2.register_parameter("bias", None)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, temb, prompt = inputs
        tokens = self.resnet(x, temb).flatten(2).mT
        y: Tensor = self.transformer(tokens, encoder_hidden_states=prompt)
        return y


def inputs(model: Blocks, side: tuple[int, int] = (6, 4), seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (2, model.resnet.conv1.in_channels, *side),
        (2, model.resnet.time_emb_proj.in_features),
        (2, 5, model.transformer.attn2.to_k.in_features),
    ]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def blocks(family: str = "sd1", **adapter: Any) -> Blocks:
    torch.manual_seed(0)
    model = Blocks(family).requires_grad_(False)
    inject_adapters(model, everything(**{"conv_rank": 2, **adapter}))
    move(model)
    return model.train()


def compiled(model: nn.Module, backend: Any = "aot_eager") -> nn.Module:
    """A compiled copy, in which a graph break is an error."""
    model = copy.deepcopy(model)
    compile_blocks(model, backend=backend, fullgraph=True)
    return model


def results(model: nn.Module, x: tuple[Tensor, ...], scope: bool = True) -> list[Tensor]:
    """Output and gradients of input and adapters."""
    x = (x[0].clone().requires_grad_(), *x[1:])
    with norm_scope(model) if scope else nullcontext():
        y = model(x)
        y.float().square().mean().backward()
    gradients = [p.grad for p in adapter_parameters(model)]
    for parameter in adapter_parameters(model):
        parameter.grad = None
    return [y.detach(), x[0].grad, *gradients]


def worst(some: list[Tensor], others: list[Tensor]) -> float:
    return max(
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(some, others, strict=True)
    )


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", ["output", "input", "lora"])
def test_each_block_is_one_graph_and_computes_the_same(family: str, kind: str) -> None:
    adapter = {"use_dora": False} if kind == "lora" else {"norm_axis": kind}
    model = blocks(family, **adapter)
    x = inputs(model)
    assert worst(results(compiled(model), x), results(model, x)) < 1e-5
