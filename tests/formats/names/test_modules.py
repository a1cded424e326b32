"""The blocks of UNets: Diffusers' levels and the original code's flat numbers."""

from __future__ import annotations

import pytest

from dora_diffusion.formats.names.modules import (
    TOP_MODULES,
    USUAL_LAYOUT,
    UNetLayout,
    released_layout,
    unet_names,
)
from tests.families import UNETS


@pytest.mark.parametrize(
    "layout",
    [
        *map(released_layout, UNETS.values()),
        UNetLayout(1, (False, True)),
        UNetLayout(3, (True, False)),
    ],
)
def test_sgm_blocks_are_one_to_one(layout: UNetLayout) -> None:
    names = [*dict(TOP_MODULES), "mid_block.resnets.1.conv1", "mid_block.attentions.0.proj_in"]
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
    table = unet_names(layout)
    originals = [table.to_original(name) for name in names]
    assert None not in originals
    assert len(set(originals)) == len(names)
    assert [table.to_canonical(original) for original in originals] == names
    assert UNetLayout.from_original_names(originals).layers_per_block == layout.layers_per_block
    assert UNetLayout.from_names(names) == layout


@pytest.mark.parametrize("text", ["0", "x", "1 up_attention=", "1 up_attention=12", "10"])
def test_what_is_no_layout_is_left_out(text: str) -> None:
    assert UNetLayout.from_text(text) is None
    assert UNetLayout.from_text(USUAL_LAYOUT.text()) == USUAL_LAYOUT
