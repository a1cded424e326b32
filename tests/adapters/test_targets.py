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
