"""Module names in kohya's key format, with ``_`` instead of ``.``.

The replacement cannot be reversed by splitting (``proj_out``, ``to_out_0``, ``time_emb_proj``).
Names are therefore resolved by a table of the model's module names, or by the vocabulary of the
Stable Diffusion UNet and the CLIP text model, in which each name is unambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from dora_diffusion.config.families import (
    COMPONENTS,
    DENOISERS,
    FAMILIES,
    Family,
    denoiser_family,
    transformer_family,
)
from dora_diffusion.formats.names.modules import (
    NAMES,
    TOP_MODULES,
    USUAL_LAYOUT,
    UNetLayout,
    canonical,
    comfyui_name,
    known_layout,
    released_layout,
    renamed,
    split_component,
    transformer_paths,
    unet_names,
)

# ComfyUI's prefixes of transformers, for original names and for those of Diffusers.
TRANSFORMER_PREFIXES = ("diffusion_model.", "transformer.")
_ENCODERS = [encoder for family in FAMILIES.values() for encoder in family.text_encoders]
KOHYA_PREFIXES = {"lora_unet_": "unet", **{e.kohya_prefix: e.component for e in _ENCODERS}}
_INSIDE = [
    (f"diffusion_model.{e.checkpoint_prefix}".replace(".", "_"), e.component)
    for e in _ENCODERS
    if e.is_in_denoiser
]
LYCORIS_PREFIX = "lycoris_"  # Used by the wrapper of LyCORIS for any wrapped model.
# Adaptable modules; `#` stands for a number.
_ATTENTION = NAMES["attention"]
_RESNET = [name for name in NAMES["unet_resnet"] if not name.startswith("norm")]
UNET_MODULES = (
    *(name for name in TOP_MODULES if "norm" not in name),
    *(
        f"{block}.{leaf}"
        for side in ("mid_block", "down_blocks.#", "up_blocks.#")
        for block, leaves in ((f"{side}.resnets.#", _RESNET), (f"{side}.attentions.#", _ATTENTION))
        for leaf in leaves
    ),
    "down_blocks.#.downsamplers.0.conv",
    "up_blocks.#.upsamplers.0.conv",
)
TEXT_MODULES = (
    *(f"text_model.{name}" for name in NAMES["text_layer"]),
    *NAMES["text_layer"],
    "text_projection",
    *NAMES["conditioner"],
)
_UNET_STARTS = {name.split(".")[0] for name in UNET_MODULES}
_SGM_STARTS = {original.split(".")[0] for original in unet_names(USUAL_LAYOUT).canonical}

_RELEASED_LAYOUTS = [
    USUAL_LAYOUT,
    *(released_layout(family) for family in FAMILIES.values() if family.has_unet),
]


class Resolve(NamedTuple):
    """Names of a file's modules.

    Attributes:
        flat: Function from a name in kohya's key format to the canonical name; None if unknown.
        paths: Diffusers' path of each module of the file's transformer, by both of its names.
    """

    flat: Callable[[str], str | None]
    paths: Mapping[str, str]

    def __call__(self, name: str) -> str | None:
        return self.flat(name)


def kohya_name(name: str, family: Family, layout: UNetLayout = USUAL_LAYOUT) -> str | None:
    """Return kohya's name of a module, or None.

    Args:
        name: Canonical module name.
        family: Family of the model.
        layout: Layout of the UNet, for families with names of the original blocks.
    """
    component, path = split_component(name)
    if component == "transformer":
        return comfyui_name(path, family.code)
    if component != "unet":
        encoder = family.text_encoder(component)
        if encoder is not None and encoder.is_in_denoiser:
            return f"diffusion_model.{encoder.checkpoint_prefix}{path}"
        return None if encoder is None else encoder.kohya_prefix + path.replace(".", "_")
    by_blocks = family.kohya_names_original_blocks
    original = unet_names(layout).to_original(path) if by_blocks else path
    return None if original is None else "lora_unet_" + original.replace(".", "_")


def is_kohya_name(key: str) -> bool:
    """Return whether a key has a prefix of kohya's scripts or LyCORIS."""
    # Incompletely renamed keys have a dot after it: `lora_unet.conv_in.lora_magnitude_vector`.
    return key.replace(".", "_").startswith((*KOHYA_PREFIXES, LYCORIS_PREFIX))


def component_of(path: str) -> str | None:
    """Return the component of a module path without prefix; None if unknown.

    UNets and text encoders are identified by the first word, transformers by the whole path.
    """
    top = path.split(".")[0]
    if path in transformer_paths() or transformer_family(path):
        return "transformer"
    if top in _UNET_STARTS | _SGM_STARTS:
        return "unet"
    text = ("text_model", "encoder", "embeddings", "text_projection")
    return "text_encoder" if top in text else None


