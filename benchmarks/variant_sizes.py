"""Trained numbers of a variant, and the sizes of its files, at full size.

    python benchmarks/variant_sizes.py

UNets of the released shapes are made without memory (torch's meta device), so that this takes
seconds and the counts are exact. Files hold float32; their headers are left out.
"""

from __future__ import annotations

import torch
from common import markdown
from diffusers import UNet2DConditionModel
from full_size import UNETS

from dora_diffusion.adapters.targets import is_conv, match_targets
from dora_diffusion.config import AdapterConfig

VERA_RANK = 64


def sizes(family: str) -> list[tuple[str, ...]]:
    """A row for DVoRA and one for the default DoRA, both on attention and convolutions."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[family])
    vera = dora = ordinary = weights = 0
    paths = match_targets(unet, ["attention+conv"])
    for path in paths:
        layer = unet.get_submodule(path)
        out, fan_in = layer.weight.shape[0], layer.weight[0].numel()
        rank, _ = AdapterConfig(rank=8, conv_rank=4).rank_and_alpha(is_conv(layer))
        weights += layer.weight.numel()
        vera += 2 * out + VERA_RANK  # b and m, d
        ordinary += out + VERA_RANK * (out + fan_in)
        dora += out + rank * (out + fan_in)
    label = f"{family}, {len(paths)} layers"
    share = f"{vera / weights:.2%}"
    return [
        (label, f"DVoRA {VERA_RANK}", f"{vera:,}", share, mega(vera), mega(ordinary)),
        (label, "DoRA 8, 4", f"{dora:,}", f"{dora / weights:.2%}", "", mega(dora)),
    ]


def mega(numbers: int) -> str:
    """Float32 in MB."""
    return f"{4 * numbers / 1e6:.1f}"


if __name__ == "__main__":
    header = (
        "",
        "",
        "numbers that train",
        "of the weights",
        "compact file, MB",
        "ordinary file, MB",
    )
    print(markdown(header, sizes("sd1") + sizes("sdxl")))
