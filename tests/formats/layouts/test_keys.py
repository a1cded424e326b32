"""Keys of adapter files: which layer and part each belongs to, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.formats.adapter.file import AdapterMetadata, read_adapter
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.layouts.kohya import kohya_names
from dora_diffusion.formats.layouts.layout import AdapterFormatError, WriteOptions, group_keys
from dora_diffusion.formats.names.kohya import name_resolver
from dora_diffusion.numerics.weights import LayerWeights
from tests.formats.adapter.helpers import (
    MakeAdapter,
    SameLayers,
    saved,
)


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
def test_key_formats(key: str, expected: tuple[str, str] | None) -> None:
    try:
        [(module, parts)] = group_keys([key], name_resolver()).items()
    except AdapterFormatError:
        assert expected is None
        return
    [(part, parsed)] = parts.items()
    assert (module, part) == expected
    assert parsed.text == key == parsed.path + parsed.form


def test_left_over_keys_are_listed() -> None:
    keys = ["unet.conv_in.lora_A.weight", "unet.conv_in.weight", "something.else"]
    with pytest.raises(
        AdapterFormatError, match=r"2 keys .*something\.else, unet\.conv_in\.weight"
    ):
        group_keys(keys, name_resolver())


def test_modules_that_share_a_name_are_refused() -> None:
    facts, factor = AdapterMetadata("sd1"), torch.ones(2, 2)
    layer = LayerWeights(factor, factor)
    with pytest.raises(AdapterFormatError, match=r"share a name .*: unet\.a\.b, unet\.a_b"):
        kohya_names({"unet.a.b": layer, "unet.a_b": layer}, WriteOptions(facts))
    with pytest.raises(AdapterFormatError, match=r"without a name in .*: text_encoder_2\.a"):
        kohya_names({"text_encoder_2.a": layer}, WriteOptions(facts))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_onetrainer_key_formats(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter,
    assert_same_layers: SameLayers,
) -> None:  # fmt: skip
    """Its older files are kohya's with diffusers' block names; the newer ones have dots.

    OMI's are of January 2025; COMFY and ORIGINAL, with PEFT's names of the factors, of 2026.

    Magnitudes run along the inputs, (1, in) and (1, in, 1, 1), unless it is told otherwise.
    """
    from dora_diffusion.formats.names.modules import released_layout, unet_names

    folder = request.getfixturevalue(f"{family}_folder")
    layers = random_adapter(folder, axis="input", every=3)
    shapes = PipelineFolder(folder)
    layout = released_layout(FAMILIES[family])
    prefixes = {
        "older": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
        "newer": {"unet": "unet", "text_encoder": "clip_l", "text_encoder_2": "clip_g"},
        "inside": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
        "comfy": {
            "unet": "diffusion_model",
            "text_encoder": "text_encoders.clip_l.transformer",
            "text_encoder_2": "text_encoders.clip_g.transformer",
        },
        "original": {"unet": "", "text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    }
    for key_format, names in prefixes.items():
        tensors = {}
        for name, layer in layers.items():
            component, _, path = name.partition(".")
            assert layer.magnitude is not None
            if key_format in ("newer", "comfy", "original") and component == "unet":
                path = str(unet_names(layout).to_original(path))
            joint = "_" if key_format == "older" else "."
            key = (names[component] + joint + path.replace(".", joint)).removeprefix(".")
            ones = [1] * (layer.down.ndim - 2)
            down, up = ("A", "B") if key_format in ("comfy", "original") else ("down", "up")
            tensors |= {
                f"{key}.lora_{down}.weight": layer.down,
                f"{key}.lora_{up}.weight": layer.up,
                f"{key}.alpha": torch.tensor(layer.alpha),
                f"{key}.dora_scale": layer.magnitude.view(1, -1, *ones),
            }
        file = saved(tmp_path, tensors)
        for adapter in (read_adapter(file), read_adapter(file, shapes)):
            assert_same_layers(adapter.layers, layers)
            assert adapter.notes == ()
    path = saved(tmp_path, {**tensors, "bundle_emb.sks.vector": torch.ones(1, 8)})
    with pytest.raises(AdapterFormatError, match="embeddings bundled with the adapter"):
        read_adapter(path)
