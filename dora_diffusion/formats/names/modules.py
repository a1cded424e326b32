"""Canonical module names, ``component.path``, and the components that names begin with."""

from __future__ import annotations

from dora_diffusion.config.families import COMPONENTS
from dora_diffusion.formats.names.unet import NameTable

# What dotted names start with -> component; of those that share a start, the longest first.
# OneTrainer's OMI files say `clip_l`, its COMFY files what ComfyUI calls its modules.
COMPONENT_PREFIXES = {
    "model.diffusion_model": "unet",
    "diffusion_model": "unet",
    "cond_stage_model.transformer": "text_encoder",
    "conditioner.embedders.0.transformer": "text_encoder",
    "text_encoders.clip_l.transformer": "text_encoder",
    "text_encoders.clip_g.transformer": "text_encoder_2",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    **{component: component for component in COMPONENTS},
}
# Ends of tensors that some layouts have and others do not.
BUFFERS = ("position_ids", "logit_scale", "attn_mask")
# Names that the first Diffusers releases gave an autoencoder.
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


def with_text_model(path: str) -> str:
    """Text-encoder path with the ``text_model.`` that transformers >= 5.6 dropped, and one only."""
    while path.startswith("text_model.text_model."):
        path = path.removeprefix("text_model.")
    if path.startswith(("text_model.", "text_projection")):
        return path
    return f"text_model.{path}"


def canonical(component: str, path: str) -> str:
    """Canonical name of a module or tensor of a component, e.g. ``unet.conv_in.weight``."""
    if component.startswith("text_encoder"):
        path = with_text_model(path)
    return f"{component}.{modern_vae_path(path) if component == 'vae' else path}"


def is_flat(text_encoder: object) -> bool:
    """Return whether a text encoder lacks ``text_model``, like those of transformers >= 5.6."""
    return not hasattr(text_encoder, "text_model")


def installed_path(name: str, *, flat: bool) -> str:
    """Path of a canonical module name in a live model, which may lack ``text_model`` (``flat``)."""
    path = name.partition(".")[2]
    return path.removeprefix("text_model.") if flat else path


def split_component(name: str) -> tuple[str, str]:
    """``"unet.conv_in"`` -> ``("unet", "conv_in")``.

    Raises:
        ValueError: If the name does not start with a known component.
    """
    component, _, path = name.partition(".")
    if component not in COMPONENTS or not path:
        raise ValueError(f"{name!r} does not start with one of {COMPONENTS}")
    return component, path


def split_prefix(path: str) -> tuple[str | None, str]:
    """Component that a dotted name says, None if it says none, and the path behind it."""
    for prefix, component in COMPONENT_PREFIXES.items():
        if path.startswith(f"{prefix}."):
            return component, path.removeprefix(f"{prefix}.")
    return None, path


def modern_vae_path(path: str) -> str:
    """Today's name of a tensor that an early Diffusers named."""
    return _EARLY.to_canonical(path) or path
