"""Tensors of an adapter file -> layers: scales, the magnitude's axis, Tucker cores, own padding."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.config.wording import listing
from dora_diffusion.formats.adapter.alpha import (
    AI_TOOLKIT,
    ALPHA_IS_RANK,
    AlphaOf,
    AssumedAlpha,
    alpha_rule,
    says_alpha,
)
from dora_diffusion.formats.adapter.magnitude import Magnitude, resolve_axes
from dora_diffusion.formats.adapter.metadata import OWN, UNET_LAYERS, described
from dora_diffusion.formats.checkpoint.weights import ModelWeights, kinds_of, module_shapes
from dora_diffusion.formats.layouts.dotted import PEFT_PREFIX
from dora_diffusion.formats.layouts.layout import AdapterFormatError, AdapterLayout, Groups, Part
from dora_diffusion.formats.layouts.other import group_keys
from dora_diffusion.formats.names.kohya import (
    is_kohya_name,
    is_sgm_path,
    joined_parts,
    name_resolver,
)
from dora_diffusion.formats.names.modules import UNetLayout, split_prefix
from dora_diffusion.numerics.weights import LayerKind, LayerWeights, NormAxis

Layers = dict[str, LayerWeights]


def decode_layers(
    layout: AdapterLayout,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    base: ModelWeights | None = None,
    *,
    component: str | None = None,
    config: Mapping[str, Any] | None = None,
    alpha: float | None = None,
    beside: Layers | None = None,
) -> tuple[Layers, list[str]]:
    """Layers of one file, in float32.

    Args:
        layout: The file's layout.
        tensors: The file's tensors.
        metadata: The file's metadata.
        base: The base model. Each layer must be among its modules, which tell 1x1 convolutions and
            Linear layers apart; its weights tell the axis of magnitudes whose shape does not.
        component: Component of a PEFT folder's names.
        config: A PEFT folder's ``adapter_config.json``.
        alpha: What it was trained with, for a file that lost it.
        beside: Gets the plain LoRA layers that are to be added to an ai-toolkit DoRA with alpha
            other than its rank; without it such a file is refused.

    Returns:
        The layers, and a line for each thing that was found broken and repaired.

    Raises:
        AdapterFormatError: For what is left over, lacks a factor, is not finite, or does not fit.
    """
    says = _says_alpha(layout, metadata, config, alpha)
    shapes = None if base is None else module_shapes(base)
    unet = UNetLayout.from_text(metadata.get(OWN + UNET_LAYERS, ""))
    groups = layout.group(tensors, metadata, shapes)
    groups = groups or group_keys(tensors, name_resolver(shapes, unet), component)
    notes = key_notes(tensors) if component is None else []
    alpha_of, without_alpha = alpha_rule(metadata, config)
    if not says and alpha is None and any("alpha" not in parts for parts in groups.values()):
        is_ai_toolkit = any(
            key.is_ai_toolkit for parts in groups.values() for key in parts.values()
        )
        notes.append(AI_TOOLKIT if is_ai_toolkit else without_alpha)
    layers, magnitudes = _read_parts(tensors, groups, alpha_of, alpha, beside)
    axes = resolve_axes(magnitudes, metadata.get(OWN + "norm_axis", ""), base, notes)
    for name, magnitude in magnitudes.items():
        layers[name] = _with_magnitude(name, layers[name], magnitude, axes[name])
    layers = {name: _without_padding(name, layer, metadata) for name, layer in layers.items()}
    layers = split_joined(layers, notes)
    if beside:
        split = split_joined(beside, [])
        beside.clear()
        beside.update(split if shapes is None else fit_to_model(split, shapes))
    if shapes is None or base is None:
        return layers, notes
    layers = {name: _as_stored(layer, kinds_of(base).get(name)) for name, layer in layers.items()}
    if not component and not layout.says_alpha and not all(map(has_component, tensors)):
        layers = move_to_second_encoder(layers, shapes, notes)
    return fit_to_model(layers, shapes), notes


def _says_alpha(
    layout: AdapterLayout,
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None,
    alpha: float | None,
) -> bool:
    """Return whether a file states its alpha; one may be given, as a number, if it was lost."""
    says = layout.says_alpha or says_alpha(metadata, config)
    if says and alpha is not None:
        raise AdapterFormatError("its alpha was not lost: the file says it; give none")
    if alpha is not None and not 0 < alpha < math.inf:
        raise AdapterFormatError(
            f"alpha {alpha:g} was given; give the number above 0 that it was trained with"
        )
    return says


def _read_parts(
    tensors: Mapping[str, Tensor],
    groups: Groups,
    alpha_of: AlphaOf,
    lost_alpha: float | None,
    beside: Layers | None,
) -> tuple[Layers, dict[str, Magnitude]]:
    """The layers without their magnitudes, and these as the file holds them."""
    layers, magnitudes = {}, {}
    for name, keys in groups.items():
        parts = {part: _numbers(key.text, part, tensors[key.text]) for part, key in keys.items()}
        kind: LayerKind = "embedding" if "down" in keys and keys["down"].is_embedding else "plain"
        layer = _factors(name, parts, alpha_of, lost_alpha, kind)
        is_ai_toolkit = any(key.is_ai_toolkit for key in keys.values())
        if is_ai_toolkit and layer.scale != 1.0:
            if beside is None:
                raise AdapterFormatError(_not_dora(name, layer))
            # What ai-toolkit computes is a DoRA with alpha = rank and a plain LoRA added to it.
            beside[name] = dataclasses.replace(layer, alpha=layer.alpha - layer.rank)
            layer = dataclasses.replace(layer, alpha=float(layer.rank))
        layers[name] = layer
        if magnitude := _magnitude(name, parts, layer.weight_shape):
            magnitudes[name] = magnitude
    return layers, magnitudes


def _not_dora(name: str, layer: LayerWeights) -> str:
    return (
        f"{name}: ai-toolkit applies alpha / rank ({layer.alpha:g} / {layer.rank}) outside of the "
        "norm, m (W + BA) / norm(W + BA) + (alpha / rank - 1) BA, which is not a DoRA, and which "
        "no other program computes; with that alpha, export merges it exactly, and convert "
        "--to dense writes its differences for one base model"
    )


def _numbers(key: str, part: Part, tensor: Tensor) -> Tensor:
    """The tensor in float32, if it is of a kind that this part can be."""
    is_alpha = part == "alpha"
    if not tensor.is_floating_point() and not is_alpha:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise AdapterFormatError(f"{key} holds {kind}, not floating-point numbers")
    if not tensor.numel() or (is_alpha and tensor.numel() != 1):
        raise AdapterFormatError(f"{key} has shape {tuple(tensor.shape)}; the file is damaged")
    tensor = tensor.to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise AdapterFormatError(f"{key} holds numbers that are not finite; the file is damaged")
    return tensor


def _factors(
    name: str,
    parts: Mapping[Part, Tensor],
    alpha_of: AlphaOf,
    lost_alpha: float | None,
    kind: LayerKind,
) -> LayerWeights:
    """The layer without its magnitude."""
    if missing := [part for part in ("down", "up") if part not in parts]:
        raise AdapterFormatError(f"{name} lacks its {' and '.join(missing)} factor")
    down, up = parts["down"], parts["up"]
    if min(down.ndim, up.ndim) < 2:
        raise AdapterFormatError(
            f"{name}: low-rank factors of shapes {tuple(down.shape)} and {tuple(up.shape)}"
        )
    if "mid" in parts:
        down = _without_tucker_core(name, down, parts["mid"])
    # Some programs store the factors of a convolution flat on one side.
    if down.ndim in (3, 4) and up.ndim == 2:
        up = up.view(*up.shape, *[1] * (down.ndim - 2))
    rank = down.shape[0]
    alpha = float(parts["alpha"]) if "alpha" in parts else alpha_of(name, rank)
    # LyCORIS reads alpha 0 as "no scaling".
    alpha = alpha or float(rank)
    if lost_alpha is not None:
        if "alpha" in parts and alpha != rank:
            raise AdapterFormatError(f"{name} says that its alpha is {alpha:g}; it was not lost")
        alpha = lost_alpha
    if not math.isfinite(alpha):
        raise AdapterFormatError(f"{name}: its alpha is {alpha}, not a number")
    try:
        return LayerWeights(down, up, None, alpha, kind=kind)
    except ValueError as error:
        raise AdapterFormatError(f"{name}: {error}") from error


def _with_magnitude(
    name: str, layer: LayerWeights, magnitude: Magnitude, axis: NormAxis
) -> LayerWeights:
    try:
        return dataclasses.replace(layer, magnitude=magnitude.tensor.flatten(), norm_axis=axis)
    except ValueError as error:
        raise AdapterFormatError(f"{name}: {error}") from error


def _without_tucker_core(name: str, down: Tensor, mid: Tensor) -> Tensor:
    """Multiply a core ``(r, r, kh, kw)`` into ``down (r, in, 1, 1)``: -> ``(r, in, kh, kw)``."""
    if mid.ndim != 4 or mid.shape[1] != down.shape[0] or down.shape[2:].numel() != 1:
        raise AdapterFormatError(
            f"{name}: its core {tuple(mid.shape)} does not fit its factor {tuple(down.shape)}"
        )
    return torch.einsum("mnhw,ni->mihw", mid, down.flatten(1))


def _magnitude(
    name: str, parts: Mapping[Part, Tensor], weight_shape: tuple[int, ...]
) -> Magnitude | None:
    if "magnitude" in parts and "dora_scale" in parts:
        raise AdapterFormatError(f"{name} has both a lora_magnitude_vector and a dora_scale")
    if "magnitude" in parts:
        return Magnitude(parts["magnitude"], weight_shape, is_peft=True)
    return Magnitude(parts["dora_scale"], weight_shape) if "dora_scale" in parts else None


def _without_padding(name: str, layer: LayerWeights, metadata: Mapping[str, str]) -> LayerWeights:
    """Undo the zero padding to a common rank that our own files record."""
    rank = described(metadata.get(OWN + "rank", ""), name)
    if not re.fullmatch("[0-9]{1,6}", rank) or not 0 < int(rank) < layer.rank:
        return layer
    down, up = layer.down[: int(rank)], layer.up[:, : int(rank)]
    if layer.down[int(rank) :].any() or layer.up[:, int(rank) :].any():
        return layer
    alpha = layer.scale * int(rank)
    return dataclasses.replace(layer, down=down, up=up, alpha=alpha)


def fit_to_model(
    layers: Mapping[str, LayerWeights], shapes: Mapping[str, tuple[int, ...]]
) -> Layers:
    """Check that every layer fits a module of the model; give 1x1 convolutions their shape.

    Raises:
        AdapterFormatError: If layers have no module, or one of another shape; it lists them.
    """
    if missing := [name for name in layers if name not in shapes]:
        raise AdapterFormatError(f"the model has no module for {listing(missing)}")
    fitted = {name: _as_module(layer, shapes[name]) for name, layer in layers.items()}
    if wrong := [
        f"{name} {layer.stored_shape} on {tuple(shapes[name])}"
        for name, layer in fitted.items()
        if layer.stored_shape != tuple(shapes[name])
    ]:
        raise AdapterFormatError(f"the adapter was made for another model: {listing(wrong)}")
    return fitted


def _as_stored(layer: LayerWeights, kind: LayerKind | None) -> LayerWeights:
    """The layer of a Conv1D, which no key tells from a Linear's."""
    is_open = layer.kind == "plain" and layer.down.ndim == 2
    return dataclasses.replace(layer, kind=kind) if kind == "conv1d" and is_open else layer


def _as_module(layer: LayerWeights, shape: tuple[int, ...]) -> LayerWeights:
    """Linear factors for a 1x1 convolution, or the reverse; anything else is returned as it is."""
    if layer.kind != "plain":
        return layer
    if layer.down.ndim == 2 and len(shape) == 4 and tuple(shape[2:]) == (1, 1):
        down, up = layer.down[:, :, None, None], layer.up[:, :, None, None]
    elif layer.down.ndim == 4 and len(shape) == 2 and layer.down.shape[2:].numel() == 1:
        down, up = layer.down.flatten(1), layer.up.flatten(1)
    else:
        return layer
    return dataclasses.replace(layer, down=down, up=up)


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
    """Return whether a key names the component that it belongs to."""
    component, path = split_prefix(key.removeprefix(PEFT_PREFIX))
    return is_kohya_name(key) or component is not None or is_sgm_path(path)


def key_notes(keys: Iterable[str]) -> list[str]:
    """Return notes on the program that broke a file, by the format of its keys."""
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
