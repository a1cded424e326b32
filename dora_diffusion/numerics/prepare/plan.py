"""What follows from the parameters of many layers alone, made once per step for all of them.

The norm is detached (paper, section 4.3), so norms and gains are computed outside of the graph, and
reused over gradient accumulation, checkpoint recomputation, guidance and all of sampling. The same
holds for the factors in the compute dtype, with the gain in B. For all layers together: on small
tensors an operation's fixed price is the whole price.

Gradients take the same way back. `_Prepare` is one node of the graph, from the parameters to what
the layers compute with: each layer gives it the products and sums that only it can make, and what
follows from these is done there once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_diffusion.numerics.dora import NORM_FLOOR
from dora_diffusion.numerics.dora import gain as gain_of
from dora_diffusion.numerics.precision import full_precision
from dora_diffusion.numerics.prepare.factors import (
    Factors,
    LayerScales,
    PlanInputs,
    direction_of,
)
from dora_diffusion.numerics.prepare.layout import DeferredFlags, Layout, join, layouts_of
from dora_diffusion.numerics.prepare.norms import (
    SameShape,
    Terms,
    exact_squared_norm,
    factored_norm,
    is_ill_conditioned,
    norm_terms,
    parts_of,
    widens,
)

# A layer with a channel whose |g| is below this is direct: dividing g out of what it keeps would
# magnify the rounding of that, or be 0 / 0.
SMALL_GAIN = 1e-3
# Checksums of one weight differ by their rounding, of about 1e-6 |W_i|; this is squared.
SAME_WEIGHT = 1e-10
# Where flags are read a step late, they are raised this much earlier.
MARGIN = 2.0


def make_scales(
    layers: Sequence[PlanInputs], flags: DeferredFlags | None = None
) -> list[LayerScales]:
    """The norms and gains of many layers, with one wait for the device in all.

    A layer with an ill-conditioned channel (whose terms cancel, or whose gain is small) takes a
    path of its own; whether there is any is all that is read back from the device. So does a layer
    whose weight has changed: no version counter sees a base weight that is written through
    ``.data``, but its checksum does.

    Args:
        layers: What they are computed from.
        flags: What was read back a step late of the step before, so that nothing waits.
    """
    return scales_of(layouts_of(layers), flags)


def scales_of(layouts: Sequence[Layout], flags: DeferredFlags | None = None) -> list[LayerScales]:
    """`make_scales` of layers whose layouts are there already, from what is in them now."""
    scales: dict[int, LayerScales] = {}
    for layout in layouts:
        made = Plan(layout).scales(flags if len(layouts) == 1 else None)
        scales |= zip(layout.numbers, made, strict=True)
    return [scales[number] for number in range(len(scales))]


class FixedScales:
    """What a layer computes with of an adapter that does not train, by the dtype.

    Args:
        inputs: What it is made of.
        scales: The layer's part of a plan, which is let go once the factors are made.
    """

    def __init__(self, inputs: PlanInputs, scales: LayerScales) -> None:
        self._inputs = inputs
        self._scales: LayerScales | None = scales
        self.factors_by_dtype: dict[torch.dtype, Factors] = {}

    def factors(self, dtype: torch.dtype) -> Factors:
        """The factors, without what only gradients need."""
        if dtype not in self.factors_by_dtype:
            scales = self._scales or make_scales([self._inputs])[0]
            made, self._scales = scales.factors(dtype), None
            down, up, gain = made.down.detach(), made.up.detach(), made.gain
            gain = None if gain is None else gain.detach()
            self.factors_by_dtype[dtype] = Factors(down, up, gain, made.shift, None, made.axis)
        return self.factors_by_dtype[dtype]


class Plan:
    """What follows from the present values of a layout's parameters."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.layers = layout, layout.layers
        self.down, self.up = layout.down(), layout.up()
        self.ran_without_gradients: set[int] = set()
        self.direct = {i for i, layer in enumerate(self.layers) if layer.is_direct}

    @torch.no_grad()
    def scales(self, flags: DeferredFlags | None) -> list[LayerScales]:
        """Norms and gains; those of flagged layers in a way of their own."""
        with full_precision(self.down.device):
            flagged = self._norms(1.0 if flags is None else MARGIN)
            norms, gains = self.layout.vectors(self.norm), self.layout.vectors(self.gain)
            # In order, since processes that share the weights recompute together.
            for number in sorted((flags or DeferredFlags()).layers(flagged, self.layout.sizes)):
                self._recompute(number, norms[number], gains[number])
        # Not in the plan: the graph leads from the factors to it, and cycles are freed late.
        made: list[dict[torch.dtype, Factors]] = [{} for _ in self.layers]
        parts = enumerate(zip(norms, gains, made, strict=True))
        return [LayerScales(norm, gain, self, i, own, made) for i, (norm, gain, own) in parts]

    def _norms(self, margin: float) -> Tensor:
        """Norms and gains of all layers, and which of their channels are flagged."""
        terms = Terms(*(torch.cat(term) for term in zip(*self._terms(), strict=True)))
        if (shard := self.layers[0].shard) is not None:
            squares = torch.stack([terms.change, terms.bound.square(), terms.checksum])
            change, bound, checksum = shard.add_up(squares).unbind()
            terms = Terms(change, bound.sqrt(), checksum)
        base = torch.cat([layer.statistics.squared_norm for layer in self.layers])
        recorded = torch.cat([layer.statistics.checksum for layer in self.layers])
        total = terms.change + base
        self.norm = total.clamp_min(0).sqrt_()
        magnitude = join([layer.magnitude for layer in self.layers]).to(self.layout.dtype)
        self.gain = gain_of(magnitude, self.norm)
        # Not less: what is no number must be found too.
        flagged = is_ill_conditioned(total, base, terms.bound, margin).logical_or_(
            ~(self.gain.abs() >= margin * SMALL_GAIN)
        )
        flagged |= (terms.checksum - recorded).square() > SAME_WEIGHT * base
        return flagged

    def _terms(self) -> list[list[Tensor]]:
        """The terms of each shape's norms, flat; of sharded weights this process's summands."""
        layout = self.layout
        downs, ups = layout.stacked_downs(self.down), self._own_ups(self.up)
        split = any(widens(layers[0].weight) for layers in layout.shapes)
        down_parts = [layout.stacked_downs(part) for part in parts_of(self.down)] if split else []
        each_up = map(parts_of, self.up if split else ())
        up_parts = [self._own_ups(parts) for parts in zip(*each_up, strict=True)]
        made: list[list[Tensor]] = []
        for number, layers in enumerate(layout.shapes):
            first = layers[0]
            on_output = first.weights.norm_axis == "output"
            seen = [downs] if on_output else [ups]
            if widens(first.weight):
                seen = down_parts if on_output else up_parts
            same = SameShape(
                [layer.weight for layer in layers],
                downs[number],
                ups[number],
                first.weights.scale,
                first.weights.norm_axis,
                [part[number] for part in seen],
            )
            terms: Iterable[Tensor] = norm_terms(same)
            if (shard := first.shard) is not None:
                terms = [shard.summand(term, first.weights.norm_axis) for term in terms]
            made.append([term.flatten() for term in terms])
        return made

    def _own_ups(self, joined: Sequence[Tensor]) -> list[Tensor]:
        """`Layout.stacked_ups`, of sharded weights the rows that this process has."""
        pairs = zip(self.layout.stacked_ups(joined), self.layout.shapes, strict=True)
        return [
            ups if layers[0].shard is None else layers[0].shard.own(ups, 1) for ups, layers in pairs
        ]

    def _recompute(self, number: int, norm: Tensor, gain: Tensor) -> None:
        """Norm and gain of a layer that was flagged, from its dense weight where need be."""
        layer = self.layers[number]
        layer.statistics.update(layer.weight)
        w, shard = layer.weights, layer.shard
        if shard is None:
            factors = layer.weight, w.down, w.up, w.scale, w.norm_axis
            norm.copy_(factored_norm(*factors, layer.statistics.squared_norm))
        else:
            own = exact_squared_norm(layer.weight, w.down, shard.own(w.up), w.scale, w.norm_axis)
            norm.copy_(shard.add_up(shard.summand(own, w.norm_axis)).sqrt())
        gain.copy_(gain_of(layer.magnitude, norm))
        if bool((gain.abs() < SMALL_GAIN).any()):
            self.direct.add(number)

    def factors(self, dtype: torch.dtype) -> list[Factors]:
        """What the layers compute with in a dtype."""
        parameters = [
            *(layer.weights.down for layer in self.layers),
            *(layer.weights.up for layer in self.layers),
            *(layer.magnitude for layer in self.layers),
        ]
        # Whoever calls a layer first may do so without gradients, as checkpointing does.
        with torch.inference_mode(False), torch.enable_grad():
            made: tuple[Tensor, ...] = _Prepare.apply(self, dtype, *parameters)  # type: ignore[no-untyped-call]
        count, shifts = len(self.layers), self._shifts(dtype)
        downs, ups, gains = (made[i * count : (i + 1) * count] for i in range(3))
        shift_numerators = iter(made[3 * count :])
        return [
            Factors(
                downs[number],
                ups[number],
                gains[number],
                shift,
                None if shift is None else next(shift_numerators),
                self.layers[number].weights.norm_axis,
                number in self.direct,
                self._direction(number, dtype) if number in self.direct else None,
            )
            for number, shift in enumerate(shifts)
        ]

    def _direction(self, number: int, dtype: torch.dtype) -> Tensor | None:
        """`direction_of` a layer as it was when the plan was made; None of a sharded one."""
        if self.layers[number].shard is not None:
            return None
        down, up = self.layout.downs(self.down)[number], self.layout.ups(self.up)[number]
        layer = self.layers[number]
        weights = dataclasses.replace(layer.weights, down=down, up=up)
        return direction_of(layer.weight, weights, dtype)

    def _shifts(self, dtype: torch.dtype) -> Sequence[Tensor | None]:
        """``(1 - g) b`` of each layer that has a bias to spare."""
        biases = self.layout.biases
        if not any(bias is not None for bias in biases):
            return [None] * len(biases)
        self.bias = self._joined(biases).to(self.layout.dtype)
        shifts = self.layout.vectors(((1 - self.gain) * self.bias).to(dtype))
        return [None if b is None else shift for b, shift in zip(biases, shifts, strict=True)]

    def _joined(self, vectors: Iterable[Tensor | None]) -> Tensor:
        """A vector over all channels, of each layer's, and zeros where it has none."""
        pairs = zip(vectors, self.layout.sizes, strict=True)
        return join([self._zeros[:size] if vector is None else vector for vector, size in pairs])

    @cached_property
    def _zeros(self) -> Tensor:
        return self.gain.new_zeros(max(self.layout.sizes))

    def magnitude_gradient(
        self, sums: Sequence[Tensor | None], shift_sums: Sequence[Tensor | None]
    ) -> Tensor:
        """``dm_i = sum(dy_i * (y_i - b_i)) / (g_i norm_i)``: ``(W + sBA) x`` is the rest.

        On the input axis the sum is that of ``g x`` times its gradient; direct layers have dm
        times the norm.
        """
        total = self._joined(sums)
        if any(part is not None for part in shift_sums):
            each = iter(shift_sums)
            shifts = self._joined(None if b is None else next(each) for b in self.layout.biases)
            total.addcmul_(shifts, self.bias, value=-1)
        gain = self.gain.masked_fill(self.gain == 0, 1)
        parts = self.layout.vectors(gain)
        for number in self.direct:
            parts[number].fill_(1)
        return total.div_(gain.mul_(self.norm.clamp_min(NORM_FLOOR)))


