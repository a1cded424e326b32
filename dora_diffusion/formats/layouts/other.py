"""Detection of the layout of a file, and files without a known layout."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from importlib import import_module

from dora_diffusion.config.wording import listing
from dora_diffusion.formats.layouts import FACTS, LAYOUTS
from dora_diffusion.formats.layouts.dotted import is_old_form, mixes_forms
from dora_diffusion.formats.layouts.layout import (
    AdapterFormatError,
    AdapterLayout,
    Fields,
    Groups,
    Layers,
    some_layers,
)
from dora_diffusion.formats.names.kohya import Resolve

# Modules of the layouts, if not named after them. Each layout is a constant, such as `KOHYA`.
_MODULES = {
    "diffusers": "dotted", "peft": "dotted", "attn_procs": "dotted", "onetrainer": "dotted",
    "comfyui": "kohya", "dense": "kohya",
}  # fmt: skip

# Method -> pattern of keys that identify it.
_METHODS = {method: re.compile(facts["keys"]) for method, facts in FACTS["methods"].items()}
_PREFIX_TWICE = re.compile(r"(lora_unet_unet|lora_te\d?_te\d?|lora_te\d?_text_encoder)_.*")
_MERGE = "merge it with the program that trained it, and use the merged model"
# Key prefixes of whole models, in the original layout and in Diffusers'.
_MODEL_KEYS = (
    "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.",
    "down_blocks.0.resnets.0.norm1.weight", "text_model.embeddings.", "embeddings.",
    "cap_embedder.1.weight",
)  # fmt: skip


def layout_named(name: str) -> AdapterLayout:
    """Return a layout by its name."""
    module = import_module(f"{__package__}.{_MODULES.get(name, name)}")
    layout: AdapterLayout = getattr(module, name.upper())
    return layout


def all_layouts() -> list[AdapterLayout]:
    return [layout_named(name) for name in LAYOUTS]


class Other(AdapterLayout):
    """Files with keys of no known program, or of several programs."""

    def judge(self, layers: Layers, norm_axis: str, keys: Collection[str]) -> dict[str, str]:
        tools = super().judge(layers, norm_axis, keys)
        if left_out := _left_out_by_diffusers(keys):
            tools["diffusers"] = f"wrong: it leaves {some_layers(left_out)} unchanged"
        return tools

    def advice(self, norm_axis: str, keys: Collection[str]) -> list[str]:
        notes = super().advice(norm_axis, keys)
        if left_out := _left_out_by_diffusers(keys):
            notes.insert(
                0,
                f"it mixes two ways to name the factors: diffusers leaves {some_layers(left_out)} "
                "unchanged without a message",
            )
        return notes


OTHER = Other()


def _left_out_by_diffusers(keys: Iterable[str]) -> list[str]:
    """Return the UNet layers that Diffusers silently ignores in a file with mixed names.

    Diffusers renames UNet keys only if the first key in alphabetical order is not PEFT's.
    """
    unet = sorted(key.removeprefix("unet.") for key in keys if key.startswith("unet."))
    if not unet or "lora_A" not in unet[0] or not mixes_forms(unet):
        return []
    old = [key.replace(".processor.", ".") for key in unet if is_old_form(key)]
    return sorted({re.sub(r"[._]lora(_linear_layer)?\.(down|up)\.weight$", "", k) for k in old})


def group_keys(keys: Iterable[str], resolve: Resolve, component: str | None = None) -> Groups:
    """Group the keys of a file by layer: canonical module name -> part -> key.

    Each key is parsed by the first layout that recognizes it. Unknown keys are an error, since
    skipping them would silently load half an adapter.

    Args:
        keys: Keys of the file, without trained tokens.
        resolve: Function of `name_resolver`.
        component: Component of keys without a component, in a PEFT folder.

    Raises:
        AdapterFormatError: If a key is unknown, or two keys are the same part of a layer.
    """
    layouts = all_layouts()
    layers: Groups = {}
    keys = list(keys)
    if not keys:
        raise AdapterFormatError("the file holds no adapter: it has no tensors")
    left_over, twice = [], []
    for text in keys:
        parsed = ((layout, key) for layout in layouts if (key := layout.parse(text)))
        layout, key = next(parsed, (None, None))
        name = layout.module(key, resolve, component) if layout and key else None
        if name is None or key is None:
            left_over.append(text)
            continue
        if key.part in layers.setdefault(name, {}):
            twice.append(f"{layers[name][key.part].text} and {text}")
        layers[name][key.part] = key
    if twice:
        raise AdapterFormatError(f"two keys for one tensor: {listing(twice)}")
    if left_over:
        raise AdapterFormatError(_left_over_message(left_over))
    return layers


def _left_over_message(keys: list[str]) -> str:
    if any(key.startswith(_MODEL_KEYS) for key in keys):
        return f"it is a model, not an adapter: {listing(keys, 3)}"
    if sentence := _other_method(keys):
        return f"{sentence} (keys such as {listing(keys, 3)})"
    return f"{len(keys)} keys belong to no known module: {listing(keys)}"


def _other_method(keys: Collection[str]) -> str | None:
    """Return a sentence on the method that keys belong to; None if it is unknown."""
    is_bundled = any(map(_METHODS["embeddings bundled with the adapter"].fullmatch, keys))
    if any(map(_PREFIX_TWICE.fullmatch, keys)) and not is_bundled:
        return (
            "its names have the component's prefix twice, as a broken converter wrote them, so "
            "that no program finds its layers; convert the file that it was made from again"
        )
    for method, pattern in _METHODS.items():
        if any(map(pattern.fullmatch, keys)):
            advice = FACTS["methods"][method].get("advice", _MERGE)
            return f"it holds {method}, which is not part of a LoRA or DoRA; {advice}"
    return None


def layout_of(keys: Collection[str], metadata: Fields) -> AdapterLayout:
    """Return the layout of a file; `OTHER` if it has no known layout."""
    return next((layout for layout in all_layouts() if layout.matches(keys, metadata)), OTHER)
