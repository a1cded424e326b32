"""What every target needs: how to write, what is written, and the factors as they are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dora_diffusion.formats.adapter.metadata import AdapterMetadata
from dora_diffusion.formats.checkpoint.weights import ModelWeights
from dora_diffusion.formats.files.header import TensorSpec
from dora_diffusion.formats.names.unet import UNetLayout
from dora_diffusion.numerics.weights import LayerWeights

Layers = Mapping[str, LayerWeights]


@dataclass(frozen=True)
class WriteOptions:
    """How to write an adapter.

    Attributes:
        dtype: Of the low-rank factors; None keeps theirs. Magnitudes stay float32: rounding one
            moves every weight of its row, and they are small.
        title: Name shown by user interfaces, the file's name without suffix.
        unet_layout: For kohya names of an SDXL UNet that is not shaped like the released one.
        base: The base model, for the targets that need it.
        beside: Plain LoRA layers whose change is added, for ``dense``.
    """

    dtype: torch.dtype | None = None
    title: str = ""
    unet_layout: UNetLayout | None = None
    base: ModelWeights | None = None
    beside: Layers = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedFile:
    """One file to write: tensors with metadata, or text.

    Attributes:
        tensors: The tensors, by name.
        metadata: The file's metadata.
        text: Content of a text file.
        lazy: In place of ``tensors``, how to make each when it is written: large files are never
            whole in memory.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    text: str | None = None
    lazy: Mapping[str, tuple[TensorSpec, Callable[[], Tensor]]] | None = None


Encode = Callable[[Layers, AdapterMetadata, WriteOptions], dict[str, EncodedFile]]


@dataclass(frozen=True)
class Target:
    """A named way to write an adapter.

    Attributes:
        name: What users call it.
        encode: Layers -> files by relative name.
        file_name: Default name of a single-file target; None for a folder of files.
    """

    name: str
    encode: Encode
    file_name: str | None


def with_alpha(layer: LayerWeights, alpha: float) -> LayerWeights:
    """The layer with another alpha and the same ``s B A``: ``B`` makes up for it."""
    factor = layer.alpha / alpha
    up = layer.up if factor == 1.0 else (layer.up.float() * factor).to(layer.up.dtype)
    return dataclasses.replace(layer, up=up, alpha=alpha)


def unit_scale(layer: LayerWeights) -> LayerWeights:
    """The layer with its scale multiplied into ``up``, so that alpha = rank."""
    return with_alpha(layer, float(layer.rank))


def factors(layer: LayerWeights, options: WriteOptions) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` as they are written."""
    dtype = options.dtype
    down, up = layer.down.detach().cpu(), layer.up.detach().cpu()
    return (down, up) if dtype is None else (down.to(dtype), up.to(dtype))
