"""Single-file names of the released models: every tensor there and back, and some by heart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.formats.checkpoint.weights import (
    checkpoint_names,
    entries_of_file,
    plan_checkpoint,
)
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.names.modules import NameTable, UNetLayout, canonical, released_layout
from tests.families import UNETS as UNET_FAMILIES

UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# (class, layers) of the text encoders.
TEXT_ENCODERS: dict[str, list[tuple[Any, int]]] = {
    "sd1": [(CLIPTextModel, 12)],
    "sd2": [(CLIPTextModel, 23)],
    "sdxl": [(CLIPTextModel, 12), (CLIPTextModelWithProjection, 32)],
}
# As they stand in the published files.
KNOWN = {
    "sd1": {
        "unet.up_blocks.0.upsamplers.0.conv.weight":
            "model.diffusion_model.output_blocks.2.1.conv.weight",
        "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0.bias":
            "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.bias",
        "unet.down_blocks.1.resnets.0.conv_shortcut.weight":
            "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
        "vae.decoder.up_blocks.0.resnets.2.conv2.weight":
            "first_stage_model.decoder.up.3.block.2.conv2.weight",
        "vae.encoder.mid_block.attentions.0.to_out.0.weight":
            "first_stage_model.encoder.mid.attn_1.proj_out.weight",
        "text_encoder.text_model.encoder.layers.11.mlp.fc1.bias":
            "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.bias",
    },
    "sd2": {
        "unet.time_embedding.linear_2.bias": "model.diffusion_model.time_embed.2.bias",
        "text_encoder.text_model.encoder.layers.22.layer_norm2.weight":
            "cond_stage_model.model.transformer.resblocks.22.ln_2.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.bias":
            "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias#k",
        "text_encoder.text_model.embeddings.position_embedding.weight":
            "cond_stage_model.model.positional_embedding",
    },
    "sdxl": {
        "unet.add_embedding.linear_2.weight": "model.diffusion_model.label_emb.0.2.weight",
        "unet.up_blocks.0.upsamplers.0.conv.bias":
            "model.diffusion_model.output_blocks.2.2.conv.bias",
        "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj.weight":
            "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight",
        "text_encoder.text_model.final_layer_norm.bias":
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "text_encoder_2.text_projection.weight": "conditioner.embedders.1.model.text_projection",
        "text_encoder_2.text_model.final_layer_norm.weight":
            "conditioner.embedders.1.model.ln_final.weight",
    },
}  # fmt: skip


def released_kind(family: str) -> str:
    """The family that an inpainting one differs from in what its UNet reads alone."""
    return family.removesuffix("-inpainting")


def tensor_names(family: str) -> set[str]:
    """Every tensor of a released model, by canonical name."""
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(**UNETS[released_kind(family)]),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
            ),
        }
        for (kind, layers), name in zip(
            TEXT_ENCODERS[released_kind(family)], ("text_encoder", "text_encoder_2"), strict=False
        ):
            models[name] = kind(CLIPTextConfig(num_hidden_layers=layers))
    return {canonical(name, key) for name, model in models.items() for key in model.state_dict()}


def released_names(family: str) -> NameTable:
    return checkpoint_names(FAMILIES[family], released_layout(FAMILIES[family]), 4)


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_every_tensor_of_a_released_model_goes_there_and_back(family: str) -> None:
    names, table = tensor_names(family), released_names(family)
    originals = {name: table.to_original(name) for name in names}
    assert None not in originals.values()
    assert len(set(originals.values())) == len(names) > 1000
    assert all(table.to_canonical(original) == name for name, original in originals.items())
    # And what is planned from the names is what is found in the file.
    plan = plan_checkpoint(FAMILIES[family], table, names)
    keys = {entry.key: TensorSpec(torch.float32, (3,)) for entry in plan}
    assert sorted(entries_of_file(FAMILIES[family], keys), key=lambda entry: entry.key) == plan
    assert {source for entry in plan for source in entry.sources} == names


@pytest.mark.parametrize("family", KNOWN)
def test_known_names(family: str) -> None:
    table = released_names(family)
    for name, original in KNOWN[family].items():
        assert table.to_original(name) == original
        assert table.to_canonical(original) == name


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_the_layout_is_read_from_the_file(family: str) -> None:
    table = released_names(family)
    paths = [str(table.to_original(name)) for name in tensor_names(family)]
    prefix = "model.diffusion_model."
    layout = UNetLayout.from_original_names(
        path.removeprefix(prefix) for path in paths if path.startswith(prefix)
    )
    # The last level of SDXL has no attention, which is what counts as not there.
    assert layout.layers_per_block == 2
    assert layout.up_attention == FAMILIES[family].up_attention[: len(layout.up_attention)]
    assert not any(FAMILIES[family].up_attention[len(layout.up_attention) :])
