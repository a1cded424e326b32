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
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_diffusion.numerics.dora import NORM_FLOOR
from dora_diffusion.numerics.dora import gain as gain_of
from dora_diffusion.numerics.fast.gain import Factors, Gain, PlanInputs, Prepared
from dora_diffusion.numerics.fast.norms import (
    SameShape,
    Terms,
    factored_norm,
    is_ill_conditioned,
    norm_terms,
    parts_of,
    widens,
)
from dora_diffusion.numerics.fast.watch import Watch
from dora_diffusion.numerics.precision import full_precision
from dora_diffusion.numerics.weights import LayerWeights

# Output channels whose |g| is below this recompute their direction for the gradient of m: dividing
# g out of y would magnify the rounding of y, or be 0 / 0.
SMALL_GAIN = 1e-3
# Checksums of one weight differ by their rounding, of about 1e-6 |W_i|; this is squared.
SAME_WEIGHT = 1e-10
# Where flags are read a step late, they are raised this much earlier.
MARGIN = 2.0


def make_gains(layers: Sequence[PlanInputs], watch: Watch | None = None) -> list[Gain]:
    """The gains of many layers, with one wait for the device in all, not one for each layer.

    A layer with an ill-conditioned channel (whose terms cancel, or whose gain is small) takes a
    path of its own; whether there is any is all that is read back from the device. So does a layer
    whose weight has changed: no version counter sees a base weight that is written through
    ``.data``, but its checksum does.

    Args:
        layers: What they are computed from.
        watch: What was read back a step late of the step before, so that nothing waits.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, layer in enumerate(layers):
        kind = (layer.weight.device, layer.statistics.squared_norm.dtype)
        kinds.setdefault(kind, []).append(number)
    gains: dict[int, Gain] = {}
    for numbers in kinds.values():
        order = sorted(numbers, key=lambda i: _kind(layers[i]))
        plan = Plan([layers[i] for i in order])
        gains |= zip(order, plan.gains(watch if len(kinds) == 1 else None), strict=True)
    return [gains[number] for number in range(len(layers))]


class Plan:
    """Layers of one device and precision. Made by `make_gains`.

    Everything of one kind lies in one buffer: all A one after the other, all B of one rank as rows,
    and all vectors. Layers of one shape are neighbours there.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[PlanInputs]) -> None:
        self.layers = layers
        self.wide = layers[0].statistics.squared_norm.dtype
        self.sizes = [layer.magnitude.shape[0] for layer in layers]
        self.sum_rows = [_rows_of_sums(layer) for layer in layers]
        self._ranks = [list(group) for _, group in groupby(layers, key=_rank)]
        self._shapes = [(layer.weights.down.shape, layer.weights.up.shape) for layer in layers]
        self.down = self._joined([layer.weights.down for layer in layers])
        self.up = [
            self._joined([layer.weights.up for layer in group]).view(-1, _rank(group[0]))
            for group in self._ranks
        ]

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(self.wide)

    def _downs(self, joined: Tensor) -> list[Tensor]:
        """Each layer's part of what is laid out as A."""
        parts = torch.split(joined, [shape.numel() for shape, _ in self._shapes])
        return [part.view(shape) for part, (shape, _) in zip(parts, self._shapes, strict=True)]

    def _ups(self, joined: Sequence[Tensor]) -> list[Tensor]:
        """Each layer's part of what is laid out as B."""
        parts: list[Tensor] = []
        for group, rows in zip(self._ranks, joined, strict=True):
            parts += torch.split(rows, [layer.weights.up.shape[0] for layer in group])
        # A Linear's is in shape already.
        return [
            part if len(shape) == 2 else part.view(shape)
            for part, (_, shape) in zip(parts, self._shapes, strict=True)
        ]

    def direction(self, number: int) -> LayerWeights:
        """One adapter, without its magnitude."""
        down, up = self._downs(self.down)[number], self._ups(self.up)[number]
        return dataclasses.replace(self.layers[number].weights, down=down, up=up, magnitude=None)

    def _vectors(self, joined: Tensor) -> Sequence[Tensor]:
        """Each layer's part of a vector over all channels."""
        return torch.split(joined, self.sizes)

    def part(self, joined: Tensor, number: int) -> Tensor:
        """One layer's part of a vector over all channels."""
        return self._vectors(joined)[number]

    @torch.no_grad()
    def gains(self, watch: Watch | None) -> list[Gain]:
        """Norms and gains; those of flagged layers in a way of their own."""
        with full_precision(self.down.device):
            flagged = self._norms(1.0 if watch is None else MARGIN)
            norms, gains = self._vectors(self.norm), self._vectors(self.gain)
            self.small: dict[int, Tensor] = {}
            for number in (watch or Watch()).layers(flagged, self.sizes):
                self._recompute(number, norms[number], gains[number])
        for number, layer in enumerate(self.layers):
            if not layer.keep_output and layer.weights.norm_axis == "output":
                self.small[number] = torch.arange(self.sizes[number], device=self.down.device)
        prepared = Prepared(self)
        axes = [layer.weights.norm_axis for layer in self.layers]
        return [
            Gain(norms[i], gains[i], self.small.get(i), axis, prepared, i, prepared.made[i])
            for i, axis in enumerate(axes)
        ]

    def _norms(self, margin: float) -> Tensor:
        """Norms and gains of all layers, and which of their channels are flagged."""
        terms = Terms(*(torch.cat(term) for term in zip(*self._terms(), strict=True)))
        base = torch.cat([layer.statistics.squared_norm for layer in self.layers])
        recorded = torch.cat([layer.statistics.checksum for layer in self.layers])
        total = terms.change + base
        self.norm = total.clamp_min(0).sqrt_()
        self.gain = gain_of(self._joined([layer.magnitude for layer in self.layers]), self.norm)
        # Not less: what is no number must be found too.
        flagged = is_ill_conditioned(total, base, terms.bound, margin).logical_or_(
            ~(self.gain.abs() >= margin * SMALL_GAIN)
        )
        flagged |= (terms.checksum - recorded).square() > SAME_WEIGHT * base
        return flagged

    def _terms(self) -> list[list[Tensor]]:
        """The terms of each shape's norms, flat."""
        downs, ups = self._downs(self.down), self._ups(self.up)
        split = any(widens(layer.weight) for layer in self.layers)
        down_parts = [self._downs(part) for part in parts_of(self.down)] if split else []
        each_up = map(parts_of, self.up if split else ())
        up_parts = [self._ups(parts) for parts in zip(*each_up, strict=True)]
        made: list[list[Tensor]] = []
        start = 0
        for _, group in groupby(self.layers, key=_kind):
            layers = list(group)
            place = slice(start, start + len(layers))
            on_output = layers[0].weights.norm_axis == "output"
            seen = [downs] if on_output else [ups]
            if widens(layers[0].weight):
                seen = down_parts if on_output else up_parts
            same = SameShape(
                [layer.weight for layer in layers],
                _stacked(downs[place]),
                _stacked(ups[place]),
                layers[0].weights.scale,
                layers[0].weights.norm_axis,
                [_stacked(part[place]) for part in seen],
            )
            made.append([term.flatten() for term in norm_terms(same)])
            start = place.stop
        return made

    def _recompute(self, number: int, norm: Tensor, gain: Tensor) -> None:
        """Norm and gain of a layer that was flagged, from its dense weight where need be."""
        layer = self.layers[number]
        layer.statistics.update(layer.weight)
        w = layer.weights
        factors = layer.weight, w.down, w.up, w.scale, w.norm_axis
        norm.copy_(factored_norm(*factors, layer.statistics.squared_norm))
        gain.copy_(gain_of(layer.magnitude, norm))
        small = (gain.abs() < SMALL_GAIN).nonzero().flatten()
        if len(small) and w.norm_axis == "output":
            self.small[number] = small

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
        count = len(self.layers)
        gains = self._vectors(self.gain)
        shifts = self._shifts(dtype)
        return [
            Factors(made[i], made[count + i], gains[i], shifts[i], made[2 * count + i])
            for i in range(count)
        ]

    def _shifts(self, dtype: torch.dtype) -> list[Tensor | None]:
        shifted = [rows == 2 for rows in self.sum_rows]
        if not any(shifted):
            return [None] * len(self.layers)
        self.bias = self._biases()
        parts = self._vectors(((1 - self.gain) * self.bias).to(dtype))
        return [part if has else None for part, has in zip(parts, shifted, strict=True)]

    def _biases(self) -> Tensor:
        """The biases on the output axis, and zeros where there is none."""
        biases = [layer.bias.detach() for layer in self.layers if layer.bias is not None]
        zeros = biases[0].new_zeros(max(self.sizes))
        parts = [
            zeros[:size] if rows == 1 or layer.bias is None else layer.bias.detach()
            for layer, size, rows in zip(self.layers, self.sizes, self.sum_rows, strict=True)
        ]
        return torch.cat(parts).to(self.wide)

    def up_scales(self) -> list[Tensor]:
        """The factor of each row of B, as B is laid out: ``g s``, or ``s``."""
        scales, start, one = [], 0, self.gain.new_ones(1)
        for group in self._ranks:
            parts: list[Tensor] = []
            for layer in group:
                size = layer.magnitude.shape[0]
                if layer.weights.norm_axis == "output":
                    parts.append(self.gain[start : start + size])
                else:
                    parts.append(one.expand(len(layer.weights.up)))
                start += size
            factor = torch.cat(parts)[:, None]
            own = {layer.weights.scale for layer in group}
            if len(own) == 1:
                scales.append(factor * own.pop())
            else:
                each = [factor.new_full((len(la.weights.up), 1), la.weights.scale) for la in group]
                scales.append(factor * torch.cat(each))
        return scales

    def divisor(self) -> Tensor:
        """What turns a layer's sums to the gradient of m: the norm, times g where y has it in."""
        norm = self.norm.clamp_min(NORM_FLOOR)
        axes = {layer.weights.norm_axis for layer in self.layers}
        if axes == {"input"}:
            return norm
        gain = self.gain.masked_fill(self.gain == 0, 1)
        parts = self._vectors(gain)
        for number, channels in self.small.items():
            parts[number][channels] = 1
        for part, layer in zip(parts, self.layers, strict=True):
            if len(axes) > 1 and layer.weights.norm_axis == "input":
                part.fill_(1)
        return norm.mul_(gain)


