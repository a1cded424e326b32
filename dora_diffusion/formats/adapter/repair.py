"""What is known to be broken in adapter files: what to say of it, and joined projections."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from dora_diffusion.formats.adapter.alpha import ALPHA_IS_RANK, AssumedAlpha
from dora_diffusion.formats.layouts.diffusers import PEFT_PREFIX
from dora_diffusion.formats.layouts.layout import AdapterFormatError
from dora_diffusion.formats.names.kohya import is_kohya_name, is_sgm_path, joined_parts
from dora_diffusion.formats.names.modules import split_prefix
from dora_diffusion.numerics.weights import LayerWeights


def split_joined(layers: Mapping[str, LayerWeights], notes: list[str]) -> dict[str, LayerWeights]:
    """Split joined projections, exactly: the rows of ``up`` and the magnitudes of the outputs.

    Raises:
        AdapterFormatError: If a magnitude runs along the inputs: its norms take in all parts.
    """
    split: dict[str, LayerWeights] = {}
    joined = 0
    for name, layer in layers.items():
        parts = joined_parts(name)
        if not parts:
            split[name] = layer
            continue
        joined += 1
        if layer.magnitude is not None and layer.norm_axis == "input":
            raise AdapterFormatError(
                f"{name}: its magnitudes were trained for {len(parts)} projections together, and "
                "cannot be split on the input axis"
            )
        if layer.up.shape[0] % len(parts):
            raise AdapterFormatError(f"{name} does not divide into {len(parts)} projections")
        ups = layer.up.chunk(len(parts))
        magnitudes = (
            [None] * len(parts) if layer.magnitude is None else layer.magnitude.chunk(len(parts))
        )
        for part, up, magnitude in zip(parts, ups, magnitudes, strict=True):
            if part in layers:
                raise AdapterFormatError(f"both {name} and {part} are in the file")
            split[part] = dataclasses.replace(layer, up=up.contiguous(), magnitude=magnitude)
    if joined:
        notes.append(f"{joined} joined attention projections were split into their parts")
    return split


def has_component(key: str) -> bool:
    """Whether a key says which component it belongs to."""
    component, path = split_prefix(key.removeprefix(PEFT_PREFIX))
    return is_kohya_name(key) or component is not None or is_sgm_path(path)


def key_notes(keys: Iterable[str]) -> list[str]:
    """What the format of a file's keys says about who broke it."""
    keys = list(keys)
    notes: list[str] = []
    kohya = any(is_kohya_name(key) for key in keys)
    magnitudes = [key for key in keys if "lora_magnitude_vector" in key]
    if kohya and magnitudes:
        notes.append(
            AssumedAlpha(
                f"{len(magnitudes)} magnitude keys were left half renamed by diffusers' own "
                f"converter, which also writes the rank for alpha; {ALPHA_IS_RANK}"
            )
        )
    bare = (k.startswith("text_encoder") and k.endswith(".lora_magnitude_vector") for k in keys)
    if any(bare):
        notes.append(
            "diffusers with transformers 5 silently drops its text-encoder magnitudes; "
            "converted to diffusers they are named so that every version reads them"
        )
    text = [
        k for k in keys if not has_component(k) and ("text_model." in k or "encoder.layers" in k)
    ]
    if text:
        notes.append(f"{len(text)} text-encoder keys lack their component, which was added")
    short = [k for k in keys if k.startswith("text_encoder") and ".text_model." not in k
             and ".encoder.layers." in k]  # fmt: skip
    if short:
        notes.append(f"{len(short)} text-encoder keys lack `text_model.`, which was added")
    return notes


def move_to_second_encoder(
    layers: Mapping[str, LayerWeights],
    shapes: Mapping[str, tuple[int, ...]],
    notes: list[str],
) -> dict[str, LayerWeights]:
    """Text-encoder layers of keys without a component, put where their shapes fit."""
    first, second = "text_encoder.", "text_encoder_2."
    names = [name for name in layers if name.startswith(first)]
    moved = [second + name.removeprefix(first) for name in names]
    misfit = any(shapes.get(name) != layers[name].stored_shape for name in names)
    fits = all(
        shapes.get(new) == layers[old].stored_shape for old, new in zip(names, moved, strict=True)
    )
    if not names or not misfit or not fits or any(new in layers for new in moved):
        return dict(layers)
    notes.append("by their widths, these are the second text encoder's")
    new_name = dict(zip(names, moved, strict=True))
    return {new_name.get(name, name): layer for name, layer in layers.items()}
