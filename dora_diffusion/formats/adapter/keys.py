"""Tensor names of adapter files: which layer a key belongs to, and which part of it.

Read here: PEFT (``base_model.model.<module>.lora_A.weight``, of an Embedding
``<module>.lora_embedding_A``), diffusers old and new
(``unet.<module>.lora_A.weight``, ``.lora.down.weight``, ``processor.to_q_lora.down.weight``,
``text_encoder.<module>.lora_linear_layer.down.weight``), kohya and LyCORIS
(``lora_unet_<module>.lora_down.weight``), OneTrainer's (original blocks with dots, bare or behind
``unet.`` or ``diffusion_model.``). A key that nothing claims, or two keys for one tensor,
is an error that lists them: a loader that skips keys silently loads half an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal

from dora_diffusion.formats.adapter.other_methods import other_method
from dora_diffusion.formats.names.kohya import (
    KOHYA_PREFIXES,
    LYCORIS_PREFIX,
    Resolve,
    component_of,
    is_sgm_path,
)
from dora_diffusion.formats.names.modules import canonical, split_prefix
from dora_diffusion.wording import listing

# down and up are A and B; mid is the core of a Tucker-decomposed convolution. A `magnitude` is
# PEFT's (always the output axis), a `dora_scale` tells its axis by its shape.
Part = Literal["down", "up", "mid", "alpha", "magnitude", "dora_scale"]

PEFT_PREFIX = "base_model.model."

_FACTORS: dict[str, Part] = {"A": "down", "B": "up", "down": "down", "up": "up", "mid": "mid"}
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
    r"|\.lora_embedding_(?P<embedding>A|B)(?:\.[\w-]+)?"
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
    """Whether a key is in the key format of kohya's scripts and LyCORIS."""
    # With a dot after the prefix, too: `lora_unet.conv_in.lora_magnitude_vector`, half renamed.
    return key.replace(".", "_").startswith((*KOHYA_PREFIXES, LYCORIS_PREFIX))


def is_ai_toolkit_key(key: str) -> bool:
    """Whether a key is a magnitude of ai-toolkit's DoRA."""
    return key.endswith(".magnitude")


def is_embedding_key(key: str) -> bool:
    """Whether a key is a factor of an Embedding, as PEFT names it."""
    return ".lora_embedding_" in key


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
    stated, path = split_prefix(key.removeprefix(PEFT_PREFIX))
    match = _DOTTED.fullmatch(path.replace(".processor.", "."))
    if match is None:
        return None
    component = stated or component or component_of(match["module"])
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
    side = (
        match["ab"] or match["embedding"] or match["updown"] or match["kohya"] or match["processor"]
    )
    return _FACTORS[side] if side else _KOHYA_PARTS[match["other"]]


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
    owners: dict[str, list[str]] = {}
    for name, new in renamed.items():
        owners.setdefault(str(new), []).append(name)
    if repeated := [" and ".join(group) for group in owners.values() if len(group) > 1]:
        raise AdapterFormatError(f"modules that would share a name in {what}: {listing(repeated)}")
    return {name: new for new, (name,) in owners.items()}
