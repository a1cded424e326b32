"""Merge adapters into base weights: pure functions on tensors.

    merged = W + sum_i strength_i * (W'_i - W)

Each ``W'_i`` is taken from the unmerged ``W``, with the same formula as the forward pass, in
float32, and the sum is cast once to the dtype of ``W``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dora_diffusion.numerics.merging import merge_layers
from dora_diffusion.numerics.precision import wide_dtype
from dora_diffusion.numerics.threads import map_ahead
from dora_diffusion.numerics.weights import LayerWeights, Strengths

__all__ = [
    "MergeError",
    "Strengths",
    "WeightedAdapter",
    "check_dtype",
    "check_fit",
    "layers_of",
    "merge_state",
    "merge_tensor",
]


class MergeError(ValueError):
    """An adapter that does not fit the base weights."""


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
        if not _is_finite(block):
            name = str(dtype).removeprefix("torch.")
            raise MergeError(
                f"the merged weight {tuple(weight.shape)} is not finite in {name}; lower the "
                "strength, or take a data type with larger numbers"
            )

    return merge_layers(weight, layers, dtype, check)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast = weight.to(dtype)
    if dtype != weight.dtype and not _is_finite(cast) and _is_finite(weight):
        name = str(dtype).removeprefix("torch.")
        raise MergeError(
            f"the base's weight {tuple(weight.shape)} has numbers that are beyond {name}; take a "
            "data type with larger numbers (bfloat16 or float32)"
        )
    return cast


def _is_finite(tensor: Tensor) -> bool:
    # A sum with infinity or NaN in it is one of them, and is known much sooner than each number.
    # Only a sum that overflows on its own needs these.
    total = tensor.sum(dtype=wide_dtype(tensor))
    return math.isfinite(total) or bool(tensor.isfinite().all())


def check_fit(shapes: Mapping[str, Sequence[int]], adapters: Iterable[WeightedAdapter]) -> None:
    """Check that every adapter layer has a base weight of its shape.

    Args:
        shapes: Shapes of the base's weights by canonical module name.
        adapters: The adapters to be merged.

    Raises:
        MergeError: Listing the layers without a weight, or on a weight of another shape.
    """
    missing, wrong = [], []
    for adapter in adapters:
        for name, layer in adapter.layers.items():
            if name not in shapes:
                missing.append(name)
            elif tuple(shapes[name]) != layer.weight_shape:
                wrong.append(f"{name}: {layer.weight_shape} on {tuple(shapes[name])}")
    if missing:
        raise MergeError(f"the base has no weights for {_listing(missing)}")
    if wrong:
        raise MergeError(f"the adapter was made for another model: {_listing(wrong)}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Check that a base weight is stored as numbers that a merge can take as they are.

    Quantised weights are not: they mean something only with their scales, which every program
    stores elsewhere, and rounding to 8 bits loses most of what an adapter changes.

    Raises:
        MergeError: If it is not.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kind = str(dtype).removeprefix("torch.")
        raise MergeError(
            f"the base stores {name} as {kind}: adapters are merged into weights of 16 bits or "
            "more; take this model in half precision"
        )


def merge_state(
    base: Mapping[str, Tensor], adapters: Sequence[WeightedAdapter]
) -> dict[str, Tensor]:
    """Merge adapters into a dict of base tensors.

    Args:
        base: Tensors by canonical name, e.g. ``unet.conv_in.weight`` and ``unet.conv_in.bias``.
        adapters: The adapters; their order does not matter.

    Returns:
        All tensors of ``base``, the adapted weights merged, the others as they were.

    Raises:
        MergeError: If a layer has no base weight of its shape.
    """
    shapes = {
        key.removesuffix(".weight"): tensor.shape
        for key, tensor in base.items()
        if key.endswith(".weight")
    }
    check_fit(shapes, adapters)

    def merge(key: str) -> Tensor:
        return merge_tensor(base[key], layers_of(key, adapters))

    return dict(map_ahead(merge, base))


def layers_of(
    key: str, adapters: Sequence[WeightedAdapter]
) -> list[tuple[LayerWeights, Strengths]]:
    """The layers that adapt the tensor ``key``, which is a module's name with ``.weight``."""
    if not key.endswith(".weight"):
        return []
    name = key.removesuffix(".weight")
    return [(a.layers[name], a.strengths) for a in adapters if name in a.layers]


def _listing(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more
