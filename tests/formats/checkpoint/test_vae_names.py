"""Names of autoencoders."""

from __future__ import annotations

import pytest

from dora_diffusion.formats.checkpoint.weights import count_levels, vae_names
from dora_diffusion.formats.names.modules import modern_vae_path


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_the_decoder_is_numbered_from_the_outputs_side(levels: int) -> None:
    table = vae_names(levels)
    for level in range(levels):
        name = f"decoder.up_blocks.{level}.resnets.0.conv_shortcut.weight"
        original = f"decoder.up.{levels - 1 - level}.block.0.nin_shortcut.weight"
        assert table.to_original(name) == original
        assert table.to_canonical(original) == name
    assert count_levels(table.canonical) == count_levels(table.original) == levels


@pytest.mark.parametrize(
    ("early", "name"),
    [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"),
     ("group_norm", "group_norm"), ("to_out.0", "to_out.0")],
)  # fmt: skip
def test_names_of_the_first_diffusers(early: str, name: str) -> None:
    attention = "encoder.mid_block.attentions.0"
    assert modern_vae_path(f"{attention}.{early}.bias") == f"{attention}.{name}.bias"
