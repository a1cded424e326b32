"""Every layer has a place, a kind and a block, in the order of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.formats.checkpoint.weights import module_shapes
from dora_diffusion.lab.analysis.changes import (
    KINDS,
    PLACES,
    block_of,
    kind_of,
    model_order,
    place_of,
)

UP = "unet.up_blocks.1.attentions.2"


@pytest.mark.parametrize(
    ("name", "shape", "place", "kind", "block"),
    [
        ("unet.conv_in", (8, 4, 3, 3), "UNet in and time", "convolution", "unet.conv_in"),
        ("unet.time_embedding.linear_1", (8, 4), "UNet in and time", "other",
         "unet.time_embedding.linear_1"),
        ("unet.down_blocks.0.resnets.1.conv1", (8, 8, 3, 3), "UNet down", "convolution",
         "unet.down_blocks.0.resnets.1"),
        ("unet.mid_block.attentions.0.proj_in", (8, 8), "UNet mid", "other",
         "unet.mid_block.attentions.0"),
        (f"{UP}.transformer_blocks.9.attn2.to_out.0", (8, 8), "UNet up", "attention", UP),
        (f"{UP}.transformer_blocks.0.ff.net.0.proj", (8, 8), "UNet up", "feed-forward", UP),
        ("unet.conv_out", (4, 8, 3, 3), "UNet out", "convolution", "unet.conv_out"),
        ("text_encoder.text_model.encoder.layers.11.self_attn.q_proj", (8, 8), "text encoder",
         "attention", "text_encoder.text_model.encoder.layers.11"),
        ("text_encoder_2.text_model.encoder.layers.3.mlp.fc1", (8, 8), "text encoder 2",
         "feed-forward", "text_encoder_2.text_model.encoder.layers.3"),
        ("text_encoder.text_model.embeddings.token_embedding", (9, 8), "text encoder", "embedding",
         "text_encoder.text_model.embeddings.token_embedding"),
    ],
)  # fmt: skip
def test_a_name_tells(name: str, shape: tuple[int, ...], place: str, kind: str, block: str) -> None:
    assert (place_of(name), kind_of(name, shape), block_of(name)) == (place, kind, block)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_all_layers_of_all_families_are_told_apart(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"{family}_folder")
    with PipelineFolder.open(folder) as pipeline:
        shapes = module_shapes(pipeline)
    assert {place_of(name) for name in shapes} == set(PLACES) - (
        set() if family == "sdxl" else {"text encoder 2"}
    )
    assert {kind_of(name, shape) for name, shape in shapes.items()} == set(KINDS)
    blocks = {block_of(name) for name in shapes if "attn" in name}
    assert len(blocks) >= 8
    ordered = sorted(shapes, key=model_order)
    places = [PLACES.index(place_of(name)) for name in ordered]
    assert places == sorted(places)


def test_numbers_are_ordered_as_numbers() -> None:
    names = [f"text_encoder.text_model.encoder.layers.{i}.mlp.fc1" for i in (10, 9, 1)]
    assert sorted(names, key=model_order) == names[::-1]
    embedding = "text_encoder.text_model.embeddings.token_embedding"
    assert sorted([*names, embedding], key=model_order)[0] == embedding
