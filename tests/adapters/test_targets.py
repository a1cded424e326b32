"""Layers that the presets and patterns name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dora_diffusion.adapters.inject import inject_adapters, remove_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.targets import TargetError, check_pattern, match_targets
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


def test_blocks_of_content_and_style_are_those_of_sdxl():
    """As B-LoRA's code names them, in the released UNets without their numbers."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        sdxl = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280), transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20], cross_attention_dim=2048, use_linear_projection=True,
        )  # fmt: skip
        sd1 = UNet2DConditionModel(cross_attention_dim=768)
    for preset, place in {"b-lora-content": 0, "b-lora-style": 1}.items():
        paths = match_targets(sdxl, [preset])
        expected = [
            path
            for path in match_targets(sdxl, ["attention"])
            if path.startswith(f"up_blocks.0.attentions.{place}.")
        ]
        assert paths == expected
        assert len(paths) == 80
        with pytest.raises(TargetError, match=f"preset '{preset}' matches no layer"):
            match_targets(sd1, [preset])


PATTERN_CASES = [
    # A pattern, and the layers of `Net` that it names.
    ({"full": 2}, ["conv", "down", "point", "square", "wide"]),
    ({"square": 2}, ["square"]),
    ({"*o*": 2}, ["conv", "down", "point"]),
    ({"[sw]*": 2}, ["square", "wide"]),
]


@pytest.mark.parametrize(("pattern", "named"), PATTERN_CASES)
def test_a_pattern_sets_ranks_and_alphas(net, pattern, named):
    config = AdapterConfig(("full",), rank=3, alpha=5.0, conv_alpha=5.0, rank_pattern=pattern)
    report = inject_adapters(net, config)
    assert {line.path for line in report.layers if line.rank == 2} == set(named)
    for path in named:
        assert net.get_submodule(path).adapters["default"].alpha == 5.0
    other = copy.deepcopy(net)
    remove_adapters(other)
    alphas = dict.fromkeys(pattern, 7.0)
    inject_adapters(other, AdapterConfig(("full",), rank=3, alpha_pattern=alphas))
    found = {path: layer.adapters["default"].alpha for path, layer in adapted_layers(other)}
    assert found == {path: 7.0 if path in named else 3.0 for path in found}


def test_the_end_of_a_name_is_enough_and_the_first_pattern_counts(sd1_folder):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(sd1_folder, subfolder="unet")
    pattern = {"attn2.to_k": 5, "mid_block.*": 6, "to_k": 7, "cross-attention": 8}
    inject_adapters(unet, AdapterConfig(("attention",), rank=2, rank_pattern=pattern))
    for path, layer in adapted_layers(unet):
        expected = 5 if path.endswith("attn2.to_k") else None
        expected = expected or (6 if path.startswith("mid_block.") else None)
        expected = expected or (7 if path.endswith(".to_k") else 8 if ".attn2." in path else 2)
        assert layer.adapters["default"].down.shape[0] == expected, path


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ({"squares": 2}, "rank_pattern: 'squares' names no adapted layer; the nearest are square,"),
        ({"*wid": 2}, "the nearest are wide"),
        (
            {"*": 2, "square": 3},
            "'square' has no effect, since patterns before it match all of its layers",
        ),
        ({"square": 64}, r"rank_pattern square 64 is larger than the layer square .*<= 10"),
    ],
)
def test_a_pattern_without_effect_is_refused(net, pattern, reason):
    with pytest.raises(ValueError, match=reason):
        inject_adapters(net, AdapterConfig(("full",), rank=3, rank_pattern=pattern))
    assert type(net.square) is nn.Linear


def test_the_nearest_names_are_patterns_that_work(sd1_folder):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(sd1_folder, subfolder="unet")
    layers = {path: unet.get_submodule(path) for path in match_targets(unet, ["full"])}
    for wrong in ("up_block.*", "*attn3.to_k", "to_kk", "*down_blocks.9*", "*.ff.net.5.proj"):
        with pytest.raises(TargetError) as error:
            inject_adapters(unet, AdapterConfig(("full",), rank=1, rank_pattern={wrong: 2}))
        near = str(error.value).partition("the nearest are ")[2].split(", ")
        assert len(near) == 3
        for name in near:
            check_pattern("rank_pattern", [name], [layers])
