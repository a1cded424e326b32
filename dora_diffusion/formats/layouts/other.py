"""The layout of a file, and what a file of no layout of the list is read as, or is instead."""

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

# Each is the constant of its name, such as `KOHYA`, in the module of its name or in this one.
_MODULES = {
    "diffusers": "dotted", "peft": "dotted", "attn_procs": "dotted", "onetrainer": "dotted",
    "comfyui": "kohya", "dense": "kohya",
}  # fmt: skip

# Method -> the keys by which it is told.
_METHODS = {method: re.compile(facts["keys"]) for method, facts in FACTS["methods"].items()}
_PREFIX_TWICE = re.compile(r"(lora_unet_unet|lora_te\d?_te\d?|lora_te\d?_text_encoder)_.*")
_MERGE = "merge it with the program that trained it, and use the merged model"
# What a whole model holds, in the original layout and in diffusers'.
_MODEL_KEYS = (
    "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.",
    "down_blocks.0.resnets.0.norm1.weight", "text_model.embeddings.", "embeddings.",
)  # fmt: skip


def layout_named(name: str) -> AdapterLayout:
    """A layout of the list."""
    module = import_module(f"{__package__}.{_MODULES.get(name, name)}")
    layout: AdapterLayout = getattr(module, name.upper())
    return layout


def all_layouts() -> list[AdapterLayout]:
    return [layout_named(name) for name in LAYOUTS]


class Other(AdapterLayout):
    """Keys that no program of the list writes, or of several of them together."""

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
    """UNet layers that diffusers leaves unchanged, without a message, of a file that mixes names.

    It renames a UNet's keys only if the first one, in alphabetical order, is not PEFT's.
    """
    unet = sorted(key.removeprefix("unet.") for key in keys if key.startswith("unet."))
    if not unet or "lora_A" not in unet[0] or not mixes_forms(unet):
        return []
    old = [key.replace(".processor.", ".") for key in unet if is_old_form(key)]
    return sorted({re.sub(r"[._]lora(_linear_layer)?\.(down|up)\.weight$", "", k) for k in old})


def group_keys(keys: Iterable[str], resolve: Resolve, component: str | None = None) -> Groups:
    """Sort a file's keys into layers: canonical module name -> part -> key.

    A key is that of the first layout which understands it: a loader that skips keys silently loads
    half an adapter.

    Args:
        keys: Of a file, without its tokens.
        resolve: From `name_resolver`.
        component: What keys without a component belong to, in a PEFT folder.

    Raises:
        AdapterFormatError: If a key is left over, or two keys are the same part of one layer.
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
    """A sentence on what these keys belong to instead of a LoRA or DoRA, None if it is unknown."""
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
    """The layout of a file with these keys and metadata; `OTHER` where it has none of the list."""
    return next((layout for layout in all_layouts() if layout.matches(keys, metadata)), OTHER)
