"""DoRA on one page: the formula in the paper's order.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353 (ICML 2024).

    W' = m * (W + delta) / norm(W + delta),    delta = s * B @ A,    m starts as norm(W)

Weights are ``(out, in, *k)``; weights that a model stores as ``(in, out)`` are transposed views.
Norms and weights are computed in float32 (float64 for float64 weights). `adapted_weight` is the
formula: merges and exports call it, and tests compare layers with ``x @ adapted_weight(...).T + b``
and its gradients by autograd.

Layers compute the same from factors that are computed once per step (`dora_forward`). With ``n =
norm(W + delta)`` a constant in the backward pass (section 4.3) and ``g = m / n`` (section 4.1):

    output axis    y = W' x + b = g (W x + b) + g s B A x + (1 - g) b
                   dL/dm = sum(dy (W + delta) x) / n = sum(dy (y - b)) / (g n)
    input axis     y = W' x + b = (W + delta) (g x) + b
                   dL/dm = sum(d(g x) x) / n = sum(d(g x) (g x)) / (g n)

The last sums need no tensor that is not saved anyway. Gradients of A and B are the ones of a LoRA
with ``g s B`` and the input x, or with ``s B`` and the input ``g x``. `forward_of` is the table of
who computes which layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_diffusion.numerics.fused import FusedLayer, FusedNode, Scale
from dora_diffusion.numerics.operation import Operation, RowOperation
from dora_diffusion.numerics.precision import full_precision, to_float64, upcast, upcast_dtype
from dora_diffusion.numerics.weights import LayerWeights, MergeError, NormAxis, out_in

# Far below any pretrained norm, but large enough that m / NORM_FLOOR stays finite in float32. A
# channel with a smaller norm is 0. It is a lower bound and is not added, so that no norm changes.
NORM_FLOOR = 1e-30


def low_rank_delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``s * B @ A`` (section 3.1): ``(r, in, *k)`` and ``(out, r, ...)`` -> ``(out, in, *k)``."""
    delta = (scale * upcast(up).flatten(1)) @ upcast(down).flatten(1)
    return delta.view(up.shape[0], *down.shape[1:])


def squared_norm(weight: Tensor, axis: NormAxis) -> Tensor:
    """Squared L2 norm per output or input channel: ``(out, in, *k)`` -> ``(out,)`` or ``(in,)``.

    The authors' code and PEFT use the output axis. The input axis is the formula of the paper as
    printed (section 3.2: the norm of each column of ``W`` in R^{d x k}).
    """
    if axis == "output":
        dims = list(range(1, weight.ndim))
        norm: Tensor = torch.linalg.vector_norm(weight, dim=dims, dtype=upcast_dtype(weight))
        return norm.square()
    # Added row by row, since torch is several times slower and less exact across rows.
    columns = upcast(weight).flatten(1).square().sum(dim=0)
    return columns.view(weight.shape[1], -1).sum(dim=1)


def weight_norm(weight: Tensor, axis: NormAxis) -> Tensor:
    """L2 norm per channel: the initial magnitude, equal to the factored norm if delta is 0."""
    return squared_norm(weight, axis).sqrt()


def per_channel(vector: Tensor, ndim: int, axis: NormAxis) -> Tensor:
    """View ``(n,)`` to broadcast along the output or input axis of a weight with ``ndim`` axes."""
    return vector.view(-1, *[1] * (ndim - 1) if axis == "output" else [1] * (ndim - 2))


