"""Targets made for one base model: exact where ``dora_scale`` is misread or ignored."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from dora_diffusion.formats.adapter.keys import AdapterFormatError
from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.formats.adapter.targets.encode import EncodedFile, Layers, WriteOptions
from dora_diffusion.formats.adapter.targets.kohya import (
    KOHYA_FILE,
    check_kohya,
    encode_kohya,
    kohya_metadata,
    kohya_names,
    with_hash,
)
from dora_diffusion.formats.checkpoint.weights import ModelWeights, module_weight
from dora_diffusion.formats.files.header import TensorSpec
from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.low_rank import weight_change
from dora_diffusion.numerics.precision import upcast
from dora_diffusion.numerics.prepare.norms import factored_norm
from dora_diffusion.numerics.weights import LayerWeights


def _base(options: WriteOptions, target: str) -> ModelWeights:
    if options.base is None:
        raise AdapterFormatError(
            f"{target} files are made for one base model; give that model with --base"
        )
    return options.base


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
    check_kohya(layers)
    base = _base(options, "comfyui")
    changed = {
        name: _compensated(module_weight(base, name), layer) for name, layer in layers.items()
    }
    (file,) = encode_kohya(changed, metadata, options).values()
    fields = kohya_metadata(layers, metadata, options, "comfyui")
    return {KOHYA_FILE: EncodedFile(file.tensors, with_hash(fields, file.tensors))}


def needs_compensation(layers: Layers) -> bool:
    """Whether ComfyUI would compute these layers wrongly from a plain kohya file."""
    return any(w.magnitude is not None and w.norm_axis == "output" for w in layers.values())


def _compensated(weight: Tensor, layer: LayerWeights) -> LayerWeights:
    if layer.magnitude is None or layer.norm_axis == "input":
        return layer
    start = weight_norm(weight, "output")
    norm = factored_norm(weight, layer.down, layer.up, layer.scale, layer.norm_axis)
    # ComfyUI adds float32's epsilon to the norm it divides by.
    factor = (start + torch.finfo(torch.float32).eps) / norm.clamp_min(1e-30)
    return dataclasses.replace(layer, magnitude=upcast(layer.magnitude) * factor)


def encode_dense(
    layers: Layers, metadata: AdapterMetadata, options: WriteOptions
) -> dict[str, EncodedFile]:
    """Full differences ``W' - W`` under kohya names: large, and exact on either axis."""
    check_kohya(layers)
    base = _base(options, "dense")
    names = kohya_names(layers, metadata, options)
    dtype = options.dtype or torch.float32

    def make(name: str) -> Tensor:
        weight = module_weight(base, name)
        change = weight_change(weight, layers[name])
        if name in options.beside:
            change += weight_change(weight, options.beside[name])
        return change.to(dtype)

    lazy = {
        f"{names[name]}.diff": (TensorSpec(dtype, layer.weight_shape), partial(make, name))
        for name, layer in layers.items()
    }
    fields = kohya_metadata(layers, metadata, options, "dense")
    return {KOHYA_FILE: EncodedFile(metadata=fields, lazy=lazy)}
