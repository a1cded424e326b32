"""Norms, gains and factors from parameters alone, made once per step for many layers.

The norm is detached (paper, section 4.3), so norms and gains are computed outside of the graph, and
reused over gradient accumulation, checkpoint recomputation, guidance and all of sampling. The same
holds for the factors in the compute dtype, with the gain in B. For all layers and all of their K
adapters together: on small tensors an operation's fixed price is the whole price. A single adapter
is K = 1. What differs is only what the rows of a batch choose: with a number all have that adapter,
and the layer computes as it does alone; with a tuple each has its own (`RowOperation`).

Gradients take the same way back. `_Prepare` is one node of the graph, from the parameters to what
the layers compute with: each layer gives it the products and sums that only it can make, and what
follows from these is done once: after each backward pass, where the graph has edges to the
parameters, or after the last one of a step, where `give_gradients` is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_diffusion.adapters.layout import (
    DeferredFlags,
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

# A layer with a channel whose |g| is below this is direct: dividing g out of what it keeps would
# magnify the rounding of that, or be 0 / 0.
SMALL_GAIN = 1e-3
# Checksums of one weight differ by their rounding, of about 1e-6 |W_i|; this is squared.
SAME_WEIGHT = 1e-10
# Where flags are read a step late, they are raised this much earlier.
MARGIN = 2.0


def make_scales(sites: Sequence[Site]) -> list[LayerScales]:
    """The norms and gains of many layers, each with one adapter.

    A layer with an ill-conditioned channel (whose terms cancel, or whose gain is small) takes a
    path of its own; whether there is any is all that is read back from the device. So does a layer
    whose weight has changed: no version counter sees a base weight that is written through
    ``.data``, but its checksum does.
    """
    return scales_of(layouts_of(sites))


def scales_of(
    layouts: Mapping[Any, Layout], flags: Mapping[Any, DeferredFlags] | None = None
) -> list[LayerScales]:
    """`make_scales` of layers with layouts, from their present parameters.

    Args:
        layouts: What `layouts_of` made.
        flags: Flags of each layout from the step before, so that nothing waits.
    """
    scales: dict[int, LayerScales] = {}
    for kind, layout in layouts.items():
        plan = Plan(layout, None if flags is None else flags[kind])
        # Not in the plan: the graph leads from the factors to it, and cycles are freed late.
        made: list[dict[torch.dtype, Factors]] = [{} for _ in layout.sites]
        for place, number in enumerate(layout.numbers):
            scales[number] = LayerScales(plan, place, made[place], made)
    return [scales[number] for number in range(len(scales))]


class LayerScales(NamedTuple):
    """One adapter's part of a plan.

    Attributes:
        plan: The plan, which makes the factors of all layers at once.
        place: The layer's place there.
        factors_by_dtype: The layer's factors, as far as they were made.
        factors_of_all: The same for each layer of the plan.
    """

    plan: Plan
    place: int
    factors_by_dtype: dict[torch.dtype, Factors]
    factors_of_all: Sequence[dict[torch.dtype, Factors]]

    @property
    def norm(self) -> Tensor | None:
        """``norm(W + sBA)``, ``(n,)``, float32; None of a LoRA."""
        norm = self.plan.norm
        return None if norm is None else torch.split(norm, self.plan.layout.sizes)[self.place]

    def factors(self, dtype: torch.dtype) -> Factors:
        """Return the layer's factors; made for all layers of the plan at the first call."""
        if dtype not in self.factors_by_dtype:
            made = self.plan.factors(dtype)
            for factors_by_dtype, factors in zip(self.factors_of_all, made, strict=True):
                factors_by_dtype[dtype] = factors
        if not torch.is_grad_enabled():
            self.plan.ran_without_gradients.add(self.place)
        elif self.place in self.plan.ran_without_gradients and _in_backward():
            # Reentrant checkpointing, which goes back from each block on its own. Through the plan
            # it would reach the parameters of all blocks each time, and so tell
            # DistributedDataParallel that gradients are complete which are not.
            site = self.plan.layout.sites[self.place]
            return factors_of(site.weight, site.bias, site.adapters[0], dtype, norm=self.norm)
        return self.factors_by_dtype[dtype]


