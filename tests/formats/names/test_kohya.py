"""Kohya's names: every module of the three families, one-to-one and back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.checkpoint.weights import module_shapes
from dora_diffusion.formats.names import kohya
from dora_diffusion.formats.names.kohya import kohya_name, kohya_table, name_resolver
from dora_diffusion.formats.names.modules import released_layout, renamed, unet_names


def modules(folder: Path) -> list[str]:
    """Canonical names of a folder's adaptable modules."""
    return [n for n in module_shapes(PipelineFolder(folder)) if "embeddings" not in n]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_kohya_names_go_there_and_back(family: str, request: pytest.FixtureRequest) -> None:
    names = modules(request.getfixturevalue(f"{family}_folder"))
    flat_names = {name: str(kohya_name(name, FAMILIES[family])) for name in names}
    assert len(set(flat_names.values())) == len(names)
    by_structure, by_table = name_resolver(), name_resolver(names)
    for name, flat in flat_names.items():
        assert by_structure(flat) == name
        assert by_table(flat) == name
        assert re.fullmatch(r"\w+", flat)


def test_known_kohya_names_of_released_models() -> None:
    """Names as they occur in published files."""
    known = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0": (
            "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0"
        ),
        "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
        "lora_unet_output_blocks_8_0_skip_connection": "unet.up_blocks.2.resnets.2.conv_shortcut",
        "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
        "lora_unet_middle_block_1_proj_out": "unet.mid_block.attentions.0.proj_out",
        "lora_unet_middle_block_2_emb_layers_1": "unet.mid_block.resnets.1.time_emb_proj",
        "lora_unet_label_emb_0_2": "unet.add_embedding.linear_2",
        "lora_unet_out_2": "unet.conv_out",
        "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_0_proj": (
            "unet.up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj"
        ),
        "lora_te_text_model_encoder_layers_11_mlp_fc1": (
            "text_encoder.text_model.encoder.layers.11.mlp.fc1"
        ),
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (
            "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"
        ),
        "lora_te2_text_projection": "text_encoder_2.text_projection",
        "lycoris_mid_block_attentions_0_proj_in": "unet.mid_block.attentions.0.proj_in",
    }
    resolve = name_resolver()
    for flat, name in known.items():
        assert resolve(flat) == name


def test_each_underscore_name_has_one_reading() -> None:
    assert set(kohya.UNET_MODULES) & set(kohya.TEXT_MODULES) == set()
    patterns = [pattern for pattern, _ in (*kohya._UNET, *kohya._TEXT)]
    blocks = [
        unet_names(layout).with_underscores().original
        for layout in map(released_layout, FAMILIES.values())
    ]
    for template in {*kohya.UNET_MODULES, *kohya.TEXT_MODULES}:
        flat = template.replace("#", "12").replace(".", "_")
        assert sum(pattern.fullmatch(flat) is not None for pattern in patterns) == 1
        assert not any(renamed(flat, {v: k for k, v in table.items()}, "_") for table in blocks)


def test_modules_that_share_a_flat_name_are_refused() -> None:
    with pytest.raises(ValueError, match="could be"):
        kohya_table(["unet.a.b_c", "unet.a_b.c"])
