"""Autoencoder names: today's Diffusers, the original layout, and the first Diffusers releases."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from dora_diffusion.formats.names.table import NameTable

_ATTENTION = (
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
)
_RESNET = (
    *((leaf, leaf) for leaf in ("norm1", "conv1", "norm2", "conv2")),
    ("conv_shortcut", "nin_shortcut"),
)
_TOP = (("conv_in", "conv_in"), ("conv_out", "conv_out"), ("conv_norm_out", "norm_out"))
# More than a level of a known autoencoder has: released encoders have two, decoders three.
_MOST_RESNETS = 8
_EARLY = NameTable(
    (f"{side}.mid_block.attentions.0.{name}", f"{side}.mid_block.attentions.0.{early}")
    for side in ("encoder", "decoder")
    for name, early in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    )
)
_LEVEL = re.compile(r"decoder\.up(?:_blocks)?\.(\d+)\.")
_PROJECTION = re.compile(r".*\.mid\.attn_1\.(q|k|v|proj_out)\.weight")


@lru_cache
def vae_names(levels: int) -> NameTable:
    """The modules of an autoencoder with so many resolution levels."""
    return NameTable(_pairs(levels))


def _pairs(levels: int) -> Iterator[tuple[str, str]]:
    yield from ((name, name) for name in ("quant_conv", "post_quant_conv"))
    for side, blocks in (("encoder", "down"), ("decoder", "up")):
        yield from _below(_TOP, side, side)
        yield from _below(_ATTENTION, f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1")
        for i in range(2):
            yield from _below(_RESNET, f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}")
        for level in range(levels):
            # The original decoder numbers its levels from the output's side.
            number = level if side == "encoder" else levels - 1 - level
            name, original = f"{side}.{blocks}_blocks.{level}", f"{side}.{blocks}.{number}"
            for i in range(_MOST_RESNETS):
                yield from _below(_RESNET, f"{name}.resnets.{i}", f"{original}.block.{i}")
            yield f"{name}.{blocks}samplers.0.conv", f"{original}.{blocks}sample.conv"


def _below(
    leaves: Iterable[tuple[str, str]], name: str, original: str
) -> Iterator[tuple[str, str]]:
    for leaf, original_leaf in leaves:
        yield f"{name}.{leaf}", f"{original}.{original_leaf}"


def count_levels(paths: Iterable[str]) -> int:
    """Number of resolution levels, from names in either layout, without prefix."""
    return 1 + max((int(m[1]) for path in paths if (m := _LEVEL.match(path))), default=0)


def is_projection_weight(original: str) -> bool:
    """Whether it is a 1x1 convolution in the original layout, and Linear in Diffusers."""
    return _PROJECTION.fullmatch(original) is not None


def modern_vae_path(path: str) -> str:
    """Today's name of a tensor that an early Diffusers named."""
    return _EARLY.to_canonical(path) or path