def _in_backward() -> bool:
    """Return whether a backward pass runs in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


class FixedScales:
    """Factors of an adapter that does not train, by dtype.

    Args:
        site: The layer with the adapter.
        scales: The layer's part of a plan, which is freed once the factors are made.
    """

    def __init__(self, site: Site, scales: LayerScales) -> None:
        self._site = site
        self._scales: LayerScales | None = scales
        self.factors_by_dtype: dict[torch.dtype, Factors] = {}

    def factors(self, dtype: torch.dtype) -> Factors:
        """The factors, without what only gradients need."""
        if dtype not in self.factors_by_dtype:
            scales = self._scales or make_scales([self._site])[0]
            made, self._scales = scales.factors(dtype), None
            down, up, gain = made.down.detach(), made.up.detach(), made.gain
            gain = None if gain is None else gain.detach()
            # On the output axis only its gradient makes a layer direct.
            gain_in_graph = made.gain_in_graph and made.axis == "input"
            kept = Factors(down, up, gain, made.shift, None, made.axis, gain_in_graph)
            self.factors_by_dtype[dtype] = kept
        return self.factors_by_dtype[dtype]


class LayerTensors(NamedTuple):
    """Fields of `Factors` of each layer, as `_Prepare` returns them, or their gradients.

    LoRA has no gains, and layers without any bias no numerators and shifts.
    """

    down: Sequence[Tensor | None]
    up: Sequence[Tensor | None]
    gain: Sequence[Tensor | None] = ()
    shift_numerator: Sequence[Tensor | None] = ()
    shift: Sequence[Tensor | None] = ()


class Plan:
    """Norms, gains and factors from the present parameters of a layout.

    Args:
        layout: Where these are.
        flags: Of a loop, which reads them a step late; None: at once.
        has_edges: Whether the graph leads to the parameters, so that each backward pass adds to
            their ``grad``. Else what all passes left is theirs with `give_gradients`, and a further
            pass costs a few additions.

    Attributes:
        norm: ``norm(W + sBA)`` of all channels, float32; None of LoRA.
        gain: ``g = m / norm``; None of LoRA.
        direct: Places of layers that multiply by their gain in the graph (`Factors.gain_in_graph`).
    """

    def __init__(
        self, layout: Layout, flags: DeferredFlags | None = None, *, has_edges: bool = True
    ) -> None:
        self.layout, self.has_edges = layout, has_edges
        self.down, self.up = join(layout.downs).to(layout.dtype), layout.up()
        self.direct, self.ran_without_gradients = set(layout.direct), set[int]()
        self._left: list[Tensor] | None = None
        self._used: set[int] = set()
        self.norm: Tensor | None = None
        self.gain: Tensor | None = None
        if layout.has_gain:
            layout.update_bias()
            with torch.no_grad(), full_precision(layout.device):
                self._make_norms(flags)
        self._scales = layout.row_scales(self.gain)

    def _make_norms(self, flags: DeferredFlags | None) -> None:
        """Compute norms and gains, and again for flagged layers."""
        layout, margin = self.layout, 1.0 if flags is None else MARGIN
        terms = Terms(*(torch.cat(term) for term in zip(*self._terms(), strict=True)))
        if (shard := layout.sites[0].shard) is not None:
            squares = shard.add_up(torch.cat([terms.change, terms.bound.square(), terms.checksum]))
            change, bound, checksum = torch.split(squares, [len(term) for term in terms])
            terms = Terms(change, bound.sqrt(), checksum)
        total = terms.change + layout.base
        self.norm = total.clamp_min(0).sqrt_()
        self.gain = gain_of(join(layout.magnitudes).to(layout.dtype), self.norm)
        # Not less: what is not a number must be found too.
        flagged = is_ill_conditioned(total, layout.base, terms.bound, margin).logical_or_(
            ~(self.gain.abs() >= margin * SMALL_GAIN)
        )
        is_other = (terms.checksum - layout.recorded).square() > SAME_WEIGHT * layout.recorded_base
        found = (flags or DeferredFlags()).layers(
            torch.cat([flagged, is_other]), layout.sizes + layout.widths
        )
        count, adapters = layout.count, len(layout.sizes)
        changed = sorted(number - adapters for number in found if number >= adapters)
        for place in changed:
            site = layout.sites[place]
            site.statistics.update(site.weight)  # type: ignore[union-attr]
        if changed:
            layout.update_statistics()
        again = {place * count + k for place in changed for k in range(count)}
        # In order, since processes that share the weights recompute together.
        for number in sorted(again.union(number for number in found if number < adapters)):
            self._recompute(number)

    def _terms(self) -> list[list[Tensor]]:
        """The terms of each shape's norms, flat; of sharded weights this process's summands."""
        layout, on_output = self.layout, self.layout.axis == "output"
        up, scales = self.up, layout.shape_scales
        if None in scales:  # Then it is in B.
            up, scales = scaled(up, layout.scales), [1.0] * len(scales)
        downs, ups = layout.factors_by_shape(self.down, up)
        wide, parts = [downs if on_output else ups], []
        if any(layout.widens) and on_output:
            parts = [layout.factors_by_shape(part, up)[0] for part in parts_of(self.down)]
        elif any(layout.widens):
            split = zip(*map(parts_of, up), strict=True)
            parts = [layout.factors_by_shape(self.down, part)[1] for part in split]
        made = []
        for number, sites in enumerate(layout.shapes):
            seen = parts if layout.widens[number] else wide
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
            made.append([term.flatten() for term in terms])
        return made

    def _recompute(self, number: int) -> None:
        """Norm and gain of an adapter that was flagged, from its dense weight where need be."""
        layout, (place, k) = self.layout, divmod(number, self.layout.count)
        assert self.norm is not None
        assert self.gain is not None
        norm, gain = (torch.split(all_, layout.sizes)[number] for all_ in (self.norm, self.gain))
        site = layout.sites[place]
        own, shard = site.adapters[k], site.shard
        given = site.weight, own.down, own.up, own.scale, own.norm_axis
        if shard is None:
            assert site.statistics is not None
            norm.copy_(factored_norm(*given, site.statistics.squared_norm))
        else:
            part = exact_squared_norm(site.weight, own.down, shard.own(own.up), *given[3:])
            norm.copy_(shard.add_up(shard.partial_sum(part, own.norm_axis)).sqrt())
        assert own.magnitude is not None
        gain.copy_(gain_of(own.magnitude.to(norm.dtype), norm))
        if bool((gain.abs() < SMALL_GAIN).any()):
            self.direct.add(place)

    def factors(self, dtype: torch.dtype, rows: Rows = 0) -> list[Factors]:
        """Return the layers' factors in a dtype, for a batch whose rows use these adapters."""
        layout, count = self.layout, len(self.layout.sites)
        # The first call of a layer may be one without gradients, as with checkpointing.
        with torch.inference_mode(False), torch.enable_grad():
            start = layout.parameters if self.has_edges else [layout.anchor]
            made: tuple[Tensor, ...] = _Prepare.apply(self, dtype, rows, *start)  # type: ignore[no-untyped-call]
        tensors = LayerTensors(*(made[i : i + count] for i in range(0, len(made), count)))
        each: Iterable[Any] = zip_longest(*tensors, layout.has_bias)
        return [
            Factors(
                down,
                up,
                gain,
                shift if has_bias else None,
                numerator if has_bias else None,
                layout.axis,
                place in self.direct,
                self.direction(place, rows, dtype)
                if place in self.direct and isinstance(rows, int)
                else None,
            )
            for place, (down, up, gain, numerator, shift, has_bias) in enumerate(each)
        ]

    def direction(self, place: int, k: int, dtype: torch.dtype) -> Tensor | None:
        """`direction_of` one adapter of a layer; None of a sharded one."""
        site = self.layout.sites[place]
        return None if site.shard else direction_of(site.weight, site.adapters[k], dtype)

    def prepared(self, dtype: torch.dtype, rows: Rows) -> list[Tensor]:
        """Return `LayerTensors` one after the other; the values of numerators are never read."""
        layout = self.layout
        buffers = [part.to(dtype) for part in (self.down, *scaled(self.up, self._scales))]
        if self.gain is not None:
            buffers.append(self.gain)
            if any(layout.has_bias):
                shifts = ((1 - self.gain) * layout.bias).to(dtype)
                buffers += [torch.empty_like(self.gain), shifts]
        return layout.gather(rows, buffers)

    # Gradients

    def flat_gradients(self, rows: Rows, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Return buffers of gradients: A, B of each rank, sums for m, and sums of shifts."""
        layout, count = self.layout, len(self.layout.sites)
        each = LayerTensors(*(grads[i : i + count] for i in range(0, len(grads), count)))
        used = [place for place, grad in enumerate(each.down) if grad is not None]
        self._used.update(used)
        buffers = layout.new_buffers(rows, zero=len(used) < count)
        targets = zip(layout.views(rows, buffers), (*each.down, *each.up), strict=True)
        if pairs := [(target, grad) for target, grad in targets if grad is not None]:
            torch._foreach_copy_([target for target, _ in pairs], [grad for _, grad in pairs])
        # Zeros where no bias was reached, so that all passes leave the same buffers.
        sums = [layout.cat(rows, grad) for grad in (each.gain, each.shift_numerator) if grad]
        return layout.scatter_add(rows, buffers + sums)

    def gradients(self, made: list[Tensor]) -> list[Tensor | None]:
        """The gradients of the layout's parameters, of buffers that this changes."""
        layout, ranks = self.layout, len(self.up)
        ups = made[1 : 1 + ranks]
        for up, scale in zip(ups, self._scales, strict=True):
            if not (isinstance(scale, float) and scale == 1):
                up.mul_(scale)
        views = layout.views(layout.whole, made[: 1 + ranks])
        parts = views if layout.count == 1 else [own for view in views for own in view.unbind()]
        if layout.has_gain:
            parts += torch.split(self._magnitude_gradient(made[1 + ranks :]), layout.sizes)
        each = len(layout.sizes)
        found: list[Tensor | None] = []
        for number, (part, parameter) in enumerate(zip(parts, layout.parameters, strict=True)):
            if number % each // layout.count not in self._used:
                found.append(None)
                continue
            if part.shape != parameter.shape:  # A smaller rank, and a convolution's ones.
                rows, columns = parameter.shape[:2]
                part = part[:rows, :columns].view(parameter.shape)
            found.append(part if part.dtype == parameter.dtype else part.to(parameter.dtype))
        return found

    def _magnitude_gradient(self, sums: Sequence[Tensor]) -> Tensor:
        """``dm_i = sum(dy_i * (y_i - b_i)) / (g_i norm_i)``: ``(W + sBA) x`` is the rest.

        On the input axis the sum is that of ``g x`` times its gradient; direct layers have dm
        times the norm.
        """
        assert self.gain is not None
        assert self.norm is not None
        layout, total = self.layout, sums[0]
        for shifts in sums[1:]:
            total.addcmul_(shifts, layout.bias, value=-1)
        gain = self.gain.masked_fill(self.gain == 0, 1)
        if self.direct:
            parts = torch.split(gain, [layout.count * width for width in layout.widths])
            for place in self.direct:
                parts[place].fill_(1)
        return total.div_(gain.mul_(self.norm.clamp_min(NORM_FLOOR)))

    @torch.no_grad()
    def give_gradients(self) -> None:
        """Give the parameters their ``grad`` after the backward passes of a plan without edges.

        Those that no pass has reached have none. A and B that other parameters make lead on there.
        """
        if self._left is None:
            return
        made = []
        found = self.gradients(self._left)
        for parameter, gradient in zip(self.layout.parameters, found, strict=True):
            if gradient is not None and parameter.grad_fn is None:
                parameter.grad = gradient
            elif gradient is not None:
                made.append((parameter, gradient))
        if made:
            torch.autograd.backward([p for p, _ in made], [gradient for _, gradient in made])


class _Prepare(torch.autograd.Function):
    """All A, B and m of a plan to the factors of its layers.

    Nothing is saved that a backward pass frees: with gradient accumulation there are several.
    Layers that were not called have no gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, dtype: torch.dtype, rows: Rows, *parameters: Tensor
    ) -> tuple[Any, ...]:
        ctx.plan, ctx.rows = plan, rows
        ctx.set_materialize_grads(False)
        made = plan.prepared(dtype, rows)
        ctx.mark_non_differentiable(*made[4 * len(plan.layout.sites) :])  # The shifts.
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        if plan.has_edges:
            # Of these alone, whatever earlier passes have reached.
            plan._used.clear()
            return None, None, None, *plan.gradients(plan.flat_gradients(ctx.rows, grads))
        made = plan.flat_gradients(ctx.rows, grads)
        if plan._left is None:
            plan._left = made
        else:
            torch._foreach_add_(plan._left, made)
        return None, None, None, None