@torch.no_grad()
def adapted_norm(weight: Tensor, layer: LayerWeights) -> Tensor:
    """``norm(W + delta)``, without gradient (section 4.3): ``(out,)`` or ``(in,)``."""
    with full_precision(weight.device):
        direction = upcast(weight) + low_rank_delta(layer.down, layer.up, layer.scale)
        return weight_norm(direction, layer.norm_axis)


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``g = m / norm`` (section 4.1), the factor of a channel; 0 if the norm is 0."""
    quotient = magnitude / norm.clamp_min(NORM_FLOOR)
    return quotient.masked_fill(norm <= NORM_FLOOR, 0.0)


def interpolated_magnitude(weight: Tensor, layer: LayerWeights, strength: float) -> Tensor:
    """Interpolate between ``norm(W)`` (strength 0) and the magnitude (strength 1, unchanged)."""
    assert layer.magnitude is not None
    magnitude = upcast(layer.magnitude)
    if strength == 1.0:
        return magnitude
    start = weight_norm(weight, layer.norm_axis)
    return start + strength * (magnitude - start)


def adapted_weight(
    weight: Tensor,
    layer: LayerWeights,
    *,
    strength: float = 1.0,
    direction_strength: float = 1.0,
    magnitude_strength: float = 1.0,
) -> Tensor:
    """Compute the merged weight ``W + strength * (W' - W)`` (section 4.1): ``(out, in, *k)``.

    The result is float32, and differentiable in A, B and m. ``strength`` 0 is exactly ``W`` and 1
    exactly ``W'``. ``direction_strength`` multiplies ``delta`` inside the norm, and
    ``magnitude_strength`` the change of the magnitude from ``norm(W)``.

    Raises:
        ValueError: If the layer has another weight shape.
    """
    if layer.weight_shape != tuple(weight.shape):
        raise ValueError(
            f"the adapter is for a weight of shape {layer.weight_shape}, but the base has "
            f"{tuple(weight.shape)}"
        )
    base = upcast(weight)
    down, up = layer.down.to(base.dtype), layer.up.to(base.dtype)
    adapted = base + low_rank_delta(down, up, direction_strength * layer.scale)
    if layer.magnitude is not None:
        norm = weight_norm(adapted.detach(), layer.norm_axis)
        g = gain(interpolated_magnitude(base, layer, magnitude_strength), norm)
        adapted = adapted * per_channel(g, weight.ndim, layer.norm_axis)
    return adapted if strength == 1.0 else base + strength * (adapted - base)


@torch.no_grad()
def at_strength(weight: Tensor, layer: LayerWeights, strength: float) -> LayerWeights:
    """Return the layer whose merged weight is that of a DoRA layer at a strength.

    ``W + t (W' - W) = h W + t g s B A`` with ``h = 1 - t + t g`` per channel, which is a DoRA of
    the same rank: its update is ``t g / h`` times ``s B A``, and its magnitude is ``h`` times the
    norm. The factors are float32.

    Args:
        weight: Base weight as the model stores it.
        layer: The layer, with a magnitude.
        strength: The strength t.

    Raises:
        MergeError: If ``h`` is 0 for a channel, whose weight would not contain W.
    """
    assert layer.magnitude is not None
    base, axis = to_float64(out_in(weight, layer.kind)), layer.norm_axis
    wide = dataclasses.replace(layer, down=to_float64(layer.down), up=to_float64(layer.up))
    g = gain(to_float64(layer.magnitude), adapted_norm(base, wide))
    h = 1 - strength + strength * g
    name = "up" if axis == "output" else "down"
    factor = getattr(wide, name) * per_channel(strength * g / h, layer.down.ndim, axis)
    if not factor.isfinite().all():
        raise MergeError(
            f"strength {strength:g} removes the base weight from a channel of a layer, which no "
            "DoRA can represent; use another strength, or export a merged model"
        )
    scaled = dataclasses.replace(wide, **{name: factor}).to(torch.float32)
    magnitude = h * adapted_norm(base, scaled.to(torch.float64))
    return dataclasses.replace(scaled, magnitude=magnitude.to(torch.float32))


def weight_change(weight: Tensor, layer: LayerWeights) -> Tensor:
    """Compute ``W' - W`` in float32, ``(out, in, *k)``, for a weight as the model stores it."""
    weight = out_in(weight, layer.kind)
    return adapted_weight(weight, layer) - upcast(weight)


class Factors(NamedTuple):
    """Factors of a layer in its compute dtype, with gradients to A, B and m.

    Attributes:
        down: ``A``.
        up: ``g s B`` on the output axis, else ``s B``.
        gain: ``g``, ``(n,)``, in float32, since a gain near 1 would be rounded to 1 in 16 bits. It
            represents m in the graph. Its gradient is ``g`` times the derivative,
            ``sum(dy * (y - b))``. With ``gain_in_graph`` its gradient is the derivative. None: the
            layer is a LoRA, and the following attributes are None, too.
        shift: ``(1 - g) b`` on the output axis; None without a bias and on the input axis.
        mean: ``b`` ``(out,)`` in the gain's dtype; None without ``shift`` or gradients.
        axis: Norm axis.
        gain_in_graph: Whether the product with ``gain`` is part of the graph ("direct" layer). It
            must be if |g| is too small for ``y / g``, or if the next module overwrites y.
        direction: ``W + s B A`` of a direct layer on the output axis, else None.
    """

    down: Tensor
    up: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    axis: NormAxis = "output"
    gain_in_graph: bool = False
    direction: Tensor | None = None


def factors_of(
    weight: Tensor,
    bias: Tensor | None,
    layer: LayerWeights,
    dtype: torch.dtype,
    magnitude_strength: float = 1.0,
    norm: Tensor | None = None,
) -> Factors:
    """Compute the factors of one layer with standard autograd.

    Args:
        weight: Base weight ``(out, in, *k)``.
        bias: Bias ``(out,)``, or None.
        layer: The adapter.
        dtype: Compute dtype.
        magnitude_strength: See `interpolated_magnitude`.
        norm: ``norm(W + s B A)``. Default: it is computed.
    """
    down, up = layer.down.to(dtype), layer.scale * layer.up
    if layer.magnitude is None:
        return Factors(down, up.to(dtype))
    norm = adapted_norm(weight, layer) if norm is None else norm
    g = gain(interpolated_magnitude(weight, layer, magnitude_strength), norm)
    constant, axis, shift = g.detach(), layer.norm_axis, None
    if axis == "output":
        up = per_channel(constant, up.ndim, axis) * up
        shift = None if bias is None else ((1 - constant) * bias).to(dtype)
    direction = direction_of(weight, layer, dtype)
    return Factors(down, up.to(dtype), g, shift, None, axis, True, direction)


@torch.no_grad()
def direction_of(weight: Tensor, layer: LayerWeights, dtype: torch.dtype) -> Tensor | None:
    """Compute `Factors.direction` of a direct layer."""
    # Dynamo of torch 2.6 cannot trace `dataclasses.replace`.
    lora = LayerWeights(layer.down, layer.up, alpha=layer.alpha)
    return None if layer.norm_axis == "input" else adapted_weight(weight, lora).to(dtype)


def dora_forward(
    op: Operation, x: Any, weight: Tensor, bias: Tensor | None, factors: Factors,
    base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``y = W' x + b`` in training: ``(..., in)`` -> ``(..., out)``, or images.

    Args:
        op: Operation that applies a weight.
        x: Input.
        weight: Base weight ``(out, in, *k)``.
        bias: Bias, which is not scaled, or None.
        factors: Factors, in the dtype of the weight. If each row of x has factors of its own, they
            are stacked (`RowOperation`).
        base: ``W x + b``. Default: it is computed.
    """
    f, trains = factors, factors.gain is not None and factors.gain.requires_grad
    if f.down.ndim > weight.ndim:
        op = RowOperation(op, x.ndim, len(f.down))
    axis = None if f.gain is None else f.axis
    forward = forward_of(op, axis, f.gain_in_graph, trains, base is not None)
    return forward(op, x, weight, bias, f, base)


def forward_of(
    op: Operation, axis: NormAxis | None, gain_in_graph: bool = False, trains: bool = True,
    has_base: bool = False,
) -> Callable[..., Tensor]:  # fmt: skip
    """Return the implementation of a layer. Nothing else chooses one.

    | layer | computed by |
    |---|---|
    | LoRA | `lora_forward` |
    | DoRA on the input axis | `input_forward` |
    | on the output axis, gain in the graph (see `Factors`) | `direct_forward` |
    | on the output axis, if the gain does not train, the base is given, blocks are compiled, rows \
      have adapters of their own, or in an Embedding, Conv1d or grouped Conv2d | `scaled_forward` |
    | on the output axis otherwise: Linear, Conv2d | `fused_forward` |

    Args:
        op: Operation of the layer, or of its rows.
        axis: Norm axis; None for a LoRA.
        gain_in_graph: See `Factors`.
        trains: Whether the gain needs a gradient.
        has_base: Whether ``W x + b`` is given.
    """
    if axis is None:
        return lora_forward
    if axis == "input":
        return input_forward
    if gain_in_graph:
        return direct_forward
    is_fused = op.is_plain and trains and not has_base and not torch.compiler.is_compiling()
    return fused_forward if is_fused else scaled_forward


def lora_forward(op: Operation, x: Any, weight: Tensor, bias: Any, f: Any, base: Any) -> Tensor:
    """``(W x + b) + s B A x``."""
    base = op.apply(x, weight, bias) if base is None else base
    y: Tensor = base + op.up_project(op.down_project(x, f.down), f.up)
    return y


def input_forward(op: Operation, x: Any, weight: Tensor, bias: Any, f: Any, base: Any) -> Tensor:
    """``(W + s B A) (g x) + b``: the LoRA on ``g x``."""
    gx = op.scale_input(x, f.gain) if f.gain_in_graph else Scale.apply(op, None, x, f.gain, None)
    return lora_forward(op, gx, weight, bias, f, None)


def scaled_forward(op: Operation, x: Any, weight: Tensor, bias: Any, f: Any, base: Any) -> Tensor:
    """``g (W x + b) + (g s B A x + (1 - g) b)``."""
    base = op.apply(x, weight, bias) if base is None else base
    low_rank = op.up_project(op.down_project(x, f.down), f.up, f.shift)
    gain = f.gain.detach() if f.gain_in_graph else f.gain
    y: Tensor = Scale.apply(op, low_rank, base, gain, f.mean)
    return y


def fused_forward(op: Operation, x: Any, weight: Tensor, bias: Any, f: Any, base: Any) -> Tensor:
    """`scaled_forward` as one node of the graph."""
    y: Tensor = FusedNode.apply(FusedLayer(op, weight, bias, f), None, x, f.down, f.up, f.gain)
    return y


def direct_forward(op: Operation, x: Any, weight: Tensor, bias: Any, f: Any, base: Any) -> Tensor:
    """`scaled_forward`, whose gain has its derivative from ``(W + s B A) x``."""
    y = scaled_forward(op, x, weight, bias, f, base)
    with torch.no_grad():
        unscaled = op.apply(x, f.direction)
    zero = (f.gain - f.gain.detach()).view(op.shape)
    return y + (zero * unscaled).to(y.dtype)


def sum_of_adapters(
    op: Operation, x: Any, weight: Tensor, bias: Tensor | None,
    adapters: Sequence[tuple[Factors, float, Any]],
) -> Tensor:  # fmt: skip
    """``W x + b + sum_k strength_k (W'_k - W) x_k``: adapters, each on the unmerged base.

    Args:
        op: Operation that applies a weight.
        x: Input.
        weight: Base weight.
        bias: Bias, or None.
        adapters: Factors, strength and input of each adapter. The input is ``x`` or ``x`` after
            dropout (as in PEFT).
    """
    first, strength, adapter_input = adapters[0]
    if len(adapters) == 1 and strength == 1 and adapter_input is x:
        return dora_forward(op, x, weight, bias, first)
    total = base = op.apply(x, weight, bias)
    for factors, strength, adapter_input in adapters:
        if factors.gain is None:
            difference = op.up_project(op.down_project(adapter_input, factors.down), factors.up)
        else:
            unadapted = base if adapter_input is x else op.apply(adapter_input, weight, bias)
            y = dora_forward(op, adapter_input, weight, bias, factors, unadapted)
            difference = y - unadapted
        total = total + strength * difference
    return total
