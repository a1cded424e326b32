"""Tensor names of adapter files: which layer a key belongs to, and which part of it.

Read here: PEFT (``base_model.model.<module>.lora_A.weight``), diffusers old and new
(``unet.<module>.lora_A.weight``, ``.lora.down.weight``, ``processor.to_q_lora.down.weight``,
``text_encoder.<module>.lora_linear_layer.down.weight``), kohya and LyCORIS
(``lora_unet_<module>.lora_down.weight``), OneTrainer's (original blocks with dots, bare or behind
``unet.`` or ``diffusion_model.``). A key that nothing claims, or two keys for one tensor,
is an error that lists them: a loader that skips keys loads half an adapter without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from dora_diffusion.families import COMPONENTS
from dora_diffusion.formats.adapter.other_methods import other_method
from dora_diffusion.formats.names.modules import (
    KOHYA_PREFIXES,
    LYCORIS_PREFIX,
    canonical,
    component_of,
    is_sgm_path,
    resolve_by_structure,
    spelling_table,
    split_prefix,
)
from dora_diffusion.formats.names.sgm_blocks import USUAL_LAYOUT, UNetLayout

# Projections trained as one matrix, one below the other -> their own names.
_JOINED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "in_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}

# down and up are A and B; mid is the core of a Tucker-decomposed convolution. A `magnitude` is
# PEFT's (always the output axis), a `dora_scale` tells its axis by its shape.
Part = Literal["down", "up", "mid", "alpha", "magnitude", "dora_scale"]
Resolve = Callable[[str], "str | None"]

PEFT_PREFIX = "base_model.model."

_DOWN_UP: dict[str, Part] = {"A": "down", "B": "up", "down": "down", "up": "up"}
_KOHYA_PARTS: dict[str, Part] = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "magnitude": "magnitude",  # ai-toolkit: one per output, Linear only
    "lora_down": "down",  # ai-toolkit's first DoRA, with (1, in) magnitudes
    "lora_up": "up",
}
# The optional name in `.lora_A.default.weight` is the PEFT adapter's; it is not part of the module.
_DOTTED = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<ab>A|B)(?:\.[\w-]+)?\.weight"
    r"|\.(?:lora|lora_linear_layer)\.(?P<updown>down|up)\.weight"
    r"|\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|_lora\.(?P<processor>down|up)\.weight"
    r"|\.lora_magnitude_vector(?P<magnitude>(?:\.[\w-]+)*)"
    r"|\.(?P<other>alpha|dora_scale|magnitude))"
)
# Attention processors of early diffusers named the text encoder's projections as the UNet's.
_OLD_TEXT_LEAVES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class AdapterFormatError(ValueError):
    """An adapter file that cannot be read, or an adapter that a format cannot hold."""


def is_kohya_key(key: str) -> bool:
    """Whether a key is spelled as kohya's scripts and LyCORIS spell it."""
    # With a dot after the prefix, too: `lora_unet.conv_in.lora_magnitude_vector`, half renamed.
    return key.replace(".", "_").startswith((*KOHYA_PREFIXES, LYCORIS_PREFIX))


def is_ai_toolkit_key(key: str) -> bool:
    """Whether a key is a magnitude of ai-toolkit's DoRA."""
    return key.endswith(".magnitude")


def name_resolver(known: Iterable[str] | None = None, layout: UNetLayout | None = None) -> Resolve:
    """Function from a kohya-style module name to the canonical name (None if unknown).

    Args:
        known: Canonical module names of the model. They decide where given.
        layout: UNet layout for original block names, the released SDXL's if None.
    """
    by_structure = layout or USUAL_LAYOUT
    if known is None:
        return lambda flat: resolve_by_structure(flat, by_structure)
    names = {name for name in known if name.partition(".")[0] in COMPONENTS}
    table = spelling_table(names)

    def resolve(flat: str) -> str | None:
        name = table.get(flat) or resolve_by_structure(flat, by_structure)
        parts = joined_parts(name) if name else []
        return name if name in names or (parts and names.issuperset(parts)) else None

    return resolve


def joined_parts(name: str) -> list[str]:
    """Canonical names that a joined attention projection stands for; empty for any other name."""
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" for part in _JOINED.get(leaf, ())]


