"""Adapted convolutions in channels-last: the same results, and the format that came in goes out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
from dora_diffusion.adapters.scope import norm_scope
from dora_diffusion.config import AdapterConfig


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_convolution_keeps_channels_last(axis: str, size: int) -> None:
    x = torch.randn(2, 12, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(12, 16, size, padding=size // 2)).double()
        config = AdapterConfig(targets=("full",), conv_rank=3, norm_axis=axis)
        inject_adapters(model, config, generator=torch.Generator().manual_seed(2))
        generator = torch.Generator().manual_seed(3)
        parameters = list(adapter_parameters(model))
        for parameter in parameters:  # A fresh adapter is the base.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data.double() + 0.1 * noise
        model.to(memory_format=memory_format)
        given = x.clone(memory_format=memory_format).requires_grad_()
        with norm_scope(model):
            y = model(given)
            y.square().sum().backward()
        assert y.is_contiguous(memory_format=memory_format)
        gradients = [p.grad for p in parameters]
        results.append([y.detach(), given.grad, *gradients])
    for plain, channels_last in zip(*results, strict=True):
        torch.testing.assert_close(channels_last, plain, rtol=1e-10, atol=1e-10)
