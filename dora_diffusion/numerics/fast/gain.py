"""One adapter on one layer: what its gain is computed from, and what the layer gets to compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dora_diffusion.numerics.dora import squared_norm
from dora_diffusion.numerics.fast.norms import checksum
from dora_diffusion.numerics.fast.reentrant import in_backward, own_factors
from dora_diffusion.numerics.precision import full_precision
from dora_diffusion.numerics.weights import LayerWeights, NormAxis

if TYPE_CHECKING:
    from dora_diffusion.numerics.fast.plan import Plan


class WeightStatistics:
    """Statistics of a frozen base weight ``(out, in, *k)``; both ``(n,)`` on the norm's axis.

    Attributes:
        squared_norm: ``|W|^2``.
        checksum: Tells whether it is still the same weight.
    """

    def __init__(self, weight: Tensor, axis: NormAxis) -> None:
        self.axis: NormAxis = axis
        self.update(weight)

    def update(self, weight: Tensor) -> None:
        """Compute the statistics of a weight, which are a pass over it each."""
        with full_precision(weight.device):
            self.squared_norm = squared_norm(weight, self.axis)
            self.checksum = checksum(weight, self.axis)


class PlanInputs(NamedTuple):
    """One adapter on one layer.

    Attributes:
        weights: Its parameters, with the strength of its direction in their scale.
        magnitude: What acts as its magnitude, ``(n,)``: the parameter, unless a strength moves it.
        weight: Base weight ``(out, in, *k)``.
        bias: ``(out,)``, or None.
        statistics: Of the weight.
        keep_output: See `Factors.recomputed`.
    """

    weights: LayerWeights
    magnitude: Tensor
    weight: Tensor
    bias: Tensor | None
    statistics: WeightStatistics
    keep_output: bool = True


class Factors(NamedTuple):
    """What a layer computes with, in the dtype that it computes in. Gradients flow to A, B and m.

    Attributes:
        down: ``A``.
        up: ``g s B`` on the output axis, ``s B`` on the input axis.
        gain: ``g``, ``(n,)``, of a convolution ``(n, 1, 1)``, float32: in 16 bits, a gain near 1
            would be rounded to 1.
        shift: ``(1 - g) b`` on the output axis; None without a bias and on the input axis.
        sums: Stands for m in the graph. Its gradient is what m's is made of: ``sum(dy * y)``,
            ``(n,)``, float32; on the input axis ``sum(x * dx)``, before the gain.
        shift_sums: The same for the shift: ``sum(dy)``. None where there is no shift.
    """

    down: Tensor
    up: Tensor
    gain: Tensor
    shift: Tensor | None
    sums: Tensor
    shift_sums: Tensor | None


class Gain(NamedTuple):
    """One adapter's part of a plan.

    Attributes:
        norm: ``norm(W + sBA)``, ``(n,)``, float32.
        gain: ``g = m / norm``, ``(n,)``, float32.
        small: Channels whose direction is recomputed for the gradient of m, since ``|g|`` is too
            small to divide by, or since the next module overwrites the output; None: no channel.
        axis: Norm axis.
        prepared: What all layers of the plan compute with.
        number: The layer's place there.
        made: Its own part of that, by dtype, as far as it was made.
    """

    norm: Tensor
    gain: Tensor
    small: Tensor | None
    axis: NormAxis
    prepared: Prepared
    number: int
    made: dict[torch.dtype, Factors]

    def factors(self, dtype: torch.dtype) -> Factors:
        """What the layer computes with; made for all layers of the plan at the first call."""
        if dtype not in self.made:
            self.prepared.make(dtype)
        factors = self.made[dtype]
        if torch.compiler.is_compiling():
            return factors
        return self.prepared.in_this_pass(self.number, factors)

    def direction(self) -> LayerWeights:
        """The adapter as it was when the plan was made, float32, without its magnitude."""
        return self.prepared.plan.direction(self.number)


class Prepared:
    """The factors of a plan's layers, by dtype, each made when it is first asked for.

    Attributes:
        plan: Of the layers.
        made: Of each layer, in the plan's order: its factors by dtype.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.made: list[dict[torch.dtype, Factors]] = [{} for _ in plan.layers]
        self._without_gradients: set[int] = set()

    def make(self, dtype: torch.dtype) -> None:
        """Make those of a dtype, for all layers."""
        for made, factors in zip(self.made, self.plan.factors(dtype), strict=True):
            made[dtype] = factors

    def in_this_pass(self, number: int, factors: Factors) -> Factors:
        """A layer's factors; of its own, where reentrant checkpointing recomputes the layer."""
        if not torch.is_grad_enabled():
            self._without_gradients.add(number)
        elif number in self._without_gradients and in_backward():
            return own_factors(self.plan, number, factors)
        return factors