def is_sgm_path(path: str) -> bool:
    """Return whether a UNet path has a name of the original blocks."""
    return path.split(".")[0] in _SGM_STARTS


def joined_parts(name: str) -> list[str]:
    """Return the canonical names of a joined attention projection; empty for other names."""
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" for part in NAMES["joined"].get(leaf, ())]


def name_resolver(
    known: Iterable[str] | None = None, layout: UNetLayout | None = None, family: str = ""
) -> Resolve:
    """Return the canonical names of modules by their names in files.

    Args:
        known: Canonical module names of the model. They have precedence over the vocabulary.
        layout: UNet layout for original block names. Default: the layout of the known names or of
            the released models.
        family: Name of the file's family. Default: that of the known names; else all.
    """
    names = {name for name in known or () if name.partition(".")[0] in COMPONENTS}
    layout = layout or known_layout(names)
    layouts = [layout] if layout else _RELEASED_LAYOUTS
    paths = transformer_paths(denoiser_family(names) or family)
    flat_paths = _with_underscores(paths)
    if known is None:
        return Resolve(lambda flat: _by_vocabulary(flat, layouts, flat_paths), paths)
    table = kohya_table(names)

    def resolve(flat: str) -> str | None:
        name = table.get(flat) or _by_vocabulary(flat, layouts, flat_paths)
        projections = joined_parts(name) if name else []
        is_joined = projections and names.issuperset(projections)
        return name if name in names or is_joined else None

    return Resolve(resolve, paths)


def kohya_table(names: Iterable[str]) -> dict[str, str]:
    """Return a table from names in kohya's key format to canonical names of known modules.

    Raises:
        ValueError: If two modules share a name.
    """
    names = list(names)
    table: dict[str, str] = {}
    for flat, name in _flat_names(names):
        if table.setdefault(flat, name) != name:
            raise ValueError(f"{flat!r} could be {table[flat]!r} or {name!r}")
    return table


def _flat_names(names: list[str]) -> Iterable[tuple[str, str]]:
    layout = known_layout(names)
    for name in names:
        component, path = split_component(name)
        paths = [path]
        if component == "unet" and layout and (original := unet_names(layout).to_original(path)):
            paths.append(original)
        elif component != "unet":
            paths.append(path.removeprefix("text_model."))
        prefixes = [prefix for prefix, owner in KOHYA_PREFIXES.items() if owner == component]
        if component in (*DENOISERS, "text_encoder"):
            prefixes.append(LYCORIS_PREFIX)
        yield from ((prefix + p.replace(".", "_"), name) for prefix in prefixes for p in paths)


def _by_vocabulary(flat: str, layouts: list[UNetLayout], paths: Mapping[str, str]) -> str | None:
    transformers = (prefix.replace(".", "_") for prefix in TRANSFORMER_PREFIXES)
    denoisers = [(prefix, "unet") for prefix in (LYCORIS_PREFIX, *transformers)]
    prefixes = [*KOHYA_PREFIXES.items(), *_INSIDE, *denoisers, (LYCORIS_PREFIX, "text_encoder")]
    for prefix, component in prefixes:
        if flat.startswith(prefix):
            path = flat.removeprefix(prefix)
            dotted = _unet_path(path, layouts) if component == "unet" else _dotted(path, _TEXT)
            if dotted:
                return canonical(component, dotted)
            if component == "unet" and (dotted := paths.get(path)):
                return canonical("transformer", dotted)
    return None


def _unet_path(flat: str, layouts: list[UNetLayout]) -> str | None:
    original = (renamed(flat, _flat_blocks(layout), "_") for layout in layouts)
    return next(filter(None, (_dotted(path, _UNET) for path in (flat, *original) if path)), None)


@lru_cache
def _flat_blocks(layout: UNetLayout) -> dict[str, str]:
    return unet_names(layout).with_underscores().canonical


def _with_underscores(paths: Mapping[str, str]) -> dict[str, str]:
    return {path.replace(".", "_"): name for path, name in paths.items()}


def _compile(templates: Iterable[str]) -> list[tuple[re.Pattern[str], str]]:
    return [
        (re.compile(re.escape(template.replace(".", "_")).replace(r"\#", r"(\d+)")), template)
        for template in templates
    ]


_UNET, _TEXT = _compile(UNET_MODULES), _compile(TEXT_MODULES)


def _dotted(flat: str, vocabulary: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in vocabulary:
        if match := pattern.fullmatch(flat):
            return template.replace("#", "{}").format(*match.groups())
    return None
