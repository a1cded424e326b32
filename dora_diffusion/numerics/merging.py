"""Adapters merged into a weight, block by block, and how far rounding may take the result.

    merged = W + sum_i strength_i * (W'_i - W)

Exports and live layers both merge here, on a CPU in blocks of a fixed size and on one thread each,
from operands that were copied to fresh memory: so the result is the same bits whatever the number
of threads and wherever the tensors lie. Another processor or BLAS may round otherwise:
`merge_error` bounds by how much.
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

# Values that are merged at a time: their float32 copies fit into a processor's cache.
_BLOCK = 2**18
# Neighbouring inputs that are merged at a time: fewer would read a part of each cache line.
_COLUMNS = 128
# Roundings of an entry's terms, in any order, as a share of the sum of their magnitudes.
_SUMMATION = 8


@dataclass(frozen=True)
class WeightedAdapter:
    """The layers of one adapter, by canonical module name, and how strongly they act."""

    layers: Mapping[str, LayerWeights]
    strengths: Strengths = field(default_factory=Strengths)


def layers_of(
    key: str, adapters: Sequence[WeightedAdapter]
) -> list[tuple[LayerWeights, Strengths]]:
    """The layers that adapt the tensor ``key``, which is a module's name with ``.weight``."""
    if not key.endswith(".weight"):
        return []
    name = key.removesuffix(".weight")
    return [(a.layers[name], a.strengths) for a in adapters if name in a.layers]


def is_finite(tensor: Tensor) -> bool:
    """Return whether every number of a floating-point tensor is finite."""
    # A sum with infinity or NaN in it is one of them, and is known much sooner than each number.
    # Only a sum that overflows on its own needs these.
    total = tensor.sum(dtype=upcast_dtype(tensor))
    return math.isfinite(total) or bool(tensor.isfinite().all())


def merged_weight(weight: Tensor, adapted: Sequence[Tensor]) -> Tensor:
    """Several adapters on one base: ``W + sum_k (W'_k - W)``, in float32.

    Every difference is taken from the unmerged base. They are summed in float64, so that the order
    of the adapters does not matter.
    """
    if len(adapted) == 1:
        return adapted[0]
    base = to_float64(weight)
    total = sum((to_float64(merged) - base for merged in adapted), base)
    return total.to(weight.device, upcast_dtype(weight))


@torch.no_grad()
def merge_tensor(weight: Tensor, layers: Layers, dtype: torch.dtype | None = None) -> Tensor:
    """Merge one or several adapters' layers into one weight, in float32, cast once.

    Args:
        weight: Base weight as the model stores it, any floating dtype.
        layers: The layers that adapt it, each with its strengths.
        dtype: Of the result; that of ``weight`` if None.

    Returns:
        A new tensor on the device of ``weight``, of its shape; without layers, the weight cast.

    Raises:
        MergeError: If the result is not finite; without layers, if only the cast makes it so.
    """
    dtype = dtype or weight.dtype
    name = str(dtype).removeprefix("torch.")
    if not layers:
        cast = weight.to(dtype)
        if dtype != weight.dtype and not is_finite(cast) and is_finite(weight):
            raise MergeError(
                f"the base's weight {tuple(weight.shape)} has numbers that are beyond {name}; take "
                "a data type with larger numbers (bfloat16 or float32)"
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
            # Beyond the largest number of the dtype the cast gives inf: better no file than that.
            if not is_finite(target):
                raise MergeError(
                    f"the merged weight {tuple(result.shape)} is not finite in {name}; lower the "
                    "strength, or take a data type with larger numbers"
                )
    return result


def _kind_of(layers: Layers) -> LayerKind:
    """Return how the weight that all of these adapt is stored.

    Raises:
        ValueError: If they do not agree.
    """
    kinds: set[LayerKind] = {layer.kind for layer, _ in layers}
    if len(kinds) > 1:
        raise ValueError(f"adapters of one weight take it for {' and '.join(sorted(kinds))}")
    return kinds.pop() if kinds else "plain"


def _copied(layer: LayerWeights, weight: Tensor) -> LayerWeights:
    """The layer on the weight's device, its factors in fresh memory and in the merge's dtype.

    BLAS may sum in another order where its operands are aligned otherwise.
    """
    device, dtype = weight.device, upcast_dtype(weight)
    down, up = (
        factor.to(device, dtype).clone(memory_format=torch.contiguous_format)
        for factor in (layer.down, layer.up)
    )
    magnitude = None if layer.magnitude is None else layer.magnitude.to(device)
    return dataclasses.replace(layer, down=down, up=up, magnitude=magnitude)


def _blocks(weight: Tensor, layers: Sequence[LayerWeights]) -> Iterator[tuple[int, int, int]]:
    """Parts of a weight that can be merged each on its own, as (dim, start, length).

    A channel along the norm axis depends on no other. Blocks of them that stay in the processor's
    cache are merged several times faster than the whole, which goes through the memory for every
    operation. Adapters on both axes leave no such blocks, and a GPU gains nothing from them.
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
    """Bound the rounding error of each entry of a merge before its cast, as the model stores it.

    An entry of ``W' = g (W + s B A)`` is off by a share of the magnitudes of its terms,
    ``g (|W| + s |B| |A|)``, and so is the norm in ``g``. Where the terms nearly cancel, they are
    many times what they add up to.
    """
    kind = _kind_of(layers)
    base = upcast(out_in(weight, kind))
    total = base.abs()
    for layer, strengths in layers:
        error = _adapted_error(base, _copied(layer, weight), strengths)
        total = total + abs(strengths.strength) * (error + base.abs())
    return out_in(_SUMMATION * torch.finfo(torch.float32).eps * total, kind)


def _adapted_error(base: Tensor, layer: LayerWeights, strengths: Strengths) -> Tensor:
    """The magnitudes of the terms of ``W'``, those of its norm among them."""
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
    """Half the distance between neighbours of each entry in a dtype: the error of one cast."""
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps / 2  # half the smallest subnormal number
    return upcast(tensor).abs() * (info.eps / 2) + smallest
