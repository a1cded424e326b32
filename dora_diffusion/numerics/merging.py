"""Merging of adapters into a weight, block by block, with a bound of the rounding error.

    merged = W + sum_i strength_i * (W'_i - W)

Exports and live layers both use this module. On a CPU it merges blocks of a fixed size on one
thread, from operands in newly allocated memory, so that results do not depend on the number of
threads or on memory addresses. Another processor or BLAS may round differently, within the bound of
`merge_error`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dora_diffusion.numerics.dora import (
    NORM_FLOOR,
    adapted_weight,
    low_rank_delta,
    per_channel,
    weight_norm,
)
from dora_diffusion.numerics.precision import full_precision, to_float64, upcast, upcast_dtype
from dora_diffusion.numerics.threads import one_thread
from dora_diffusion.numerics.weights import (
    LayerKind,
    LayerWeights,
    MergeError,
    Strengths,
    out_in,
)

Layers = Sequence[tuple[LayerWeights, Strengths]]

# Number of values that are merged at a time, chosen for the processor's cache.
_BLOCK = 2**18
# Smallest number of adjacent inputs in a block. Fewer would use only a part of each cache line.
_COLUMNS = 128
# Number of rounding errors in an entry, in units of the sum of its terms' magnitudes.
_SUMMATION = 8


@dataclass(frozen=True)
class WeightedAdapter:
    """Layers of one adapter by canonical module name, with strengths."""

    layers: Mapping[str, LayerWeights]
    strengths: Strengths = field(default_factory=Strengths)


def layers_of(
    key: str, adapters: Sequence[WeightedAdapter]
) -> list[tuple[LayerWeights, Strengths]]:
    """Return the layers that adapt a tensor. The key is a module name with ``.weight``."""
    if not key.endswith(".weight"):
        return []
    name = key.removesuffix(".weight")
    return [(a.layers[name], a.strengths) for a in adapters if name in a.layers]


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values of a floating-point tensor are finite."""
    # A sum that includes infinity or NaN is not finite, and is much faster than checking each
    # value. A sum that is not finite may also have overflowed.
    total = tensor.sum(dtype=upcast_dtype(tensor))
    return math.isfinite(total) or bool(tensor.isfinite().all())


def merged_weight(weight: Tensor, adapted: Sequence[Tensor]) -> Tensor:
    """Combine adapted weights of one base: ``W + sum_k (W'_k - W)``, in float32.

    The differences are summed in float64, so that the order of the adapters does not matter.
    """
    if len(adapted) == 1:
        return adapted[0]
    base = to_float64(weight)
    total = sum((to_float64(merged) - base for merged in adapted), base)
    return total.to(weight.device, upcast_dtype(weight))


@torch.no_grad()
def merge_tensor(weight: Tensor, layers: Layers, dtype: torch.dtype | None = None) -> Tensor:
    """Merge layers of adapters into a weight in float32, and cast the result.

    Args:
        weight: Base weight as the model stores it, any floating dtype.
        layers: Adapter layers, each with its strengths. If empty, the weight is only cast.
        dtype: Dtype of the result. Default: the dtype of ``weight``.

    Returns:
        A new tensor on the device of ``weight``, with its shape.

    Raises:
        MergeError: If the result is not finite. Without layers, a weight that was not finite before
            the cast is allowed.
    """
    dtype = dtype or weight.dtype
    name = str(dtype).removeprefix("torch.")
    if not layers:
        cast = weight.to(dtype)
        if dtype != weight.dtype and not is_finite(cast) and is_finite(weight):
            raise MergeError(
                f"the base weight {tuple(weight.shape)} has values beyond the range of {name}; use "
                "a data type with a larger range (bfloat16 or float32)"
            )
        return cast
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    kind = _kind_of(layers)
    weight, merged = out_in(weight, kind), out_in(result, kind)
    with full_precision(weight.device), one_thread():
        layers = [(_copied(layer, weight), strengths) for layer, strengths in layers]
        for dim, start, length in _blocks(weight, [layer for layer, _ in layers]):
            block = weight.narrow(dim, start, length)
            adapted = [
                adapted_weight(block, layer.narrow(dim, start, length), **vars(strengths))
                for layer, strengths in layers
            ]
            target = merged.narrow(dim, start, length).copy_(merged_weight(block, adapted))
            # Values beyond the range of the dtype are cast to inf.
            if not is_finite(target):
                raise MergeError(
                    f"the merged weight {tuple(result.shape)} is not finite in {name}; lower the "
                    "strength, or use a data type with a larger range"
                )
    return result


