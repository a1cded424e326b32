"""Norms, gains and factors, computed from the parameters once per step for many layers.

The norm is detached (paper, section 4.3), so norms and gains are computed outside of the graph, and
reused over gradient accumulation, checkpoint recomputation, guidance and all of sampling. So are
the factors in the compute dtype, with the gain in B. One operation serves all layers and all of
their K adapters, since launch overhead dominates on small tensors. A single adapter is K = 1. The
rows of a batch select the adapters: a number selects one adapter for all rows, as in a layer with
one adapter; a tuple selects an adapter for each row (`RowOperation`).

Gradients are batched in the same way. `_Prepare` is the node of the graph between the parameters
and the factors. Each layer passes the gradients of its factors to the node, which computes the
gradients of all parameters at once: after each backward pass, if the graph has edges to the
parameters; otherwise when `give_gradients` is called, after the last backward pass of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import zip_longest
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_diffusion.adapters.flags import DeferredFlags
from dora_diffusion.adapters.layout import (
    Layout,
    Rows,
    Site,
    join,
    layouts_of,
    scaled,
)
from dora_diffusion.numerics.dora import NORM_FLOOR, Factors, direction_of, factors_of
from dora_diffusion.numerics.dora import gain as gain_of
from dora_diffusion.numerics.norms import (
    Terms,
    exact_squared_norm,
    factored_norm,
    is_ill_conditioned,
    norm_terms,
    parts_of,
)
from dora_diffusion.numerics.precision import full_precision

# A layer with |g| below this in a channel is direct: dividing its saved tensors by g would amplify
# their rounding, or be 0 / 0.
SMALL_GAIN = 1e-3
# Squared tolerance of checksums: rounding changes the checksum of a weight by about 1e-6 |W_i|.
SAME_WEIGHT = 1e-10
# Factor of the thresholds if flags are read a step late.
MARGIN = 2.0


def make_scales(sites: Sequence[Site]) -> list[LayerScales]:
    """Compute the norms and gains of many layers, each with one adapter.

    Norms of layers with an ill-conditioned channel (its terms cancel, or its gain is small) are
    recomputed one by one; only the flags of these channels are read from the device. Norms of
    layers with a changed weight are recomputed as well: a checksum detects writes to a base weight
    through ``.data``, which no version counter shows.
    """
    return scales_of(layouts_of(sites))


def scales_of(
    layouts: Mapping[Any, Layout], flags: Mapping[Any, DeferredFlags] | None = None
) -> list[LayerScales]:
    """Compute the scales for existing layouts, from the current values of the parameters.

    Args:
        layouts: Result of `layouts_of`.
        flags: Flags of each layout, read one step late to avoid a synchronization. None reads them
            at once.
    """
    scales: dict[int, LayerScales] = {}
    for kind, layout in layouts.items():
        plan = Plan(layout, None if flags is None else flags[kind])
        # Not stored in the plan: the factors' graph refers to the plan, and cycles are freed late.
        factors: list[dict[torch.dtype, Factors]] = [{} for _ in layout.sites]
        for index, number in enumerate(layout.numbers):
            scales[number] = LayerScales(plan, index, factors[index], factors)
    return [scales[number] for number in range(len(scales))]


class LayerScales(NamedTuple):
    """One adapter's part of a plan.

    Attributes:
        plan: Plan that computes the factors of all layers at once.
        place: Index of the layer in the plan.
        factors_by_dtype: The layer's factors in the dtypes computed so far.
        factors_of_all: ``factors_by_dtype`` of each layer of the plan.
    """

    plan: Plan
    place: int
    factors_by_dtype: dict[torch.dtype, Factors]
    factors_of_all: Sequence[dict[torch.dtype, Factors]]

    @property
    def norm(self) -> Tensor | None:
        """``norm(W + sBA)``, ``(n,)``, float32; None for LoRA."""
        norm = self.plan.norm
        return None if norm is None else torch.split(norm, self.plan.layout.sizes)[self.place]

    def factors(self, dtype: torch.dtype) -> Factors:
        """Return the layer's factors. The first call computes them for all layers of the plan."""
        if dtype not in self.factors_by_dtype:
            plan_factors = self.plan.factors(dtype)
            for factors_by_dtype, factors in zip(self.factors_of_all, plan_factors, strict=True):
                factors_by_dtype[dtype] = factors
        is_in_backward = torch._C._current_graph_task_id() != -1  # In this thread.
        if not torch.is_grad_enabled():
            self.plan.ran_without_gradients.add(self.place)
        elif self.place in self.plan.ran_without_gradients and is_in_backward:
            # Reentrant checkpointing runs a backward pass per block. Through the plan each pass
            # would reach the parameters of all blocks, and DistributedDataParallel would reduce
            # incomplete gradients.
            site = self.plan.layout.sites[self.place]
            return factors_of(site.weight, site.bias, site.adapters[0], dtype, norm=self.norm)
        return self.factors_by_dtype[dtype]


