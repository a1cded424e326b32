"""Two files for ComfyUI that are exact with any base model and with both of its formulas.

The first is the plain LoRA, ``W1 = W + s B A``. The second has zero factors and ``dora_scale = m``.
ComfyUI applies it to ``W1``, so that ``m * W1 / norm(W1)`` is the same whether it divides by the
norm before or after its change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

import torch

from dora_diffusion.formats.adapter.metadata import OWN
from dora_diffusion.formats.layouts.kohya import encode_file, needs_compensation
from dora_diffusion.formats.layouts.layout import (
    AdapterFormatError,
    EncodedFile,
    Fields,
    Groups,
    Layers,
    Shapes,
    Tensors,
    WriteOptions,
)
from dora_diffusion.formats.layouts.one_base import WriteOnly
from dora_diffusion.numerics.weights import LayerWeights

ENDS = ("_1_lora.safetensors", "_2_magnitudes.safetensors")
"""Ends of the names of both files, in their order."""


class ComfyUIPair(WriteOnly):
    """Folder of two files with kohya's names; one file if no magnitude is on the output axis."""

    name, method, form = "comfyui_pair", "DoRA", ".lora_down.weight"
    file_name = None
    note = (
        f"one of two files: load the one that ends in {ENDS[0]} first and the other directly after "
        "it, both at strength 1; for another strength convert the adapter with --strength"
    )

    def matches(self, keys: Collection[str], metadata: Fields) -> bool:
        return metadata.get(OWN + "target") == self.name

    def group(
        self, tensors: Tensors, metadata: Fields, shapes: Shapes | None, component: str | None
    ) -> Groups:
        raise AdapterFormatError(
            "it is one of two files that only ComfyUI puts together; use the adapter that they "
            "were converted from"
        )

    def encode(self, layers: Layers, options: WriteOptions) -> dict[str, EncodedFile]:
        if not needs_compensation(layers):
            [file] = super().encode(layers, options).values()
            return {f"{options.title}.safetensors": file}
        plain = {name: dataclasses.replace(w, magnitude=None) for name, w in layers.items()}
        scaled = {n: _unchanged(w) for n, w in layers.items() if w.magnitude is not None}
        titles = [options.title + end.removesuffix(".safetensors") for end in ENDS]
        first, second = (dataclasses.replace(options, title=title) for title in titles)
        second = dataclasses.replace(second, bundled={}, dtype=torch.float16)
        return {
            f"{first.title}.safetensors": encode_file(plain, layers, first, self.name),
            f"{second.title}.safetensors": encode_file(scaled, layers, second, self.name),
        }


def pair_files(folder: Path) -> list[Path]:
    """Return both files of a folder in their order; empty if it is no such folder."""
    files = sorted(folder.glob("*.safetensors"))
    title = files[0].name.removesuffix(ENDS[0]) if files else ""
    return files if [file.name for file in files] == [title + end for end in ENDS] else []


def _unchanged(layer: LayerWeights) -> LayerWeights:
    """Return a layer of rank 1 with the same magnitude, which does not change the direction."""
    down, up = torch.zeros_like(layer.down[:1]), torch.zeros_like(layer.up[:, :1])
    return dataclasses.replace(layer, down=down, up=up, alpha=1.0)


COMFYUI_PAIR = ComfyUIPair()
