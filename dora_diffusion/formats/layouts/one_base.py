"""Files with kohya's names for one base model.

They are exact in programs that misread or ignore ``dora_scale``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from dora_diffusion.formats.adapter.metadata import OWN
from dora_diffusion.formats.checkpoint.weights import ModelWeights, module_weight
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.layouts import BYPASS, COMFYUI_CHANGE, COMFYUI_FORMULA, VERDICTS
from dora_diffusion.formats.layouts.kohya import (
    Kohya,
    encode_file,
    kohya_names,
    metadata_of,
    needs_compensation,
    on_input,
    with_original_names,
)
from dora_diffusion.formats.layouts.layout import (
    OF_TRANSFORMERS,
    AdapterFormatError,
    EncodedFile,
    Fields,
    Groups,
    Layers,
    Shapes,
    Tensors,
    WriteOptions,
)
from dora_diffusion.formats.names.kohya import TRANSFORMER_PREFIXES
from dora_diffusion.formats.names.modules import has_swapped_halves
from dora_diffusion.numerics.dora import weight_change, weight_norm
from dora_diffusion.numerics.norms import factored_norm
from dora_diffusion.numerics.precision import upcast
from dora_diffusion.numerics.weights import LayerWeights, swap_halves


class WriteOnly(Kohya):
    """Base class of files that programs apply, and that are not read as adapters."""

    def judge(self, layers: Layers, norm_axis: str, keys: Collection[str]) -> dict[str, str]:
        is_transformer = any(key.startswith(TRANSFORMER_PREFIXES) for key in keys)
        tools = dict(VERDICTS[self.name + OF_TRANSFORMERS * is_transformer])
        return with_original_names(tools, keys)

    def base_of(self, options: WriteOptions) -> ModelWeights:
        """Return the base model for which the file is written.

        Raises:
            AdapterFormatError: If no base model is given.
        """
        if options.base is None:
            raise AdapterFormatError(
                f"{self.name} files are made for one base model; give that model with --base"
            )
        return options.base


class ComfyUI(WriteOnly):
    """Kohya file with output-axis magnitudes compensated for ComfyUI and Forge.

    These programs compute ``m * (W + delta) / norm(W)``, so ``m`` is multiplied by
    ``norm(W) / norm(W + delta)``. The input axis needs no compensation: an adapter with only that
    axis is written as a standard kohya file, for any base model.
    """

    name, method, form = "comfyui", "DoRA", ".lora_down.weight"
    file_name = "adapter_comfyui.safetensors"
    note = (
        f"its magnitudes are changed for the formula {COMFYUI_FORMULA}: wrong elsewhere. "
        f"{COMFYUI_CHANGE} {BYPASS}: use its usual loader"
    )

    def matches(self, keys: Collection[str], metadata: Fields) -> bool:
        return metadata.get(OWN + "target") == self.name and not DENSE.matches(keys, metadata)

    def group(
        self, tensors: Tensors, metadata: Fields, shapes: Shapes | None, component: str | None
    ) -> Groups:
        raise AdapterFormatError(
            "its magnitudes are changed to be exact in ComfyUI on one base model, and wrong "
            "elsewhere; use the adapter that it was converted from"
        )

    def encode(self, layers: Layers, options: WriteOptions) -> dict[str, EncodedFile]:
        if not needs_compensation(layers):
            return super().encode(layers, options)
        base = self.base_of(options)
        changed = {
            name: _compensated(module_weight(base, name), layer) for name, layer in layers.items()
        }
        file = encode_file(changed, layers, options, self.name)
        fields = {**file.metadata, OWN + "comfyui_formula": COMFYUI_FORMULA}
        return {self.name: dataclasses.replace(file, metadata=fields)}


class Dense(WriteOnly):
    """Full differences ``W' - W`` with kohya's names: large files, exact on both axes."""

    name, method, form = "dense", "full differences", ".diff"
    file_name = "adapter_dense.safetensors"
    note = "full differences: add them to the base's weights"

    def matches(self, keys: Collection[str], metadata: Fields) -> bool:
        return any(key.endswith(self.form) for key in keys)

    def encode(self, layers: Layers, options: WriteOptions) -> dict[str, EncodedFile]:
        base = self.base_of(options)
        names = kohya_names(layers, options)
        dtype = options.dtype or torch.float32

        def make(name: str) -> Tensor:
            weight = module_weight(base, name)
            change = weight_change(weight, layers[name])
            if name in options.beside:
                change += weight_change(weight, options.beside[name])
            is_swapped = has_swapped_halves(name, names[name])
            return (swap_halves(change) if is_swapped else change).to(dtype)

        tensors = {
            names[name] + self.form: (TensorSpec(dtype, layer.weight_shape), partial(make, name))
            for name, layer in layers.items()
        }
        fields = metadata_of(layers, options, self.name)
        return {self.name: EncodedFile(tensors, fields)}


COMFYUI, DENSE = ComfyUI(), Dense()


def _compensated(weight: Tensor, layer: LayerWeights) -> LayerWeights:
    if layer.magnitude is None or on_input(layer):
        return layer
    start = weight_norm(weight, "output")
    norm = factored_norm(weight, layer.down, layer.up, layer.scale, layer.norm_axis)
    # ComfyUI adds the epsilon of float32 to the norm.
    factor = (start + torch.finfo(torch.float32).eps) / norm.clamp_min(1e-30)
    return dataclasses.replace(layer, magnitude=upcast(layer.magnitude) * factor)