def parse_key(key: str, resolve: Resolve, component: str | None = None) -> tuple[str, Part] | None:
    """Canonical module name and part of one key, None if the key is not understood.

    Args:
        key: Tensor name in the file.
        resolve: From ``name_resolver``.
        component: What keys without a component prefix belong to, e.g. in a PEFT folder. Told by
            the module path if None.
    """
    if is_kohya_key(key):
        return _parse_kohya_key(key, resolve)
    said, path = split_prefix(key.removeprefix(PEFT_PREFIX))
    match = _DOTTED.fullmatch(path.replace(".processor.", "."))
    if match is None:
        return None
    component = said or component or component_of(match["module"])
    if component == "unet" and is_sgm_path(match["module"]):
        # OneTrainer's OMI, COMFY and ORIGINAL files: original block names, with dots.
        name = resolve("lora_unet_" + match["module"].replace(".", "_"))
        return None if name is None else (name, _part(match))
    if component is None:
        return None
    return canonical(component, _modern_path(match["module"], component)), _part(match)


def _parse_kohya_key(key: str, resolve: Resolve) -> tuple[str, Part] | None:
    # diffusers' own converter leaves `lora_unet_..._attn1.to_q.lora_magnitude_vector` behind.
    flat, half_renamed, _ = key.partition(".lora_magnitude_vector")
    if half_renamed:
        name = resolve(flat.replace(".", "_"))
        return None if name is None else (name, "magnitude")
    for leaf, part in _KOHYA_PARTS.items():
        if key.endswith(f".{leaf}"):
            # Inside OneTrainer the prefix alone is joined by a dot: `lora_unet.conv_in.alpha`.
            name = resolve(key.removesuffix(f".{leaf}").replace(".", "_"))
            return None if name is None else (name, part)
    return None


def _part(match: re.Match[str]) -> Part:
    if match["magnitude"] is not None:
        return "magnitude"
    if match["kohya"] == "mid":
        return "mid"
    side = match["ab"] or match["updown"] or match["kohya"] or match["processor"]
    if side:
        return _DOWN_UP[side]
    return _KOHYA_PARTS[match["other"]]


def _modern_path(path: str, component: str) -> str:
    parent, _, leaf = path.rpartition(".")
    if component != "unet" and leaf in _OLD_TEXT_LEAVES:
        return f"{parent}.{_OLD_TEXT_LEAVES[leaf]}"
    # The first attention processors dropped the index of `to_out.0`.
    return f"{path}.0" if component == "unet" and leaf == "to_out" else path


def group_keys(
    keys: Iterable[str], resolve: Resolve, component: str | None = None
) -> dict[str, dict[Part, str]]:
    """Sort a file's keys into layers: canonical module name -> part -> key.

    Raises:
        AdapterFormatError: If a key is left over, or two keys are the same part of one layer.
    """
    layers: dict[str, dict[Part, str]] = {}
    left_over, twice = [], []
    for key in keys:
        parsed = parse_key(key, resolve, component)
        if parsed is None:
            left_over.append(key)
            continue
        name, part = parsed
        if part in layers.setdefault(name, {}):
            twice.append(f"{layers[name][part]} and {key}")
        layers[name][part] = key
    if twice:
        raise AdapterFormatError(f"two keys for one tensor: {listing(twice)}")
    if left_over:
        raise AdapterFormatError(_left_over_message(left_over))
    return layers


# What a whole model holds, in the original layout and in diffusers'.
_MODEL_KEYS = (
    "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.",
    "down_blocks.0.resnets.0.norm1.weight", "text_model.embeddings.", "embeddings.",
)  # fmt: skip


def _left_over_message(keys: list[str]) -> str:
    if any(key.startswith(_MODEL_KEYS) for key in keys):
        return f"it is a model, not an adapter: {listing(keys, 3)}"
    if sentence := other_method(keys):
        return f"{sentence} (keys such as {listing(keys, 3)})"
    return f"{len(keys)} keys belong to no known module: {listing(keys)}"


def listing(names: Iterable[str], limit: int = 10) -> str:
    """Some names for an error message, with the number of those left out."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def rename_one_to_one(
    names: Iterable[str], rename: Callable[[str], str | None], what: str
) -> dict[str, str]:
    """Apply a rename that must be one-to-one and total: name -> new name.

    Raises:
        AdapterFormatError: If a name has no new name, or two names get the same.
    """
    renamed = {name: rename(name) for name in names}
    if missing := [name for name, new in renamed.items() if new is None]:
        raise AdapterFormatError(f"modules without a name in {what}: {listing(missing)}")
    found: dict[str, str] = {name: new for name, new in renamed.items() if new is not None}
    if twice := _repeated(found):
        raise AdapterFormatError(f"modules that would share a name in {what}: {listing(twice)}")
    return found


def _repeated(renamed: Mapping[str, str]) -> list[str]:
    owners: dict[str, list[str]] = {}
    for name, new in renamed.items():
        owners.setdefault(new, []).append(name)
    return [" and ".join(group) for group in owners.values() if len(group) > 1]