class FixedScales:
    """Factors of an adapter that is not trained, by dtype.

    Args:
        site: The layer with the adapter.
        scales: The layer's part of a plan. It is freed when the factors are computed.
    """

    def __init__(self, site: Site, scales: LayerScales) -> None:
        self._site = site
        self._scales: LayerScales | None = scales
        self.factors_by_dtype: dict[torch.dtype, Factors] = {}

    def factors(self, dtype: torch.dtype) -> Factors:
        """Return the factors, without tensors that only gradients need."""
        if dtype not in self.factors_by_dtype:
            scales = self._scales or make_scales([self._site])[0]
            factors, self._scales = scales.factors(dtype), None
            down, up, gain = factors.down.detach(), factors.up.detach(), factors.gain
            gain = None if gain is None else gain.detach()
            # On the output axis only the gradient of m needs a direct layer.
            gain_in_graph = factors.gain_in_graph and factors.axis == "input"
            detached = Factors(down, up, gain, factors.shift, None, factors.axis, gain_in_graph)
            self.factors_by_dtype[dtype] = detached
        return self.factors_by_dtype[dtype]


class LayerTensors(NamedTuple):
    """Fields of `Factors` for each layer, in the order of `_Prepare`'s outputs, or their gradients.

    LoRA has no gains. Without any bias there are no shifts.
    """

    down: Sequence[Tensor | None]
    up: Sequence[Tensor | None]
    gain: Sequence[Tensor | None] = ()
    shift: Sequence[Tensor | None] = ()


class Collected(NamedTuple):
    """Gradients of the layers of a layout.

    Attributes:
        sums: Buffers for A, for B of each rank, and of the sums for m.
        pieces: `Layout.pieces` of the sums.
        used: Indices of the layers that a backward pass has reached.
    """

    sums: list[Tensor]
    pieces: Sequence[Tensor]
    used: Set[int]


NOTHING = Collected([], (), frozenset())


