"""Names: every module of the three families, in every spelling, one-to-one and back."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from torch import nn

from dora_diffusion.families import FAMILIES
from dora_diffusion.formats.adapter.keys import (
    AdapterFormatError,
    group_keys,
    name_resolver,
    parse_key,
    rename_one_to_one,
)
from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.formats.names import modules as module_names
from dora_diffusion.formats.names import sgm_blocks
from dora_diffusion.formats.names.modules import kohya_name, spelling_table
from dora_diffusion.formats.names.sgm_blocks import (
    UNetLayout,
    from_sgm,
    released_layout,
    to_sgm,
)


def modules(folder: Path) -> list[str]:
    """Canonical names of a folder's adaptable modules."""
    shapes = PipelineFolder(folder).module_shapes()
    return [n for n in shapes if not n.startswith("vae.") and "embeddings" not in n]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_kohya_names_go_there_and_back(family: str, request: pytest.FixtureRequest) -> None:
    names = modules(request.getfixturevalue(f"{family}_folder"))
    renamed = rename_one_to_one(names, lambda name: kohya_name(name, FAMILIES[family]), "kohya")
    by_structure, by_table = name_resolver(), name_resolver(names)
    for name, flat in renamed.items():
        assert by_structure(flat) == name
        assert by_table(flat) == name
        assert re.fullmatch(r"\w+", flat)


def test_both_block_spellings_of_sdxl_are_read(sdxl_folder: Path) -> None:
    names = modules(sdxl_folder)
    by_diffusers = dataclasses.replace(FAMILIES["sdxl"], kohya_names_original_blocks=False)
    for name in names:
        diffusers_spelling = kohya_name(name, by_diffusers)
        assert diffusers_spelling is not None
        assert name_resolver(names)(diffusers_spelling) == name
        assert name_resolver()(diffusers_spelling) == name


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
    vocabulary = {*module_names._UNET, *module_names._SGM_UNET, *module_names._TEXT}
    patterns = [
        pattern
        for group in ("_UNET_PATTERNS", "_SGM_PATTERNS", "_TEXT_PATTERNS")
        for pattern, _ in getattr(module_names, group)
    ]
    for template in vocabulary:
        flat = template.replace("#", "12").replace(".", "_")
        assert sum(pattern.fullmatch(flat) is not None for pattern in patterns) == 1


@pytest.mark.parametrize(
    "layout",
    [
        *map(released_layout, FAMILIES.values()),
        UNetLayout(1, (False, True)),
        UNetLayout(3, (True, False)),
    ],
)
def test_sgm_blocks_are_one_to_one(layout: UNetLayout) -> None:
    names = [*sgm_blocks.TOP_MODULES, "mid_block.resnets.1.conv1", "mid_block.attentions.0.proj_in"]
    levels = len(layout.up_attention)
    for level in range(levels):
        for i in range(layout.layers_per_block + 1):
            names.append(f"up_blocks.{level}.resnets.{i}.conv1")
            if layout.up_attention[level]:
                names.append(f"up_blocks.{level}.attentions.{i}.proj_in")
        for i in range(layout.layers_per_block):
            names.append(f"down_blocks.{level}.resnets.{i}.conv_shortcut")
        if level < levels - 1:
            names.append(f"up_blocks.{level}.upsamplers.0.conv")
            names.append(f"down_blocks.{level}.downsamplers.0.conv")
    renamed = {name: to_sgm(name, layout) for name in names}
    assert None not in renamed.values()
    assert len(set(renamed.values())) == len(names)
    assert [from_sgm(new or "", layout) for new in renamed.values()] == names
    assert UNetLayout.from_names(names) == layout


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("unet.conv_in.lora_A.weight", ("unet.conv_in", "down")),
        ("unet.conv_in.lora_B.default_0.weight", ("unet.conv_in", "up")),
        ("unet.mid_block.attentions.0.proj_in.lora.down.weight",
         ("unet.mid_block.attentions.0.proj_in", "down")),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
         ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "up")),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
         ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "down")),
        ("text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora.down.weight",
         ("text_encoder.text_model.encoder.layers.1.self_attn.out_proj", "down")),
        ("text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.up.weight",
         ("text_encoder.text_model.encoder.layers.1.self_attn.q_proj", "up")),
        ("text_encoder.encoder.layers.1.mlp.fc1.lora_magnitude_vector",
         ("text_encoder.text_model.encoder.layers.1.mlp.fc1", "magnitude")),
        ("text_encoder_2.text_model.encoder.layers.1.mlp.fc1.lora_magnitude_vector.weight",
         ("text_encoder_2.text_model.encoder.layers.1.mlp.fc1", "magnitude")),
        ("base_model.model.conv_out.lora_magnitude_vector.default.weight",
         ("unet.conv_out", "magnitude")),
        ("lora_unet_conv_in.lora_mid.weight", ("unet.conv_in", "mid")),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc2.dora_scale",
         ("text_encoder.text_model.encoder.layers.0.mlp.fc2", "dora_scale")),
        ("unet.conv_in.weight", None),
        ("lora_unet_conv_in.hada_w1_a", None),
        ("lora_unet_no_such_module.alpha", None),
    ],
)  # fmt: skip
def test_key_spellings(key: str, expected: tuple[str, str] | None) -> None:
    assert parse_key(key, name_resolver()) == expected


