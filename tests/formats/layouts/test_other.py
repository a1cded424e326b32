"""Files of other methods are named, not called damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dora_diffusion.export import inspect_adapter
from dora_diffusion.formats.layouts.layout import AdapterFormatError, group_keys
from dora_diffusion.formats.names.kohya import name_resolver


def test_other_methods_are_named() -> None:
    with pytest.raises(AdapterFormatError, match="LoHa"):
        group_keys(["lora_unet_conv_in.hada_w1_a"], name_resolver())


def test_numbered_layers_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """Files of cloneofsimo/lora, with a trained token."""
    file = tmp_path / "lora.safetensors"
    pair = {"unet:0:down": torch.ones(1, 4), "unet:0:up": torch.ones(4, 1)}
    save_file({**pair, "<s1>": torch.ones(4)}, file, {"<s1>": "<embed>"})
    with pytest.raises(AdapterFormatError) as caught:
        inspect_adapter(file)
    assert str(caught.value).startswith(f"{file.name}: its layers have numbers for names, ")
    assert "'dora-diffusion extract --base BASE --tuned MODEL " in str(caught.value)


# What LyCORIS calls its methods -> what we call them; None for those that are read.
LYCORIS_METHODS = {
    "lora": None, "locon": None, "dylora": None, "loha": "LoHa", "lokr": None, "ia3": "IA3",
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
    assert str(caught.value).startswith(
        f"it holds {expected}, which is not part of a LoRA or DoRA;"
    )
    assert "no known module" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_unet_down_blocks_0_attentions_0_proj_in_lora_down.weight",
        "lora_unet_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "lora_te_text_encoder_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        "lora_te1_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
    ],
)
def test_a_prefix_that_is_there_twice_is_told(key: str) -> None:
    with pytest.raises(AdapterFormatError, match="have the component's prefix twice") as caught:
        group_keys([key], name_resolver())
    assert key in str(caught.value)
