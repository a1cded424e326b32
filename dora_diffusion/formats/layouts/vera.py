"""Compact files of VeRA and DVoRA, with vectors and the seed of the projections.

No other program reads these files. `read_adapter` converts them to standard layers, so that
generation, export and conversion handle them like other adapters. docs/reference/formats.md
describes the format.
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
from dora_diffusion.formats.files.runs import VERA_FILE
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

PROJECTIONS, SHAPES = "projections", "shapes"
# Far above the size for any model. A damaged file must not exhaust the memory.
_LARGEST = 2**27
_DAMAGE = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError)
_PARTS = {"d": "vera_lambda_d", "b": "vera_lambda_b", "magnitude": "magnitude"}


@dataclass(frozen=True)
class VeraLayer:
    """Layer with ``delta = diag(b) B diag(d) A``, where A and B are random projections.

    Attributes:
        projections: Projections that include A and B.
        shape: Shape of the weight, ``(out, in, *k)``.
        d: Vector ``(r,)``.
        b: Vector ``(out,)``.
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
        """Return a standard layer with A and B as drawn, without d and b."""
        down, up = self.projections.factors(self.shape, self.d.device)
        rank = float(self.projections.rank)
        return LayerWeights(down, up, self.magnitude, rank, self.norm_axis)

    def weights(self) -> LayerWeights:
        """Convert to a standard layer with rank r and scale 1."""
        drawn = self.unscaled()
        down, up = scaled_rows(self.d, drawn.down), scaled_rows(self.b, drawn.up)
        return dataclasses.replace(drawn, down=down, up=up)


def digest_of(projections: Projections) -> str:
    """Return the SHA-256 of all A and B, in the order of their names."""
    drawn = projections.matrices.items()
    return data_hash({_kernel_text(kernel): matrix for kernel, matrix in drawn})


def write_vera(path: Path, layers: Mapping[str, VeraLayer], metadata: AdapterMetadata) -> Path:
    """Write the compact file, atomically.

    Args:
        path: The file, or a folder for ``vera.safetensors``.
        layers: Layers by canonical name. Layers of a component share projections.
        metadata: Metadata of the adapter.
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
    """Layout ``<module>.vera_lambda_d``, with seed and sizes of A and B in the metadata."""

    name = "vera"
    file_name = VERA_FILE
    is_compact = True

    def matches(self, keys: Collection[str], metadata: Fields) -> bool:
        return metadata.get(OWN + "target") == self.name

    def decode(self, tensors: Tensors, metadata: Fields) -> tuple[Layers, str]:
        """Decode the layers. The projections must be drawn exactly as in training."""
        facts = json_object(metadata.get(OWN + PROJECTIONS, ""), "the metadata of its projections")
        shapes = json_object(metadata.get(OWN + SHAPES, ""), "the metadata of its layers")
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
            raise AdapterFormatError("its metadata do not list all its layers, or list none")
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
            f"its projections, drawn from the seed {projections.seed}, differ from the ones in "
            "training (by their digests): the file is damaged, or was written by a version that "
            "draws others; read it with that version"
        )
    return projections


def _layer(
    name: str, tensors: Mapping[str, Tensor], shared: Projections, shape: list[int], axis: str
) -> VeraLayer:
    vectors = (tensors.get(f"{name}.{key}") for key in _PARTS.values())
    d, b, magnitude = (None if t is None else t.float() for t in vectors)
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
