"""Which layers the presets and patterns name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_diffusion.adapters.inject import (
    inject_adapters,
)
from dora_diffusion.adapters.targets import TargetError, match_targets
from dora_diffusion.config import AdapterConfig


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


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    # Kernels may differ, in the last bit, between a weight that trains and one that does not.
    return Net().requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))


def test_presets_on_a_diffusers_unet(sd1_folder):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(sd1_folder, subfolder="unet")
    counts = {
        preset: match_targets(unet, [preset])
        for preset in ("cross-attention", "attention", "attention+conv", "full")
    }
    assert all("attn2" in path for path in counts["cross-attention"])
    assert len(counts["attention"]) == 2 * len(counts["cross-attention"])
    convs = set(counts["attention+conv"]) - set(counts["attention"])
    expected = {
        path
        for path, module in unet.named_modules()
        if isinstance(module, nn.Conv2d) and path not in ("conv_in", "conv_out")
    }
    assert convs == expected
    linear_or_conv = [m for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(counts["full"]) == len(linear_or_conv)
    inject_adapters(unet, AdapterConfig(targets=("attention+conv",), rank=2))
    assert unet.dtype == torch.float32
    assert match_targets(unet, ["attention+conv"]) == counts["attention+conv"]


def test_a_target_that_matches_nothing_says_what_there_was(net):
    with pytest.raises(TargetError, match=r"'attention' matches no layer of Net.*conv, down"):
        inject_adapters(net, AdapterConfig(targets=("full", "attention")))
    assert type(net.square) is nn.Linear, "a failed injection must change nothing"
