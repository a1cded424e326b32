"""The compact file of a VeRA or DVoRA: its vectors, and how its projections are drawn.

No other program reads it; `read_adapter` gives the ordinary layers that it stands for, so that
generation, export and conversion take it like any adapter. docs/reference/formats.md describes
the file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.formats.adapter.alpha import json_object
from dora_diffusion.formats.adapter.metadata import OWN, AdapterMetadata, own_fields
from dora_diffusion.formats.files.stream import data_hash, save_tensors
from dora_diffusion.formats.layouts.layout import (
    AdapterFormatError,
    AdapterLayout,
    Fields,
    Layers,
    Tensors,
)
from dora_diffusion.numerics.projections import Kernel, Projections, scaled_rows
from dora_diffusion.numerics.weights import LayerWeights, NormAxis

VERA_FILE = "vera.safetensors"
PROJECTIONS, SHAPES = "projections", "shapes"
# More than any model takes; a damaged file must not take all memory.
_LARGEST = 2**27
_DAMAGE = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError)
_PARTS = {"d": "vera_lambda_d", "b": "vera_lambda_b", "magnitude": "magnitude"}


@dataclass(frozen=True)
class VeraLayer:
    """One layer: ``delta = diag(b) B diag(d) A`` with A and B from its projections.

    Attributes:
        projections: What A and B are drawn from.
        shape: Of the weight, ``(out, in, *k)``.
        d: ``(r,)``.
        b: ``(out,)``.
        magnitude: As in `LayerWeights`.
        norm_axis: As in `LayerWeights`.
    """

    projections: Projections
    shape: tuple[int, ...]
    d: Tensor
    b: Tensor
    magnitude: Tensor | None = None
    norm_axis: NormAxis = "output"

    def unscaled(self) -> LayerWeights:
        """A layer of its rank, scale and magnitude, with A and B as they are drawn."""
        down, up = self.projections.factors(self.shape, self.d.device)
        rank = float(self.projections.rank)
        return LayerWeights(down, up, self.magnitude, rank, self.norm_axis)

    def weights(self) -> LayerWeights:
        """The ordinary layer: rank r, scale 1."""
        drawn = self.unscaled()
        down, up = scaled_rows(self.d, drawn.down), scaled_rows(self.b, drawn.up)
        return dataclasses.replace(drawn, down=down, up=up)


def digest_of(projections: Projections) -> str:
    """SHA-256 of all A and B, in the order of their names."""
    drawn = projections.matrices.items()
    return data_hash({_kernel_text(kernel): matrix for kernel, matrix in drawn})


def write_vera(path: Path, layers: Mapping[str, VeraLayer], metadata: AdapterMetadata) -> Path:
    """Write the compact file, atomically.

    Args:
        path: The file, or a folder for ``vera.safetensors``.
        layers: By canonical name; those of one component share projections.
        metadata: What is known of the adapter.
    """
    path = path if path.suffix == ".safetensors" else path / VERA_FILE
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().float().contiguous()
        for name, layer in layers.items()
        for part, key in _PARTS.items()
        if (tensor := getattr(layer, part)) is not None
    }
    shared = {name.partition(".")[0]: layer.projections for name, layer in layers.items()}
    facts = {component: _facts(projections) for component, projections in shared.items()}
    drawn = {name: layer.unscaled() for name, layer in layers.items()}
    fields = own_fields(metadata, drawn, "vera") | {
        "format": "pt",
        OWN + PROJECTIONS: json.dumps(facts),
        OWN + SHAPES: json.dumps({name: layer.shape for name, layer in layers.items()}),
    }
    return save_tensors(path, tensors, fields)


class Vera(AdapterLayout):
    """``<module>.vera_lambda_d``, with what A and B are drawn from in the metadata."""

    name = "vera"
    file_name = VERA_FILE
    says_alpha = is_compact = True

    def matches(self, keys: Collection[str], metadata: Fields) -> bool:
        return metadata.get(OWN + "target") == self.name

    def decode(self, tensors: Tensors, metadata: Fields) -> tuple[Layers, str]:
        """Raise an error if it is damaged, or its projections cannot be drawn to the bit."""
        facts = json_object(metadata.get(OWN + PROJECTIONS, ""), "what it says of its projections")
        shapes = json_object(metadata.get(OWN + SHAPES, ""), "what it says of its layers")
        axis = metadata.get(OWN + "norm_axis", "")
        try:
            shared = {component: _projections(entry) for component, entry in facts.items()}
            layers = {
                name: _layer(name, tensors, shared[name.partition(".")[0]], shape, axis)
                for name, shape in shapes.items()
            }
            expected = sum(2 + (layer.magnitude is not None) for layer in layers.values())
            weights = {name: layer.weights() for name, layer in layers.items()}
        except _DAMAGE as error:
            raise AdapterFormatError(f"its layers do not fit together: {error}") from error
        if len(tensors) != expected or not layers:
            raise AdapterFormatError(
                "it has tensors of layers that it does not name, or none at all"
            )
        seeds = ", ".join(str(seed) for seed in sorted({p.seed for p in shared.values()}))
        return weights, (
            f"a compact file, whose A and B are drawn from the seed {seeds}: convert it for other "
            "programs"
        )


VERA = Vera()


def _facts(projections: Projections) -> dict[str, Any]:
    inputs = {_kernel_text(kernel): width for kernel, width in projections.inputs.items()}
    facts = {name: getattr(projections, name) for name in ("seed", "rank", "outputs")}
    return {**facts, "inputs": inputs, "sha256": digest_of(projections)}


def _projections(facts: Mapping[str, Any]) -> Projections:
    inputs = {tuple(map(int, text.split("x"))): int(n) for text, n in facts["inputs"].items()}
    seed, rank, outputs = (int(facts[name]) for name in ("seed", "rank", "outputs"))
    projections = Projections(seed, rank, outputs, dict(sorted(inputs.items())))
    taps = sum(width * kernel[0] * kernel[1] for kernel, width in inputs.items())
    if (total := projections.rank * (projections.outputs + taps)) > _LARGEST:
        raise ValueError(f"projections of {total:,} numbers")
    if digest_of(projections) != facts["sha256"]:
        raise AdapterFormatError(
            f"its projections, drawn from the seed {projections.seed}, are not those that it was "
            "trained with (their digests differ): the file is damaged, or was written by a "
            "version that draws others; read it with that version"
        )
    return projections


def _layer(
    name: str, tensors: Mapping[str, Tensor], shared: Projections, shape: list[int], axis: str
) -> VeraLayer:
    parts = {part: tensors.get(f"{name}.{key}") for part, key in _PARTS.items()}
    d, b, magnitude = (None if t is None else t.float() for t in parts.values())
    sizes = tuple(map(int, shape))
    if d is None or b is None or not shared.has(sizes) or len(sizes) not in (2, 4):
        raise ValueError(f"{name} lacks its vectors, or has no projections")
    if d.shape != (shared.rank,) or b.shape != sizes[:1]:
        raise ValueError(f"{name} has vectors {tuple(d.shape)} and {tuple(b.shape)}")
    if not all(t is None or bool(torch.isfinite(t).all()) for t in (d, b, magnitude)):
        raise ValueError(f"{name} has numbers that are not finite")
    on_input = axis == "input"
    return VeraLayer(shared, sizes, d, b, magnitude, "input" if on_input else "output")


def _kernel_text(kernel: Kernel | None) -> str:
    return "B" if kernel is None else "x".join(map(str, kernel))
