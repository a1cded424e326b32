"""Merge adapters into base weights: pure functions on tensors.

    merged = W + sum_i strength_i * (W'_i - W)

Each ``W'_i`` is taken from the unmerged ``W``, with the same formula as the forward pass, in
float32, and the sum is cast once to the dtype of ``W``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dora_diffusion.formats.checkpoint.weights import MergeError
from dora_diffusion.numerics.merging import merge_layers
from dora_diffusion.numerics.precision import upcast_dtype
from dora_diffusion.numerics.weights import LayerWeights, Strengths

__all__ = [
    "MergeError",
    "Strengths",
    "WeightedAdapter",
    "layers_of",
    "merge_tensor",
]


@dataclass(frozen=True)
class WeightedAdapter:
    """The layers of one adapter, by canonical module name, and how strongly they act."""

    layers: Mapping[str, LayerWeights]
    strengths: Strengths = field(default_factory=Strengths)


def merge_tensor(
    weight: Tensor,
    layers: Sequence[tuple[LayerWeights, Strengths]],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Merge one or several adapters' layers into one weight.

    Args:
        weight: Base weight ``(out, in, *k)``, any floating dtype.
        layers: The layers that adapt it, each with its strengths.
        dtype: Of the result; that of ``weight`` if None.

    Returns:
        The merged weight, cast once, on the device of ``weight``.

    Raises:
        MergeError: If the result is not finite; without layers, if only the cast makes it so.
    """
    dtype = dtype or weight.dtype
    if not layers:
        return _cast(weight, dtype)

    def check(block: Tensor) -> None:
        # Beyond the largest number of the dtype the cast gives inf: better no file than that file.
        if not is_finite(block):
            name = str(dtype).removeprefix("torch.")
            raise MergeError(
                f"the merged weight {tuple(weight.shape)} is not finite in {name}; lower the "
                "strength, or take a data type with larger numbers"
            )

    return merge_layers(weight, layers, dtype, check)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast = weight.to(dtype)
    if dtype != weight.dtype and not is_finite(cast) and is_finite(weight):
        name = str(dtype).removeprefix("torch.")
        raise MergeError(
            f"the base's weight {tuple(weight.shape)} has numbers that are beyond {name}; take a "
            "data type with larger numbers (bfloat16 or float32)"
        )
    return cast


def is_finite(tensor: Tensor) -> bool:
    """Return whether every number of a floating-point tensor is finite."""
    # A sum with infinity or NaN in it is one of them, and is known much sooner than each number.
    # Only a sum that overflows on its own needs these.
    total = tensor.sum(dtype=upcast_dtype(tensor))
    return math.isfinite(total) or bool(tensor.isfinite().all())


def layers_of(
    key: str, adapters: Sequence[WeightedAdapter]
) -> list[tuple[LayerWeights, Strengths]]:
    """The layers that adapt the tensor ``key``, which is a module's name with ``.weight``."""
    if not key.endswith(".weight"):
        return []
    name = key.removesuffix(".weight")
    return [(a.layers[name], a.strengths) for a in adapters if name in a.layers]
