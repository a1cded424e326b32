"""Where a layer is in its model, by its canonical name: place, kind, block, order."""

from __future__ import annotations

import re

_PLACES = {"down_blocks": "UNet down", "mid_block": "UNet mid", "up_blocks": "UNet up"}
# In the order in which images pass them.
PLACES = (
    "text encoder",
    "text encoder 2",
    "UNet in and time",
    *_PLACES.values(),
    "UNet out",
)
KINDS = ("attention", "feed-forward", "convolution", "embedding", "other")
_BLOCK = re.compile(r".*?\.(?:resnets|attentions|downsamplers|upsamplers|layers)\.\d+")


def place_of(name: str) -> str:
    """The part of the model that a layer is in: one of ``PLACES``."""
    component, _, path = name.partition(".")
    if component != "unet":
        return component.replace("_", " ")
    first = path.partition(".")[0]
    return _PLACES.get(first, "UNet out" if first == "conv_out" else "UNet in and time")


def is_table(name: str) -> bool:
    """Whether a layer is a text encoder's table of vectors, an Embedding."""
    return name.endswith(("token_embedding", "position_embedding"))


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """What a layer of this weight shape does: one of ``KINDS``."""
    if re.search(r"\.(attn\d|self_attn)\.", name):
        return "attention"
    if re.search(r"\.(ff|mlp)\.", name):
        return "feed-forward"
    if is_table(name):
        return "embedding"
    return "convolution" if len(shape) > 2 else "other"


def block_of(name: str) -> str:
    """The resnet, stack of attention or layer of a text encoder that a layer belongs to.

    A layer of none is a block of its own.
    """
    match = _BLOCK.match(name)
    return match[0] if match else name


def model_order(name: str) -> tuple[int, list[int | str], str]:
    """A key that sorts layers as the model runs them, and numbers as numbers."""
    parts: list[int | str] = [
        int(part) if part.isdecimal() else part for part in block_of(name).split(".")
    ]
    return PLACES.index(place_of(name)), parts, name
