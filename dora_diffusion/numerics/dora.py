"""DoRA on one page: the formula in the paper's order, in plain autograd.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353 (ICML 2024).

    W' = m * (W + delta) / norm(W + delta),    delta = s * B @ A,    m starts as norm(W)

Weights are ``(out, in, *k)``, as PyTorch has them; those that a model stores as ``(in, out)`` are
seen transposed (`LayerKind`). Norms and weights are computed in float32 (float64 for
float64 weights), whatever the weight's dtype. Merges and exports call `adapted_weight`, layers
`dora_forward`; `numerics.fast` holds the same results for less, and tests hold both equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dora_diffusion.numerics.operation import OneHot, Operation
from dora_diffusion.numerics.precision import full_precision, wide, wide_dtype
from dora_diffusion.numerics.weights import LayerWeights, NormAxis

# Far below any pretrained norm, and far enough above float32's smallest number that m / FLOOR
# stays finite. A channel of a smaller norm is 0. Never added, so no norm is changed.
NORM_FLOOR = 1e-30


def low_rank_delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``s * B @ A`` (section 3.1): ``(r, in, *k)`` and ``(out, r, ...)`` -> ``(out, in, *k)``."""
    product = (scale * wide(up).flatten(1)) @ wide(down).flatten(1)
    return product.view(up.shape[0], *down.shape[1:])


def squared_norm(weight: Tensor, axis: NormAxis) -> Tensor:
    """Squared L2 norm per output or input channel: ``(out, in, *k)`` -> ``(out,)`` or ``(in,)``.

    The output axis is what the authors' code and PEFT use; the input axis is the paper's formula
    as printed (section 3.2: the norm of each column of ``W`` in R^{d x k}).
    """
    if axis == "input":
        # Added row by row, since torch is several times slower and less exact across rows.
        columns = wide(weight).flatten(1).square().sum(dim=0)
        return columns.view(weight.shape[1], -1).sum(dim=1)
    dims = list(range(1, weight.ndim))
    norm: Tensor = torch.linalg.vector_norm(weight, dim=dims, dtype=wide_dtype(weight))
    return norm.square()


def weight_norm(weight: Tensor, axis: NormAxis) -> Tensor:
    """L2 norm per channel, the magnitude of a fresh adapter: ``(out,)`` or ``(in,)``."""
    # Through the square, so that it is the factored norm's own bits where delta is 0.
    return squared_norm(weight, axis).sqrt()


def per_channel(vector: Tensor, ndim: int, axis: NormAxis) -> Tensor:
    """Shape ``(n,)`` to broadcast along the output or the input axis of an ``ndim`` weight."""
    return vector.view(-1, *[1] * (ndim - 1) if axis == "output" else [1] * (ndim - 2))


@torch.no_grad()
def adapted_norm(weight: Tensor, layer: LayerWeights) -> Tensor:
    """``norm(W + delta)``, a constant for the gradient (section 4.3): ``(out,)`` or ``(in,)``."""
    with full_precision(weight.device):
        direction = wide(weight) + low_rank_delta(layer.down, layer.up, layer.scale)
        return weight_norm(direction, layer.norm_axis)


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``g = m / norm`` (section 4.1), by which a channel is multiplied; 0 where its norm is 0."""
    quotient = wide(magnitude) / norm.clamp_min(NORM_FLOOR)
    return quotient.masked_fill(norm <= NORM_FLOOR, 0.0)


def moved_magnitude(weight: Tensor, layer: LayerWeights, magnitude_strength: float) -> Tensor:
    """The magnitude, moved by a share of its change from ``norm(W)``; 1 returns it unchanged."""
    assert layer.magnitude is not None
    magnitude = wide(layer.magnitude)
    if magnitude_strength == 1.0:
        return magnitude
    start = weight_norm(weight, layer.norm_axis)
    return start + magnitude_strength * (magnitude - start)


def adapted_weight(
    weight: Tensor,
    layer: LayerWeights,
    *,
    strength: float = 1.0,
    direction_strength: float = 1.0,
    magnitude_strength: float = 1.0,
) -> Tensor:
    """``W + strength * (W' - W)``, what a merge writes (section 4.1): ``(out, in, *k)``, float32.

    ``strength`` 0 is exactly ``W``, 1 exactly ``W'``. The others act inside: on ``delta`` before
    the norm is taken, and on the magnitude's change from ``norm(W)``. Differentiable in A, B and m.

    Raises:
        ValueError: If the layer is not for a weight of this shape.
    """
    if layer.weight_shape != tuple(weight.shape):
        raise ValueError(
            f"the adapter is for a weight of shape {layer.weight_shape}, "
            f"the base has {tuple(weight.shape)}"
        )
    base = wide(weight)
    down, up = layer.down.to(base.dtype), layer.up.to(base.dtype)
    adapted = base + low_rank_delta(down, up, direction_strength * layer.scale)
    if layer.magnitude is not None:
        norm = weight_norm(adapted.detach(), layer.norm_axis)
        g = gain(moved_magnitude(base, layer, magnitude_strength), norm)
        adapted = adapted * per_channel(g, weight.ndim, layer.norm_axis)
    return adapted if strength == 1.0 else base + strength * (adapted - base)


def dora_forward(
    op: Operation,
    x: Tensor | OneHot,
    weight: Tensor,
    bias: Tensor | None,
    layer: LayerWeights,
    norm: Tensor | None = None,
) -> Tensor:
    """``y = W' x + b``, what training computes: ``(..., in)`` -> ``(..., out)``, or images.

    ``op`` applies a weight: that of a Linear, a convolution or an Embedding, whose ``x`` are
    one-hot vectors. The bias ``(out,)`` is not scaled. ``norm`` is ``norm(W + delta)``, if at hand.
    """
    base = op(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    unbiased = base if bias is None else base - op.broadcast(bias.to(x.dtype))
    return base + dora_difference(op, x, weight, layer, norm=norm, unbiased=unbiased).to(x.dtype)


def dora_difference(
    op: Operation,
    x: Tensor | OneHot,
    weight: Tensor,
    layer: LayerWeights,
    magnitude_strength: float = 1.0,
    norm: Tensor | None = None,
    unbiased: Tensor | None = None,
) -> Tensor:
    """``(W' - W) x = (g - 1) W x + g s B A x``, with ``norm(W + delta)`` and ``W x`` if at hand.

    Not the product with ``W'``: in 16 bits, that would round updates away that are small beside W.
    """
    low, scale = x.dtype, layer.scale
    down, up = layer.down.to(low), layer.up.to(low)
    if layer.magnitude is None:
        return scale * op.pointwise(op.down_project(x, down), up)
    norm = adapted_norm(weight, layer) if norm is None else norm
    g = gain(moved_magnitude(weight, layer, magnitude_strength), norm)
    if layer.norm_axis == "input":
        scaled = op.scale_input(x, g).to(low)
        low_rank = op.pointwise(op.down_project(scaled, down), up)
        rest = op.scale_input(x, g - 1).to(low)
        return op(rest, weight.to(low)) + scale * low_rank
    unbiased = op(x, weight.to(low)) if unbiased is None else unbiased
    low_rank = op.pointwise(op.down_project(x, down), up)
    return op.broadcast(g - 1) * unbiased + op.broadcast(g * scale) * low_rank
