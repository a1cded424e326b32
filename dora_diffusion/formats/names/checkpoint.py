"""Tensor names of whole models: canonical ones, and those of the original single files.

model.diffusion_model.      the UNet, in sgm blocks
first_stage_model.          the VAE; `decoder.up` is numbered from the output's side
cond_stage_model.           SD1: CLIP; SD2: open_clip, with q, k, v in one matrix
conditioner.embedders.0/1.  SDXL: CLIP, and open_clip with a transposed projection
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from dora_diffusion.config.families import FAMILIES, Family
from dora_diffusion.formats.names.modules import with_text_model
from dora_diffusion.formats.names.unet import NameTable, UNetLayout, unet_names

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
_CLIP_PREFIXES = [
    encoder.checkpoint_prefix
    for family in FAMILIES.values()
    for encoder in family.text_encoders
    if not encoder.is_open_clip
]
# The rows of a matrix that holds several projections, one below the other.
ROWS = ("#q", "#k", "#v")
_OPEN_CLIP_TOP = (
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
)
_OPEN_CLIP_LAYER = (
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    *(
        (f"self_attn.{row[1:]}_proj.{parameter}", f"attn.in_proj_{parameter}{row}")
        for row in ROWS
        for parameter in ("weight", "bias")
    ),
)
# More than the largest text encoder of CLIP has; SD2's has 23, SDXL's second one 32.
_MOST_LAYERS = 64
# The autoencoder, today's Diffusers and the original layout.
_VAE_ATTENTION = (
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
)
_VAE_RESNET = (
    *((leaf, leaf) for leaf in ("norm1", "conv1", "norm2", "conv2")),
    ("conv_shortcut", "nin_shortcut"),
)
_VAE_TOP = (("conv_in", "conv_in"), ("conv_out", "conv_out"), ("conv_norm_out", "norm_out"))
# More than a level of a known autoencoder has: released encoders have two, decoders three.
_MOST_RESNETS = 8
_LEVEL = re.compile(r"decoder\.up(?:_blocks)?\.(\d+)\.")
_PROJECTION = re.compile(r".*\.mid\.attn_1\.(q|k|v|proj_out)\.weight")


@lru_cache
def checkpoint_names(family: Family, unet: UNetLayout, vae_levels: int) -> NameTable:
    """All tensors that a single file of a family may hold."""
    pairs = unet_names(unet).below("unet.", UNET_PREFIX)
    pairs += vae_names(vae_levels).below("vae.", VAE_PREFIX)
    for encoder in family.text_encoders:
        component, prefix = encoder.component, encoder.checkpoint_prefix
        if encoder.is_open_clip:
            pairs += NameTable(_open_clip_pairs()).below(f"{component}.", prefix)
        else:
            pairs.append((component, prefix.removesuffix(".")))
    return NameTable(pairs)


def _open_clip_pairs() -> Iterator[tuple[str, str]]:
    yield from _OPEN_CLIP_TOP
    for layer in range(_MOST_LAYERS):
        name, original = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for leaf, original_leaf in _OPEN_CLIP_LAYER:
            yield f"{name}.{leaf}", f"{original}.{original_leaf}"


def standard_key(key: str) -> str:
    """The name that a tensor should have: some programs drop or repeat CLIP's ``text_model.``.

    Without it most programs leave the text encoder as it was, or do not load the file at all.
    """
    for prefix in _CLIP_PREFIXES:
        if key.startswith(prefix):
            return prefix + with_text_model(key.removeprefix(prefix))
    return key


@lru_cache
def vae_names(levels: int) -> NameTable:
    """The modules of an autoencoder with so many resolution levels."""
    return NameTable(_vae_pairs(levels))


def _vae_pairs(levels: int) -> Iterator[tuple[str, str]]:
    yield from ((name, name) for name in ("quant_conv", "post_quant_conv"))
    for side, blocks in (("encoder", "down"), ("decoder", "up")):
        yield from _below(_VAE_TOP, side, side)
        yield from _below(_VAE_ATTENTION, f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1")
        for i in range(2):
            yield from _below(
                _VAE_RESNET, f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}"
            )
        for level in range(levels):
            # The original decoder numbers its levels from the output's side.
            number = level if side == "encoder" else levels - 1 - level
            name, original = f"{side}.{blocks}_blocks.{level}", f"{side}.{blocks}.{number}"
            for i in range(_MOST_RESNETS):
                yield from _below(_VAE_RESNET, f"{name}.resnets.{i}", f"{original}.block.{i}")
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
    """Return whether a weight is a 1x1 convolution in the original layout, Linear in Diffusers."""
    return _PROJECTION.fullmatch(original) is not None