def test_left_over_keys_are_listed() -> None:
    keys = ["unet.conv_in.lora_A.weight", "unet.conv_in.weight", "something.else"]
    with pytest.raises(
        AdapterFormatError, match=r"2 keys .*something\.else, unet\.conv_in\.weight"
    ):
        group_keys(keys, name_resolver())


def test_other_methods_are_named() -> None:
    with pytest.raises(AdapterFormatError, match="LoHa"):
        group_keys(["lora_unet_conv_in.hada_w1_a"], name_resolver())


# What LyCORIS calls its methods -> what we call them; None for those that are read.
LYCORIS_METHODS = {
    "lora": None, "locon": None, "dylora": None, "loha": "LoHa", "lokr": "LoKr", "ia3": "IA3",
    "glora": "GLoRA", "tlora": "T-LoRA", "diag-oft": "OFT or BOFT", "boft": "OFT or BOFT",
    "full": "full differences",
}  # fmt: skip


@pytest.mark.parametrize("method", LYCORIS_METHODS)
def test_every_method_of_lycoris_is_read_or_named(method: str) -> None:
    """By the keys that LyCORIS itself saves; and what to do is said."""
    from lycoris import LycorisNetwork, create_lycoris

    model = nn.Module()
    model.conv_in, model.conv_out = nn.Conv2d(4, 16, 3), nn.Conv2d(16, 4, 3)
    LycorisNetwork.apply_preset({"target_module": ["Conv2d"]})
    network = create_lycoris(model, linear_dim=4, conv_dim=4, conv_alpha=2.0, algo=method)
    network.apply_to()
    keys = list(network.state_dict())
    assert {key.partition(".")[0] for key in keys} == {"lycoris_conv_in", "lycoris_conv_out"}
    expected = LYCORIS_METHODS[method]
    if expected is None:
        assert group_keys(keys, name_resolver()).keys() == {"unet.conv_in", "unet.conv_out"}
        return
    with pytest.raises(AdapterFormatError) as caught:
        group_keys(keys, name_resolver())
    assert str(caught.value).startswith(f"it holds {expected}, which is no part of a LoRA or DoRA;")
    assert "no known module" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "method"),
    [
        (["base_model.model.down_blocks.0.attentions.0.proj_in.ia3_l"], "IA3"),
        (["base_model.model.conv_in.oft_R.weight"], "OFT or BOFT"),
        (["base_model.model.conv_in.vera_lambda_b", "base_model.vera_A"], "VeRA"),
        (["lora_unet_conv_in.up_list.0", "lora_unet_conv_in.down_list.0"], "DyLoRA"),
        (["lora_unet_conv_in.lora_up.bias", "lora_unet_conv_in.lora_up.weight"], "LoRA biases"),
        (["lora_unet_conv_in.w_norm", "lora_unet_conv_in.b_norm"], "norm weights"),
    ],
)
def test_methods_of_other_programs_are_named(keys: list[str], method: str) -> None:
    with pytest.raises(AdapterFormatError, match=f"it holds {method}"):
        group_keys(keys, name_resolver(), "unet")


def test_numbered_layers_are_told() -> None:
    with pytest.raises(AdapterFormatError, match="have numbers where other files have names"):
        group_keys(["unet:0:down", "unet:0:up", "text_encoder:3:up", "<s1>"], name_resolver())


def test_two_keys_for_one_tensor_are_listed() -> None:
    keys = ["unet.conv_in.lora_A.weight", "lora_unet_input_blocks_0_0.lora_down.weight"]
    with pytest.raises(AdapterFormatError, match="two keys for one tensor"):
        group_keys(keys, name_resolver())


def test_modules_that_share_a_spelling_are_refused() -> None:
    with pytest.raises(ValueError, match="could be"):
        spelling_table(["unet.a.b_c", "unet.a_b.c"])
    with pytest.raises(AdapterFormatError, match="share a name"):
        rename_one_to_one(["a.b", "a_b"], lambda name: name.replace(".", "_"), "test")


def test_names_of_the_model_decide() -> None:
    resolve = name_resolver(["unet.my_odd.block_1"])
    assert resolve("lora_unet_my_odd_block_1") == "unet.my_odd.block_1"
    assert resolve("lora_unet_conv_in") is None
