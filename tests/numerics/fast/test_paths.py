"""Which path a layer takes."""

from __future__ import annotations

import torch

from dora_diffusion.numerics.fast.paths import uses_merged_weight


def test_low_precision_never_takes_the_merged_weight_path():
    weight = torch.zeros(64, 64)
    assert uses_merged_weight(10_000, weight, 8, torch.float32)
    assert not uses_merged_weight(10_000, weight, 8, torch.bfloat16)
    assert not uses_merged_weight(4, weight, 8, torch.float32)
