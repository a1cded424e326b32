"""Tensor names of whole models: canonical ones, and those of the original single files.

model.diffusion_model.      the UNet, in sgm blocks
first_stage_model.          the VAE; `decoder.up` is numbered from the output's side
cond_stage_model.           SD1: CLIP; SD2: open_clip, with q, k, v in one matrix
conditioner.embedders.0/1.  SDXL: CLIP, and open_clip with a transposed projection
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from dora_diffusion.families import FAMILIES, Family
from dora_diffusion.formats.names.modules import with_text_model
from dora_diffusion.formats.names.table import NameTable
from dora_diffusion.formats.names.unet import UNetLayout, unet_names
from dora_diffusion.formats.names.vae import vae_names

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
