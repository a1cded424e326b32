"""Memory of a run's factors and gradients, which stays from step to step.

Each layer has views of the vectors that are created once. A step fills the factors of all layers
with a few operations, backward passes write to the layers' gradients, and a few operations turn
them into the gradients of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor

from dora_diffusion.adapters.flat import consecutive
from dora_diffusion.adapters.layout import VECTOR, Layout
from dora_diffusion.adapters.plan import Collected, Plan
from dora_diffusion.numerics.dora import Factors
from dora_diffusion.numerics.fused import FusedLayer, Gradients, fused
from dora_diffusion.numerics.operation import Operation


class Buffers:
    """Factors and gradients of a layout's layers, each with one DoRA on the output axis.

    Attributes:
        forwards: Forward of each layer, by its index in the layout.

    Args:
        layout: The layout.
        dtype: Compute dtype.
        operations: Operations of the layers, by index in the layout.
        memory: Memory for the parameters' gradients. It is used if it has the layout's order.
    """

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        operations: Mapping[int, Operation],
        memory: Mapping[Tensor, Tensor],
    ) -> None:
        self._layout, count = layout, len(layout.sites)
        # In the dtype of the sums, backward passes write to the sums themselves.
        self._is_wide, self._used = dtype == layout.dtype, set[int]()
        self._sums, self._pieces = _in_memory(layout, memory) or ([], [])
        if self._is_wide and not self._sums:
            self._allocate()
        # Otherwise allocated after the passes, when the memory of activations is free.
        self._is_kept = bool(self._sums)
        self._gradients = self._sums[:VECTOR]
        if not self._is_wide:
            self._gradients = layout.new_vectors(dtype=dtype)
        gain = torch.empty_like(layout.base)
        shift = torch.empty_like(gain, dtype=dtype)
        self._factors = [*layout.new_vectors(dtype=dtype), gain, shift]
        factors, gradients = layout.views(self._factors), layout.views(self._gradients)
        self._views = list(zip(gradients[:count], gradients[count:], strict=True))
        self._gradients_of = {index: Gradients(*self._views[index]) for index in operations}
        self.forwards: dict[int, Callable[[Tensor], Tensor]] = {}
        for index, op in operations.items():
            site, mean = layout.sites[index], layout.biases[index]
            down, up, gain, shift = factors[index::count]
            tensors = Factors(down, up, gain, None if mean is None else shift, mean)
            layer = FusedLayer(op, site.weight, site.bias, tensors, self._gradients_of[index])
            self.forwards[index] = partial(fused, layer, layout.anchor)

    def _allocate(self) -> None:
        layout = self._layout
        self._sums = [*layout.new_vectors(), torch.empty_like(layout.base)]
        self._pieces = layout.views(self._sums)

    @torch.no_grad()
    def fill(self, plan: Plan) -> None:
        """Write the factors of a step."""
        (down, up, gain, shift), layout = self._factors, self._layout
        assert plan.scales is not None
        down.copy_(plan.down)
        layout.scale_rows(plan.up, plan.scales, out=up)
        gain.copy_(plan.gain)
        if layout.bias is not None:
            torch.mul(1 - plan.gain, layout.bias, out=shift)

    def end_pass(self) -> None:
        """Add the gradients of a backward pass to the sums, in the dtype of the sums."""
        if not self._is_wide:
            self._add_pass()

    def collect(self) -> Collected:
        """Return the gradients of a step, in memory of the next step too."""
        self._add_pass()
        collected, self._used = Collected(self._sums, self._pieces, self._used), set()
        if not self._is_kept:
            self._sums, self._pieces = [], []
        return collected

    @torch.no_grad()
    def _add_pass(self) -> None:
        every, layout = self._gradients_of, self._layout
        used = {index for index, gradients in every.items() if gradients.gain is not None}
        if not used:
            return
        if not self._sums:
            self._allocate()
        reached = [every[index] for index in used]
        if convolutions := [gradients for gradients in reached if gradients.convolution]:
            targets = [target for g in convolutions for target in (g.down, g.up)]
            sources = [tensor for g in convolutions for tensor in g.convolution]
            torch._foreach_copy_(targets, sources)
        if len(used) < len(self._views):
            others = (pair for index, pair in enumerate(self._views) if index not in used)
            torch._foreach_zero_([view for pair in others for view in pair])
        gains = [every[i].gain if i in used else None for i in range(len(layout.sites))]
        gradients = [*self._gradients, torch.cat(layout.with_zeros(gains))]
        # Otherwise backward passes have added to the sums.
        sums = self._sums[VECTOR:] if self._is_wide else self._sums
        add = torch._foreach_add_ if self._used else torch._foreach_copy_
        add(sums, gradients[-len(sums) :])
        self._used |= used
        for of_layer in reached:
            of_layer.clear()


def _in_memory(
    layout: Layout, memory: Mapping[Tensor, Tensor]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return the sums of a layout's gradients in the memory, and their parts by parameter.

    None if the memory does not have the layout's order.
    """
    if any(parameter not in memory for parameter in layout.parameters):
        return None
    sums = [consecutive([memory[parameter] for parameter in role]) for role in layout.roles]
    if any(total is None or total.dtype != layout.dtype for total in sums):
        return None
    return cast(list[Tensor], sums), [memory[parameter] for parameter in layout.parameters]