def _kind_of(layers: Layers) -> LayerKind:
    """Return the layer kind of the weight that the layers adapt.

    Raises:
        ValueError: If the kinds differ.
    """
    kinds: set[LayerKind] = {layer.kind for layer, _ in layers}
    if len(kinds) > 1:
        raise ValueError(f"adapters of one weight have kinds {' and '.join(sorted(kinds))}")
    return kinds.pop() if kinds else "plain"


def _copied(layer: LayerWeights, weight: Tensor) -> LayerWeights:
    """Copy a layer to the device of a weight, in the dtype of the merge and in new memory.

    The order of sums in BLAS may depend on the alignment of its operands.
    """
    device, dtype = weight.device, upcast_dtype(weight)
    down, up = (
        factor.to(device, dtype).clone(memory_format=torch.contiguous_format)
        for factor in (layer.down, layer.up)
    )
    magnitude = None if layer.magnitude is None else layer.magnitude.to(device)
    return dataclasses.replace(layer, down=down, up=up, magnitude=magnitude)


def _blocks(weight: Tensor, layers: Sequence[LayerWeights]) -> Iterator[tuple[int, int, int]]:
    """Yield blocks of a weight that can be merged independently, as (dim, start, length).

    Channels along the norm axis are independent. Merging blocks of channels that fit the
    processor's cache is several times faster than merging the whole weight. Adapters on both axes
    have no independent blocks, and a GPU does not need them.
    """
    axes = {layer.norm_axis for layer in layers if layer.magnitude is not None}
    dim = 1 if axes == {"input"} else 0
    channels, whole = weight.shape[dim], len(axes) > 1 or weight.device.type != "cpu"
    least = _COLUMNS if weight.stride(dim) < weight.stride(1 - dim) else 1
    length = channels if whole else max(least, _BLOCK * channels // max(1, weight.numel()))
    for start in range(0, channels, max(1, length)):
        yield dim, start, min(length, channels - start)


@torch.no_grad()
def merge_error(weight: Tensor, layers: Layers) -> Tensor:
    """Bound the rounding error of each entry of a merge before the cast, as the model stores it.

    The error of an entry of ``W' = g (W + s B A)`` is proportional to the magnitudes of its terms,
    ``g (|W| + s |B| |A|)``, and so is that of the norm in ``g``. If the terms nearly cancel, the
    magnitudes are much larger than the sum.
    """
    kind = _kind_of(layers)
    base = upcast(out_in(weight, kind))
    total = base.abs()
    for layer, strengths in layers:
        error = _adapted_error(base, _copied(layer, weight), strengths)
        total = total + abs(strengths.strength) * (error + base.abs())
    return out_in(_SUMMATION * torch.finfo(torch.float32).eps * total, kind)


def _adapted_error(base: Tensor, layer: LayerWeights, strengths: Strengths) -> Tensor:
    """Return the magnitudes of the terms of ``W'``, including the terms of its norm."""
    scale = strengths.direction_strength * layer.scale
    terms = low_rank_delta(layer.down.abs(), layer.up.abs(), abs(scale)) + base.abs()
    if layer.magnitude is None:
        return terms
    direction = base + low_rank_delta(layer.down, layer.up, scale)
    norm = weight_norm(direction, layer.norm_axis).clamp_min(NORM_FLOOR)
    magnitude = upcast(layer.magnitude).abs()
    if strengths.magnitude_strength != 1.0:
        start = weight_norm(base, layer.norm_axis)
        magnitude = start + abs(strengths.magnitude_strength) * (magnitude + start)

    def along(vector: Tensor) -> Tensor:
        return per_channel(vector, base.ndim, layer.norm_axis)

    of_norm = weight_norm(terms, layer.norm_axis) / norm
    return along(magnitude / norm) * (terms + direction.abs() * along(of_norm))


def cast_error(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound the rounding error of a cast: half the distance of adjacent values in the dtype."""
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps / 2  # Half the smallest subnormal number.
    return upcast(tensor).abs() * (info.eps / 2) + smallest
