"""Layouts made for one base model: exact where ``dora_scale`` is misread or ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor

from dora_diffusion.formats.adapter.metadata import OWN, AdapterMetadata
from dora_diffusion.formats.checkpoint.weights import ModelWeights, module_weight
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.formats.layouts.compatibility import (
    BYPASS,
    INPUT_NORMS,
    NOT_CHECKED,
    NOT_FOR_IT,
    OTHER_BASES,
    PLAIN,
    PREFIX,
    table,
)
from dora_diffusion.formats.layouts.kohya import (
    KOHYA_FILE,
    Kohya,
    kohya_file,
    kohya_metadata,
    kohya_names,
)
from dora_diffusion.formats.layouts.layout import (
    AdapterFormatError,
    EncodedFile,
    Groups,
    Layers,
    Shapes,
    WriteOptions,
)
from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.low_rank import weight_change
from dora_diffusion.numerics.norms import factored_norm
from dora_diffusion.numerics.precision import upcast
from dora_diffusion.numerics.weights import LayerWeights


class BaseSpecific(Kohya):
    """Kohya's names with numbers that hold for one base model: not read as an adapter.

    Attributes:
        method: What a report calls it.
        form: What stands behind a layer's name in the key that tells its shape.
        note: What to know of it.
    """

    method = form = note = ""

    def judge(self, layers: Layers, norm_axis: str, keys: Collection[str]) -> dict[str, str]:
        return dict(self.verdicts[self.name])

    def base_of(self, options: WriteOptions) -> ModelWeights:
        """The model that it is made for.

        Raises:
            AdapterFormatError: If none is given.
        """
        if options.base is None:
            raise AdapterFormatError(
                f"{self.name} files are made for one base model; give that model with --base"
            )
        return options.base


class ComfyUI(BaseSpecific):
    """A kohya file whose output-axis magnitudes are compensated for ComfyUI and Forge.

    They compute ``m * (W + delta) / norm(W)``, so ``m`` is multiplied by
    ``norm(W) / norm(W + delta)``. The input axis is exact there as it is: an adapter that has no
    other is a plain kohya file, for any base.
    """

    name, method, form = "comfyui", "DoRA", ".lora_down.weight"
    file_name = "adapter_comfyui.safetensors"
    note = (
        "its magnitudes are changed to be exact in ComfyUI 0.3.64 and Forge: wrong elsewhere, "
        f"and there too if their formula changes; a merged checkpoint has none. {BYPASS}: "
        "use its usual loader"
    )
    verdicts = table(
        {
            "comfyui": (
                PLAIN,
                NOT_FOR_IT,
                "wrong: the magnitudes are changed for ComfyUI",
                f"{OTHER_BASES}; {BYPASS}",
                INPUT_NORMS,
                INPUT_NORMS,
                PLAIN,
            )
        }
    )

    def matches(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        return metadata.get(OWN + "target") == self.name and not DENSE.matches(keys, metadata)

    def group(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], shapes: Shapes | None
    ) -> Groups | None:
        raise AdapterFormatError(
            "its magnitudes are changed to be exact in ComfyUI on one base model, and wrong "
            "elsewhere; use the adapter that it was converted from"
        )

    def encode(
        self, layers: Layers, metadata: AdapterMetadata, options: WriteOptions
    ) -> dict[str, EncodedFile]:
        if not needs_compensation(layers):
            return super().encode(layers, metadata, options)
        base = self.base_of(options)
        changed = {
            name: _compensated(module_weight(base, name), layer) for name, layer in layers.items()
        }
        return {KOHYA_FILE: kohya_file(changed, layers, metadata, options, self.name)}


class Dense(BaseSpecific):
    """Full differences ``W' - W`` under kohya names: large, and exact on either axis."""

    name, method, form = "dense", "full differences", ".diff"
    file_name = "adapter_dense.safetensors"
    note = "full differences: add them to the base's weights"
    verdicts = table(
        {
            "dense": (
                NOT_CHECKED,
                NOT_CHECKED,
                f"{OTHER_BASES}; with {PREFIX}",
                *[OTHER_BASES] * 3,
                NOT_CHECKED,
            ),
        }
    )

    def matches(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        return any(key.endswith(self.form) for key in keys)

    def encode(
        self, layers: Layers, metadata: AdapterMetadata, options: WriteOptions
    ) -> dict[str, EncodedFile]:
        base = self.base_of(options)
        names = kohya_names(layers, metadata, options)
        dtype = options.dtype or torch.float32

        def make(name: str) -> Tensor:
            weight = module_weight(base, name)
            change = weight_change(weight, layers[name])
            if name in options.beside:
                change += weight_change(weight, options.beside[name])
            return change.to(dtype)

        tensors = {
            names[name] + self.form: (TensorSpec(dtype, layer.weight_shape), partial(make, name))
            for name, layer in layers.items()
        }
        fields = kohya_metadata(layers, metadata, options, self.name)
        return {KOHYA_FILE: EncodedFile(tensors, fields)}


COMFYUI, DENSE = ComfyUI(), Dense()


def needs_compensation(layers: Layers) -> bool:
    """Return whether ComfyUI would compute these layers wrongly from a plain kohya file."""
    return any(w.magnitude is not None and w.norm_axis == "output" for w in layers.values())


def _compensated(weight: Tensor, layer: LayerWeights) -> LayerWeights:
    if layer.magnitude is None or layer.norm_axis == "input":
        return layer
    start = weight_norm(weight, "output")
    norm = factored_norm(weight, layer.down, layer.up, layer.scale, layer.norm_axis)
    # ComfyUI adds float32's epsilon to the norm it divides by.
    factor = (start + torch.finfo(torch.float32).eps) / norm.clamp_min(1e-30)
    return dataclasses.replace(layer, magnitude=upcast(layer.magnitude) * factor)