class _Prepare(torch.autograd.Function):
    """All A, B and m of a plan to the factors of its layers.

    Nothing is saved that a backward pass frees: with gradient accumulation there are several.
    Layers that were not called have no gradients.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, dtype: torch.dtype, *parameters: Tensor) -> tuple[Any, ...]:
        ctx.plan, ctx.dtypes = plan, [parameter.dtype for parameter in parameters]
        ctx.set_materialize_grads(False)
        layout = plan.layout
        ctx.scales = scales = layout.up_scales(plan.gain)
        down = plan.down.to(dtype)
        ups = [(up * scale).to(dtype) for up, scale in zip(plan.up, scales, strict=True)]
        each = zip(layout.sizes, layout.biases, strict=True)
        shifted = [size for size, bias in each if bias is not None]
        numerators = torch.cat([plan.gain, plan.gain.new_zeros(sum(shifted))])
        split = torch.split(numerators, layout.sizes + shifted)
        return *layout.downs(down), *layout.ups(ups), *split

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, count = ctx.plan, len(ctx.plan.layers)
        grads, shift_sums = grads[: 3 * count], grads[3 * count :]
        downs, ups, sums = (grads[i * count : (i + 1) * count] for i in range(3))
        down, up = torch.empty_like(plan.down), [torch.empty_like(rows) for rows in plan.up]
        made = [*plan.layout.downs(down), *plan.layout.ups(up)]
        given = zip(made, [*downs, *ups], strict=True)
        if pairs := [(part, grad) for part, grad in given if grad is not None]:
            torch._foreach_copy_([part for part, _ in pairs], [grad for _, grad in pairs])
        torch._foreach_mul_(up, ctx.scales)
        made += plan.layout.vectors(plan.magnitude_gradient(sums, shift_sums))
        return (
            None,
            None,
            *(
                None if grad is None else part if part.dtype == dtype else part.to(dtype)
                for part, grad, dtype in zip(made, grads, ctx.dtypes, strict=True)
            ),
        )