class _Prepare(torch.autograd.Function):
    """All A, B and m of a plan to the factors of its layers.

    Nothing is saved that a backward pass frees: with gradient accumulation there are several.
    Layers that were not called have no gradients.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, dtype: torch.dtype, *parameters: Tensor) -> tuple[Any, ...]:
        ctx.plan, ctx.dtypes = plan, [parameter.dtype for parameter in parameters]
        ctx.set_materialize_grads(False)
        scales = plan.up_scales()
        ctx.scales = scales
        down = plan.down.to(dtype)
        ups = [(up * scale).to(dtype) for up, scale in zip(plan.up, scales, strict=True)]
        counts = [rows * size for rows, size in zip(plan.sum_rows, plan.sizes, strict=True)]
        sums = torch.split(plan.gain.new_empty(sum(counts)), counts)
        return (
            *plan._downs(down),
            *plan._ups(ups),
            *(part.view(r, -1) for part, r in zip(sums, plan.sum_rows, strict=True)),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, count = ctx.plan, len(ctx.plan.layers)
        downs, ups, sums = (grads[i * count : (i + 1) * count] for i in range(3))
        whole = all(grad is not None for grad in grads)
        new = torch.empty_like if whole else torch.zeros_like
        down, up = new(plan.down), [new(rows) for rows in plan.up]
        made = [*plan._downs(down), *plan._ups(up)]
        _copy(made, [*downs, *ups])
        torch._foreach_mul_(up, ctx.scales)
        made += plan._vectors(_magnitude_gradient(plan, sums))
        return (
            None,
            None,
            *(
                None if grad is None else part.to(dtype)
                for part, grad, dtype in zip(made, grads, ctx.dtypes, strict=True)
            ),
        )


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor | None]) -> None:
    pairs = [(t, s) for t, s in zip(targets, sources, strict=True) if s is not None]
    if pairs:
        torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])


def _magnitude_gradient(plan: Plan, sums: Sequence[Tensor | None]) -> Tensor:
    """``dm_i = sum(dy_i * (y_i - b_i)) / (g_i norm_i)``, all layers': ``(W + sBA) x`` is the rest.

    On the input axis the sum is that of ``x * dx`` before the gain, over the norm alone.
    """
    zeros = plan.gain.new_zeros(max(plan.sizes))
    pairs = list(zip(sums, plan.sizes, strict=True))
    total = torch.cat([zeros[:size] if part is None else part[0] for part, size in pairs])
    if any(part is not None and part.shape[0] == 2 for part in sums):
        shifted = [
            zeros[:size] if part is None or part.shape[0] == 1 else part[1] for part, size in pairs
        ]
        total.addcmul_(torch.cat(shifted), plan.bias, value=-1)
    return total.div_(plan.divisor())


def _rows_of_sums(layer: PlanInputs) -> int:
    return 2 if layer.bias is not None and layer.weights.norm_axis == "output" else 1


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Neighbours in a buffer as one tensor ``(n, rows, columns)``, without a copy."""
    first = tensors[0]
    shape = (len(tensors), first.shape[0], first[0].numel())
    stride = (first.numel(), shape[2], 1)
    return first.as_strided(shape, stride, first.storage_offset())


def _rank(layer: PlanInputs) -> int:
    return layer.weights.rank


def _kind(layer: PlanInputs) -> tuple[Any, ...]:
    """What layers have in common whose norms are computed together; layers are sorted by it."""
    w = layer.weights
    return w.rank, w.norm_axis, tuple(layer.weight.shape), w.scale, str(layer.weight.dtype)