class Plan:
    """Norms, gains and factors, computed from the current parameters of a layout.

    Args:
        layout: Layout of the parameters.
        flags: Flags of a loop, read one step late. None reads them at once.
        has_edges: If True, each backward pass adds to the parameters' ``grad``. If False, backward
            passes only accumulate buffers, and `give_gradients` sets ``grad`` from their sum.
        shared: Whether the parameters' memory may be read in place. They must not change or move
            while the plan is in use.

    Attributes:
        norm: ``norm(W + sBA)`` of all channels, float32; None for LoRA.
        gain: ``g = m / norm``; None for LoRA.
        direct: Indices of layers that multiply by the gain in the graph (`Factors.gain_in_graph`).
    """

    def __init__(
        self,
        layout: Layout,
        flags: DeferredFlags | None = None,
        *,
        has_edges: bool = True,
        shared: bool = False,
    ) -> None:
        self.layout, self.has_edges, self._is_shared = layout, has_edges, shared
        self.down = layout.joined(layout.downs, shared=shared)
        self.up = layout.joined_ups(shared=shared)
        self.direct, self.ran_without_gradients = set(layout.direct), set[int]()
        self._left: list[Tensor] | None = None
        self._used: set[int] = set()
        self.norm: Tensor | None = None
        self.gain: Tensor | None = None
        if layout.has_gain:
            with torch.no_grad(), full_precision(layout.device):
                layout.update_bias()
                self._make_norms(flags)
        self.scales = layout.row_scales(self.gain)

    def _make_norms(self, flags: DeferredFlags | None) -> None:
        """Compute norms and gains, and recompute the norms of flagged layers."""
        layout, margin = self.layout, 1.0 if flags is None else MARGIN
        terms = Terms(*(torch.cat(term) for term in zip(*self._terms(), strict=True)))
        if (shard := layout.sites[0].shard) is not None:
            squares = shard.add_up(torch.cat([terms.change, terms.bound.square(), terms.checksum]))
            change, bound, checksum = torch.split(squares, [len(term) for term in terms])
            terms = Terms(change, bound.sqrt(), checksum)
        total = terms.change + layout.base
        self.norm = total.clamp_min(0).sqrt_()
        self.gain = gain_of(layout.joined(layout.magnitudes, shared=self._is_shared), self.norm)
        # Not ``<``, so that NaN is flagged too.
        flagged = is_ill_conditioned(total, layout.base, terms.bound, margin).logical_or_(
            ~(self.gain.abs() >= margin * SMALL_GAIN)
        )
        is_other = (terms.checksum - layout.recorded).square() > SAME_WEIGHT * layout.recorded_base
        raised = (flags or DeferredFlags()).layers(
            torch.cat([flagged, is_other]), layout.sizes + layout.widths
        )
        count, adapters = layout.count, len(layout.sizes)
        changed = sorted(number - adapters for number in raised if number >= adapters)
        for index in changed:
            site = layout.sites[index]
            site.statistics.update(site.weight)  # type: ignore[union-attr]
        if changed:
            layout.update_statistics()
        stale = {index * count + k for index in changed for k in range(count)}
        # Sorted, since processes that share the weights recompute together.
        for number in sorted(stale.union(number for number in raised if number < adapters)):
            self._recompute(number)

    def _terms(self) -> list[list[Tensor]]:
        """Return the terms of each shape's norms, flat; this process's summands if sharded."""
        layout, on_output = self.layout, self.layout.axis == "output"
        up, scales = self.up, layout.shape_scales
        if None in scales:  # Multiply B by the scales.
            up, scales = scaled(up, layout.scales), [1.0] * len(scales)
        downs, ups = layout.factors_by_shape(self.down, up)
        wide, splits = [downs if on_output else ups], []
        if any(layout.widens) and on_output:
            splits = [layout.factors_by_shape(part, up)[0] for part in parts_of(self.down)]
        elif any(layout.widens):
            split = zip(*map(parts_of, up), strict=True)
            splits = [layout.factors_by_shape(self.down, part)[1] for part in split]
        terms_by_shape = []
        for number, sites in enumerate(layout.shapes):
            seen = splits if layout.widens[number] else wide
            terms: Sequence[Tensor] = norm_terms(
                [site.weight for site in sites],
                downs[number].flatten(0, 1),
                ups[number].flatten(0, 1),
                cast(float, scales[number]),
                layout.axis,
                [part[number].flatten(0, 1) for part in seen],
            )
            if (shard := sites[0].shard) is not None:
                terms = [shard.partial_sum(term, layout.axis) for term in terms]
            terms_by_shape.append([term.flatten() for term in terms])
        return terms_by_shape

    def _recompute(self, number: int) -> None:
        """Recompute norm and gain of a flagged adapter, from its dense weight if necessary."""
        layout, (index, k) = self.layout, divmod(number, self.layout.count)
        assert self.norm is not None
        assert self.gain is not None
        norm, gain = (torch.split(all_, layout.sizes)[number] for all_ in (self.norm, self.gain))
        site = layout.sites[index]
        weights, shard = site.adapters[k], site.shard
        arguments = site.weight, weights.down, weights.up, weights.scale, weights.norm_axis
        if shard is None:
            assert site.statistics is not None
            norm.copy_(factored_norm(*arguments, site.statistics.squared_norm))
        else:
            part = exact_squared_norm(
                site.weight, weights.down, shard.own(weights.up), *arguments[3:]
            )
            norm.copy_(shard.add_up(shard.partial_sum(part, weights.norm_axis)).sqrt())
        assert weights.magnitude is not None
        gain.copy_(gain_of(weights.magnitude.to(norm.dtype), norm))
        if bool((gain.abs() < SMALL_GAIN).any()):
            self.direct.add(index)

    def factors(self, dtype: torch.dtype, rows: Rows = 0) -> list[Factors]:
        """Return the layers' factors in a dtype, for a batch whose rows use these adapters."""
        layout, count = self.layout, len(self.layout.sites)
        # The first call of a layer may run without gradients, as in checkpointing.
        with torch.inference_mode(False), torch.enable_grad():
            start = layout.parameters if self.has_edges else [layout.anchor]
            flat: tuple[Tensor, ...] = _Prepare.apply(self, dtype, rows, *start)  # type: ignore[no-untyped-call]
        tensors = LayerTensors(*(flat[i : i + count] for i in range(0, len(flat), count)))
        fields: Iterable[Any] = zip_longest(*tensors, layout.biases)
        return [
            Factors(
                down,
                up,
                gain,
                None if bias is None else shift,
                bias,
                layout.axis,
                index in self.direct,
                self._direction(index, rows, dtype) if index in self.direct else None,
            )
            for index, (down, up, gain, shift, bias) in enumerate(fields)
        ]

    def _direction(self, index: int, rows: Rows, dtype: torch.dtype) -> Tensor | None:
        """Return `direction_of` a layer with one adapter for all rows; None if it is sharded."""
        site = self.layout.sites[index]
        if site.shard or not isinstance(rows, int):
            return None
        return direction_of(site.weight, site.adapters[rows], dtype)

    def prepared(self, dtype: torch.dtype, rows: Rows) -> list[Tensor]:
        """Return the fields of `LayerTensors`, concatenated."""
        layout = self.layout
        buffers = [part.to(dtype) for part in (self.down, *scaled(self.up, self.scales))]
        if self.gain is not None:
            buffers.append(self.gain)
            if any(layout.has_bias):
                buffers.append(((1 - self.gain) * layout.bias).to(dtype))
        return layout.gather(rows, buffers)

    # Gradients

    def flat_gradients(self, rows: Rows, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Return buffers of gradients: A, B of each rank, and the sums for m."""
        layout, count = self.layout, len(self.layout.sites)
        layer_grads = LayerTensors(*(grads[i : i + count] for i in range(0, len(grads), count)))
        used = [index for index, grad in enumerate(layer_grads.down) if grad is not None]
        self._used.update(used)
        buffers = layout.new_buffers(rows, zero=len(used) < count)
        targets = zip(
            layout.views(rows, buffers), (*layer_grads.down, *layer_grads.up), strict=True
        )
        if pairs := [(target, grad) for target, grad in targets if grad is not None]:
            torch._foreach_copy_([target for target, _ in pairs], [grad for _, grad in pairs])
        # Zeros for layers without a gradient, so that all passes return the same buffers.
        sums = []
        if layer_grads.gain:
            sums.append(join(layout.with_zeros(rows, layer_grads.gain)))
        return layout.scatter_add(rows, buffers + sums)

    def gradients(self, collected: Collected) -> list[Tensor | None]:
        """Return the gradients of the layout's parameters. The sums are changed in place."""
        (sums, pieces, used), layout, ranks = collected, self.layout, len(self.up)
        for up, scale in zip(sums[1 : 1 + ranks], self.scales, strict=True):
            if not (isinstance(scale, float) and scale == 1):
                up.mul_(scale)
        if layout.has_gain:
            self._divide(sums[1 + ranks])
        gradients: list[Tensor | None] = list(pieces)
        if layout.has_other_dtypes:
            pairs = zip(pieces, layout.parameters, strict=True)
            gradients = [piece.to(parameter.dtype) for piece, parameter in pairs]
        if len(used) < len(layout.sites):
            for number in range(len(gradients)):
                if number % len(layout.sizes) // layout.count not in used:
                    gradients[number] = None
        return gradients

    def _divide(self, total: Tensor) -> None:
        """Compute ``dm_i = sum(dy_i * (y_i - b_i)) / (g_i norm_i)`` from the sums, in place.

        On the output axis ``y_i - b_i`` is ``g_i`` times row i of ``(W + sBA) x``. On the input
        axis the sum is over ``g x`` times its gradient. For direct layers the sum is dm times the
        norm.
        """
        assert self.gain is not None
        assert self.norm is not None
        layout = self.layout
        gain = self.gain.masked_fill(self.gain == 0, 1)
        if self.direct:
            gains = torch.split(gain, [layout.count * width for width in layout.widths])
            for index in self.direct:
                gains[index].fill_(1)
        total.div_(gain.mul_(self.norm.clamp_min(NORM_FLOOR)))

    @torch.no_grad()
    def give_gradients(self, collected: Collected = NOTHING) -> None:
        """Set the parameters' ``grad`` after the backward passes of a plan without edges.

        Parameters that no pass has reached get no gradient. Gradients of A and B from a
        parametrization are propagated to its parameters.

        Args:
            collected: Gradients of layers that are no part of the plan's graph.
        """
        if self._left is not None:
            if collected.used:
                torch._foreach_add_(self._left, collected.sums)
            used = collected.used | self._used
            collected = Collected(self._left, self.layout.pieces(self._left), used)
        if not collected.used:
            return
        indirect, gradients = [], self.gradients(collected)
        for parameter, gradient in zip(self.layout.parameters, gradients, strict=True):
            if gradient is not None and self.layout.is_derived and parameter.grad_fn is not None:
                indirect.append((parameter, gradient))
            elif gradient is not None:
                parameter.grad = gradient
        if indirect:
            torch.autograd.backward(
                [p for p, _ in indirect], [gradient for _, gradient in indirect]
            )


class _Prepare(torch.autograd.Function):
    """Autograd function from all A, B and m of a plan to the factors of its layers.

    It saves no tensors for backward, so several backward passes can run (gradient accumulation).
    Layers that were not called get no gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, dtype: torch.dtype, rows: Rows, *parameters: Tensor
    ) -> tuple[Any, ...]:
        ctx.plan, ctx.rows = plan, rows
        ctx.set_materialize_grads(False)
        tensors = plan.prepared(dtype, rows)
        ctx.mark_non_differentiable(*tensors[3 * len(plan.layout.sites) :])  # The shifts.
        return tuple(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        if plan.has_edges:
            # Only the layers of this pass, not of earlier passes.
            plan._used.clear()
            sums = plan.flat_gradients(ctx.rows, grads)
            collected = Collected(sums, plan.layout.pieces(sums), plan._used)
            return None, None, None, *plan.gradients(collected)
        buffers = plan.flat_gradients(ctx.rows, grads)
        if plan._left is None:
            plan._left = buffers
        else:
            torch._foreach_add_(plan._left, buffers)
        return None, None, None, None
