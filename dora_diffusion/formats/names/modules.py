"""Module names of adapted layers, and their underscore spellings.

kohya-style files spell a module path with ``_`` for ``.``, which cannot be undone by splitting
(``proj_out``, ``to_out_0``, ``time_emb_proj``). Two exact ways back are used: a table built from
the module names of the model at hand, or the vocabulary of the Stable Diffusion UNet and of the
CLIP text model, in which each underscore name has at most one reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from dora_diffusion.families import COMPONENTS, FAMILIES, Family
from dora_diffusion.formats.names.sgm_blocks import (
    RESNET_MODULES,
    TOP_MODULES,
    USUAL_LAYOUT,
    UNetLayout,
    from_sgm,
    to_sgm,
)

KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    **{
        encoder.kohya_prefix: encoder.component
        for family in FAMILIES.values()
        for encoder in family.text_encoders
    },
}
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
LYCORIS_PREFIX = "lycoris_"  # LyCORIS' own wrapper: the path in whichever model was wrapped

# `#` stands for a number.
_ATTENTION = (
    "proj_in",
    "proj_out",
    *(
        f"transformer_blocks.#.{attention}.{leaf}"
        for attention in ("attn1", "attn2")
        for leaf in ("to_q", "to_k", "to_v", "to_out.0", "to_qkv", "to_kv")
    ),
    "transformer_blocks.#.ff.net.0.proj",
    "transformer_blocks.#.ff.net.2",
)
_RESNET = tuple(name for name in RESNET_MODULES if not name.startswith("norm"))
_UNET = (
    *(name for name in TOP_MODULES if "norm" not in name),
    *(f"mid_block.resnets.#.{leaf}" for leaf in _RESNET),
    *(f"mid_block.attentions.#.{leaf}" for leaf in _ATTENTION),
    *(f"{side}_blocks.#.resnets.#.{leaf}" for side in ("down", "up") for leaf in _RESNET),
    *(f"{side}_blocks.#.attentions.#.{leaf}" for side in ("down", "up") for leaf in _ATTENTION),
    "down_blocks.#.downsamplers.0.conv",
    "up_blocks.#.upsamplers.0.conv",
)
_SGM_RESNET = tuple(RESNET_MODULES[name] for name in _RESNET)
_SGM_UNET = (
    *(sgm for name, sgm in TOP_MODULES.items() if "norm" not in name),
    *(f"middle_block.#.{leaf}" for leaf in (*_SGM_RESNET, *_ATTENTION)),
    *(f"{side}_blocks.#.0.{leaf}" for side in ("input", "output") for leaf in _SGM_RESNET),
    *(f"{side}_blocks.#.1.{leaf}" for side in ("input", "output") for leaf in _ATTENTION),
    "input_blocks.#.0.op",
    "output_blocks.#.1.conv",
    "output_blocks.#.2.conv",
)
_TEXT_LAYER = (
    *(f"encoder.layers.#.self_attn.{leaf}_proj" for leaf in ("q", "k", "v", "out", "qkv")),
    "encoder.layers.#.self_attn.in_proj",
    "encoder.layers.#.mlp.fc1",
    "encoder.layers.#.mlp.fc2",
)
_TEXT = (*(f"text_model.{name}" for name in _TEXT_LAYER), *_TEXT_LAYER, "text_projection")


def _compile(templates: Iterable[str]) -> list[tuple[re.Pattern[str], str]]:
    compiled = []
    for template in templates:
        parts = [re.escape(part) for part in template.replace(".", "_").split("#")]
        compiled.append((re.compile(r"(\d+)".join(parts)), template))
    return compiled


_UNET_PATTERNS = _compile(_UNET)
_SGM_PATTERNS = _compile(_SGM_UNET)
_TEXT_PATTERNS = _compile(_TEXT)


def _dotted(flat: str, patterns: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in patterns:
        if match := pattern.fullmatch(flat):
            parts = template.split("#")
            return parts[0] + "".join(
                n + rest for n, rest in zip(match.groups(), parts[1:], strict=True)
            )
    return None


def with_text_model(path: str) -> str:
    """Text-encoder path with the ``text_model.`` that transformers >= 5.6 dropped, and one only."""
    while path.startswith("text_model.text_model."):
        path = path.removeprefix("text_model.")
    if path.startswith(("text_model.", "text_projection")):
        return path
    return f"text_model.{path}"


def canonical(component: str, path: str) -> str:
    """Canonical module name, e.g. ``unet.conv_in`` or ``text_encoder.text_model.encoder....``."""
    return f"{component}.{path if component == 'unet' else with_text_model(path)}"


def split_component(name: str) -> tuple[str, str]:
    """``"unet.conv_in"`` -> ``("unet", "conv_in")``.

    Raises:
        ValueError: If the name does not start with a known component.
    """
    component, _, path = name.partition(".")
    if component not in COMPONENTS or not path:
        raise ValueError(f"{name!r} does not start with one of {COMPONENTS}")
    return component, path


def component_of(path: str) -> str | None:
    """Component that a module path without prefix belongs to, by its first words."""
    top = path.split(".")[0]
    if top in {name.split(".")[0] for name in (*_UNET, *_SGM_UNET)}:
        return "unet"
    return "text_encoder" if top in ("text_model", "encoder", "text_projection") else None


def split_prefix(path: str) -> tuple[str | None, str]:
    """Component that a dotted name says, None if it says none, and the path behind it."""
    for prefix, component in COMPONENT_PREFIXES.items():
        if path.startswith(f"{prefix}."):
            return component, path.removeprefix(f"{prefix}.")
    return None, path


def is_sgm_path(path: str) -> bool:
    """Whether a UNet path starts as those of the original blocks do."""
    return path.split(".")[0] in {name.split(".")[0] for name in _SGM_UNET}


def kohya_name(name: str, family: Family, layout: UNetLayout = USUAL_LAYOUT) -> str | None:
    """Kohya spelling of a canonical module name, None if it has none.

    Args:
        name: Canonical module name.
        family: Of the model.
        layout: Of its UNet, for a family whose modules are named after the original blocks.
    """
    component, path = split_component(name)
    if component == "unet":
        renamed = to_sgm(path, layout) if family.kohya_names_original_blocks else path
        return None if renamed is None else "lora_unet_" + renamed.replace(".", "_")
    encoder = family.text_encoder(component)
    return None if encoder is None else encoder.kohya_prefix + path.replace(".", "_")


def resolve_by_structure(flat: str, layout: UNetLayout = USUAL_LAYOUT) -> str | None:
    """Canonical name of a kohya-style module name, by the vocabulary; None if it has none."""
    for prefix, component in KOHYA_PREFIXES.items():
        if flat.startswith(prefix):
            return _resolve_path(flat.removeprefix(prefix), component, layout)
    if not flat.startswith(LYCORIS_PREFIX):
        return None
    path = flat.removeprefix(LYCORIS_PREFIX)
    return _resolve_path(path, "unet", layout) or _resolve_path(path, "text_encoder", layout)


def _resolve_path(flat: str, component: str, layout: UNetLayout) -> str | None:
    if component != "unet":
        path = _dotted(flat, _TEXT_PATTERNS)
        return None if path is None else canonical(component, path)
    path = _dotted(flat, _UNET_PATTERNS)
    if path is None and (original := _dotted(flat, _SGM_PATTERNS)):
        path = from_sgm(original, layout)
    return None if path is None else f"unet.{path}"


def spelling_table(names: Iterable[str]) -> dict[str, str]:
    """Every kohya-style spelling of known canonical module names -> the canonical name.

    Raises:
        ValueError: If two modules share a spelling.
    """
    names = list(names)
    table: dict[str, str] = {}
    for spelling, name in _spellings(names):
        if table.setdefault(spelling, name) != name:
            raise ValueError(f"{spelling!r} could be {table[spelling]!r} or {name!r}")
    return table


def _spellings(names: list[str]) -> Iterable[tuple[str, str]]:
    layout = known_layout(names)
    for name in names:
        component, path = split_component(name)
        paths = [path]
        if component == "unet" and layout and (original := to_sgm(path, layout)):
            paths.append(original)
        elif component != "unet":
            paths.append(path.removeprefix("text_model."))
        prefixes = [prefix for prefix, owner in KOHYA_PREFIXES.items() if owner == component]
        if component != "text_encoder_2":
            prefixes.append(LYCORIS_PREFIX)
        for prefix in prefixes:
            for spelled in paths:
                yield prefix + spelled.replace(".", "_"), name


def known_layout(names: Iterable[str]) -> UNetLayout | None:
    """Layout of the UNet among canonical module names, None if they do not tell it."""
    paths = [name.removeprefix("unet.") for name in names if name.startswith("unet.")]
    try:
        return UNetLayout.from_names(paths)
    except ValueError:  # no UNet, or only some of its modules
        return None
