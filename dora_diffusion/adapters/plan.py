"""Norms and gains of many layers, computed from the parameters once per step.

The norm is detached (paper, section 4.3), so norms and gains are computed outside of the graph, and
reused over gradient accumulation, checkpoint recomputation, guidance and all of sampling. So are
the factors in the compute dtype, with the gain in B (`buffers`, `graph`). One operation serves all
layers, since launch overhead dominates on small tensors. Gradients are batched in the same way: the
gradients of all factors become those of the parameters at once.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_diffusion.adapters.flags import DeferredFlags
from dora_diffusion.adapters.layout import VECTOR, A, B, Layout
from dora_diffusion.adapters.pack import padded_factors
from dora_diffusion.numerics.dora import NORM_FLOOR
from dora_diffusion.numerics.dora import gain as gain_of
from dora_diffusion.numerics.norms import (
    Terms,
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


class Collected(NamedTuple):
    """Gradients of the layers of a layout.

    Attributes:
        sums: Vectors for A, for B, and of the sums for m.
        pieces: Views of the sums with the shapes of `Layout.parameters`.
        used: Indices of the layers that a backward pass has reached.
    """

    sums: list[Tensor]
    pieces: Sequence[Tensor]
    used: Set[int]


NOTHING = Collected([], (), frozenset())


class Plan:
    """Norms and gains, computed from the current parameters of a layout.

    Norms of layers with an ill-conditioned channel (its terms cancel, or its gain is small) are
    recomputed one by one; only the flags of these channels are read from the device. Norms of
    layers with a changed weight are recomputed as well: a checksum detects writes to a base weight
    through ``.data``, which no version counter shows.

    Args:
        layout: Layout of the parameters.
        flags: Flags of a loop, read one step late. None reads them at once.

    Attributes:
        down, up: Vectors of all A and all B.
        norm: ``norm(W + sBA)`` of all channels, float32; None for LoRA.
        gain: ``g = m / norm``; None for LoRA.
        scales: `Layout.row_scales`.
        direct: Indices of layers that multiply by the gain in the graph (`Factors.gain_in_graph`).
    """

    @torch.no_grad()
    def __init__(self, layout: Layout, flags: DeferredFlags | None = None) -> None:
        self.layout, self.direct = layout, set(layout.direct)
        pair = padded_factors(layout) if layout.is_padded else map(layout.joined, (A, B))
        self.down, self.up = pair
        self.norm: Any = None
        self.gain: Any = None
        if layout.has_gain:
            with full_precision(layout.device):
                layout.update_bias()
                self._make_norms(flags)
        self.scales = layout.row_scales(self.gain)

    def _make_norms(self, flags: DeferredFlags | None) -> None:
        """Compute norms and gains, and recompute the norms of flagged layers."""
        layout, terms, margin = self.layout, self._terms(), 1.0 if flags is None else MARGIN
        total = terms.change + layout.base
        self.norm = total.clamp_min(0).sqrt_()
        self.gain = gain_of(layout.joined(VECTOR), self.norm)
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

    def _terms(self) -> Terms:
        """Return the terms of all channels."""
        layout, axis, up = self.layout, self.layout.axis, self.up
        scales: Sequence[Any] = layout.group_scales
        if None in scales and layout.scales is not None:  # Multiply B by them.
            up, scales = torch.empty_like(up), [1.0] * len(scales)
            layout.scale_rows(self.up, layout.scales, out=up)
        kind = A if axis == "output" else B
        parts = parts_of((self.down, up)[kind]) if any(layout.widens) else []
        kinds = [A, B, *[kind for _ in parts]]
        views = map(layout.by_group, (self.down, up, *parts), kinds)
        terms, groups = [], zip(layout.groups, scales, layout.widens, *views, strict=True)
        for group, scale, is_wide, *factors in groups:
            if (shard := group[0].shard) is not None:
                pairs = zip(factors, kinds, strict=True)
                factors = [f if role == A else shard.own(f, 1) for f, role in pairs]
            weights, (downs, ups, *splits) = [site.weight for site in group], factors
            multipliers = splits if is_wide else [factors[kind]]
            of_group: Sequence[Tensor] = norm_terms(weights, downs, ups, scale, axis, multipliers)
            if shard is not None:
                of_group = [shard.partial_sum(term, axis) for term in of_group]
            terms.append([term.flatten() for term in of_group])
        joined = Terms(*map(torch.cat, zip(*terms, strict=True)))
        return joined if shard is None else shard.sum_terms(joined)

    def _recompute(self, number: int) -> None:
        """Recompute norm and gain of a flagged adapter, from its dense weight if necessary."""
        index, k = divmod(number, self.layout.count)
        pair = (torch.split(all_, self.layout.sizes)[number] for all_ in (self.norm, self.gain))
        (norm, gain), site = pair, self.layout.sites[index]
        weights, statistics = site.adapters[k], site.statistics
        assert weights.magnitude is not None
        assert statistics is not None
        if site.shard is not None:
            norm.copy_(site.shard.exact_norm(site.weight, weights))
        else:
            factors, base = (weights.down, weights.up, weights.scale), statistics.squared_norm
            norm.copy_(factored_norm(site.weight, *factors, weights.norm_axis, base))
        gain.copy_(gain_of(weights.magnitude.to(norm.dtype), norm))
        if bool((gain.abs() < SMALL_GAIN).any()):
            self.direct.add(index)

    # Gradients

    def gradients(self, collected: Collected) -> list[Tensor | None]:
        """Return the gradients of the layout's parameters. The sums are changed in place."""
        (sums, pieces, used), layout = collected, self.layout
        if self.scales is not None:
            layout.scale_rows(sums[B], self.scales, out=sums[B])
        if layout.has_gain:
            self._divide(sums[VECTOR])
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
        layout = self.layout
        gain = self.gain.masked_fill(self.gain == 0, 1)
        if self.direct:
            gains = torch.split(gain, [layout.count * width for width in layout.widths])
            for index in self.direct:
                gains[index].fill_(1)
        total.div_(gain.mul_(self.norm.clamp_min(NORM_FLOOR)))

    @torch.no_grad()
    def give_gradients(self, collected: Collected) -> None:
        """Set the parameters' ``grad`` at the end of a step.

        Parameters that no pass has reached get no gradient. Gradients of A and B from a
        parametrization are propagated to its parameters.
        """
        if not collected.used:
            return
        derived, gradients = [], self.gradients(collected)
        for parameter, gradient in zip(self.layout.parameters, gradients, strict=True):
            if gradient is not None and parameter.grad_fn is not None:
                derived.append((parameter, gradient))
            elif gradient is not None:
                parameter.grad = gradient
        if derived:
            torch.autograd.backward([p for p, _ in derived], [gradient for _, gradient in derived])
