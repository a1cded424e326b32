"""Targets made for one base model, and the registry of all targets.

``comfyui`` and ``dense`` are exact where ``dora_scale`` is computed differently, or not at all;
the plain-LoRA approximation works everywhere and says how far off it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from dora_diffusion.formats.adapter.keys import AdapterFormatError
from dora_diffusion.formats.adapter.kohya_target import (
    KOHYA_FILE,
    encode_kohya,
    kohya_metadata,
    kohya_names,
    with_hash,
)
from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.formats.adapter.targets import (
    DIFFUSERS_FILE,
    EncodedFile,
    Layers,
    Target,
    WriteOptions,
    encode_diffusers,
    encode_peft,
)
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.numerics.dora import adapted_weight, weight_norm
from dora_diffusion.numerics.fast import adapted_norm
from dora_diffusion.numerics.precision import wide
from dora_diffusion.numerics.weights import LayerWeights

_OVERSAMPLING = 16
_POWER_ITERATIONS = 6


def _base_weights(options: WriteOptions, target: str) -> Callable[[str], Tensor]:
    if options.base_weight is None:
        raise AdapterFormatError(
            f"{target} files are made for one base model; give that model with --base"
        )
    return options.base_weight


def encode_comfyui(
    layers: Layers, metadata: AdapterMetadata, options: WriteOptions
) -> dict[str, EncodedFile]:
    """A kohya file whose output-axis magnitudes are compensated for ComfyUI and Forge.

    They compute ``m * (W + delta) / norm(W)``, so ``m`` is multiplied by
    ``norm(W) / norm(W + delta)``. The input axis is exact there as it is: an adapter that has no
    other is a plain kohya file, for any base.
    """
    if not needs_compensation(layers):
        return encode_kohya(layers, metadata, options)
    base_weight = _base_weights(options, "comfyui")
    changed = {name: _compensated(base_weight(name), layers[name]) for name in layers}
    (file,) = encode_kohya(changed, metadata, options).values()
    fields = kohya_metadata(layers, metadata, options, "comfyui")
    return {KOHYA_FILE: EncodedFile(file.tensors, with_hash(fields, file.tensors))}


def needs_compensation(layers: Layers) -> bool:
    """Whether ComfyUI would compute these layers wrongly from a plain kohya file."""
    return any(one.magnitude is not None and one.norm_axis == "output" for one in layers.values())


def _compensated(weight: Tensor, layer: LayerWeights) -> LayerWeights:
    if layer.magnitude is None or layer.norm_axis == "input":
        return layer
    start = weight_norm(weight, "output")
    norm = adapted_norm(weight, layer)
    # ComfyUI adds float32's epsilon to the norm it divides by.
    factor = (start + torch.finfo(torch.float32).eps) / norm.clamp_min(1e-30)
    return dataclasses.replace(layer, magnitude=wide(layer.magnitude) * factor)


def encode_dense(
    layers: Layers, metadata: AdapterMetadata, options: WriteOptions
) -> dict[str, EncodedFile]:
    """Full differences ``W' - W`` under kohya names: large, and exact on either axis."""
    base_weight = _base_weights(options, "dense")
    names = kohya_names(layers, metadata, options)
    dtype = options.dtype or torch.float32

    def make(name: str) -> Tensor:
        weight = base_weight(name)
        change = difference(weight, layers[name])
        if name in options.beside:
            change += difference(weight, options.beside[name])
        return change.to(dtype)

    lazy = {
        f"{names[name]}.diff": (TensorSpec(dtype, layer.weight_shape), partial(make, name))
        for name, layer in layers.items()
    }
    fields = kohya_metadata(layers, metadata, options, "dense")
    return {KOHYA_FILE: EncodedFile(metadata=fields, lazy=lazy)}


def difference(weight: Tensor, layer: LayerWeights) -> Tensor:
    """``W' - W`` in float32: ``(out, in, *k)``."""
    return adapted_weight(weight, layer) - wide(weight)


def approximate(
    layers: Layers, base_weight: Callable[[str], Tensor], rank: int
) -> tuple[dict[str, LayerWeights], dict[str, float], float]:
    """The best plain LoRA of a rank for each layer's ``W' - W``.

    Args:
        layers: The adapter.
        base_weight: Base weight by canonical module name.
        rank: Largest rank; small layers get less.

    Returns:
        The layers without magnitudes (alpha = rank), per layer the relative error
        ``|D - B A| / |D|`` in the Frobenius norm, and that of all layers together.
    """
    found, errors = {}, {}
    all_left = all_size = 0.0
    for name, layer in layers.items():
        target = difference(base_weight(name), layer)
        found[name] = low_rank(target, rank)
        left = target - (found[name].up.flatten(1) @ found[name].down.flatten(1)).view_as(target)
        size, distance = target.norm().item(), left.norm().item()
        errors[name] = distance / size if size else 0.0
        all_left, all_size = math.hypot(all_left, distance), math.hypot(all_size, size)
    return found, errors, all_left / all_size if all_size else 0.0


def low_rank(target: Tensor, rank: int, seed: int = 0) -> LayerWeights:
    """Truncated singular value decomposition of ``(out, in, *k)`` as a plain LoRA layer."""
    matrix = target.flatten(1)
    rank = min(rank, *matrix.shape)
    u, s, vh = _leading_svd(matrix, rank, torch.Generator().manual_seed(seed))
    root = s.sqrt()
    up = (u * root).reshape(-1, rank, *[1] * (target.ndim - 2))
    down = (root[:, None] * vh).reshape(rank, *target.shape[1:])
    return LayerWeights(down.contiguous(), up.contiguous(), None, float(rank))


def _leading_svd(
    matrix: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets, by subspace iteration where that is much cheaper.

    Source: Halko, Martinsson and Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    width = rank + _OVERSAMPLING
    if 4 * width >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    basis = matrix @ torch.randn(matrix.shape[1], width, generator=generator)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank]


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("diffusers", encode_diffusers, DIFFUSERS_FILE),
        Target("kohya", encode_kohya, KOHYA_FILE),
        Target("peft", encode_peft, None),
        Target("comfyui", encode_comfyui, "adapter_comfyui.safetensors"),
        Target("dense", encode_dense, "adapter_dense.safetensors"),
    )
}
