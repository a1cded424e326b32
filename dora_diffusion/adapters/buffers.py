"""Memory of a run's factors and gradients, which stays from step to step.

Each layer has views of the buffers that are created once. A step fills the factors of all layers
with a few operations, backward passes write to the layers' gradients, and a few operations turn
them into the gradients of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from dora_diffusion.adapters.layout import Layout, consecutive
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
        self._layout, self._gradients_of = layout, dict[int, Gradients]()
        self.forwards: dict[int, Callable[[Tensor], Tensor]] = {}
        products = layout.new_buffers(0, zero=True)
        sums, pieces = _in_memory(layout, memory, [*products, layout.base])
        products = products if sums is None else sums[:-1]
        self._factors = [torch.zeros_like(buffer, dtype=dtype) for buffer in products]
        self._gain = torch.zeros_like(layout.base)
        self._shift = torch.zeros_like(self._gain, dtype=dtype)
        # In the dtype of the sums, backward passes write to the sums themselves.
        self._is_wide, self._used = dtype == layout.dtype, set[int]()
        if self._is_wide and sums is None:
            sums = [*products, torch.zeros_like(layout.base)]
            pieces = layout.pieces(sums)
        # Otherwise allocated after the passes, when the memory of activations is free.
        self._sums, self._pieces, self._is_kept = sums or [], pieces, sums is not None
        self._gradients = products if self._is_wide else list(map(torch.zeros_like, self._factors))
        count = len(layout.sites)
        factors, gradients = (layout.views(0, b) for b in (self._factors, self._gradients))
        gains, shifts = (torch.split(v, layout.widths) for v in (self._gain, self._shift))
        pairs = list(zip(gradients[:count], gradients[count:], strict=True))
        unserved = (pairs[index] for index in range(count) if index not in operations)
        self._unserved = [view for pair in unserved for view in pair]
        for index, op in operations.items():
            site, mean = layout.sites[index], layout.biases[index]
            shift = None if mean is None else shifts[index]
            self._gradients_of[index] = of_layer = Gradients(*pairs[index])
            tensors = Factors(factors[index], factors[count + index], gains[index], shift, mean)
            layer = FusedLayer(op, site.weight, site.bias, tensors, of_layer)
            self.forwards[index] = partial(fused, layer, layout.anchor)

    @torch.no_grad()
    def fill(self, plan: Plan) -> None:
        """Write the factors of a step."""
        assert plan.gain is not None
        self._factors[0].copy_(plan.down)
        for buffer, up, scale in zip(self._factors[1:], plan.up, plan.scales, strict=True):
            torch.mul(up, scale, out=buffer)
        self._gain.copy_(plan.gain)
        if any(self._layout.has_bias):
            torch.mul(1 - plan.gain, self._layout.bias, out=self._shift)

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
            self._sums = [*layout.new_buffers(0, zero=False), torch.empty_like(layout.base)]
            self._pieces = layout.pieces(self._sums)
        reached = [every[index] for index in used]
        if convolutions := [gradients for gradients in reached if gradients.convolution]:
            targets = [target for g in convolutions for target in (g.down, g.up)]
            sources = [tensor for g in convolutions for tensor in g.convolution]
            torch._foreach_copy_(targets, sources)
        unused = (every[index] for index in every.keys() - used)
        if empty := [*self._unserved, *(view for g in unused for view in (g.down, g.up))]:
            torch._foreach_zero_(empty)
        gains = [every[i].gain if i in used else None for i in range(len(layout.sites))]
        gradients = [*self._gradients, torch.cat(layout.with_zeros(0, gains))]
        # Otherwise backward passes have added to the sums.
        sums = self._sums[-1:] if self._is_wide else self._sums
        add = torch._foreach_add_ if self._used else torch._foreach_copy_
        add(sums, gradients[-len(sums) :])
        self._used |= used
        for of_layer in reached:
            of_layer.clear()


def _in_memory(
    layout: Layout, memory: Mapping[Tensor, Tensor], like: Sequence[Tensor]
) -> tuple[list[Tensor] | None, list[Tensor]]:
    """Return the sums of a layout's gradients and their `Layout.pieces`, in the memory.

    The sums are None if the memory does not have the layout's order.

    Args:
        layout: The layout.
        memory: Memory for the parameters' gradients.
        like: Tensors with the shapes of the sums.
    """
    sums, pieces = list[Tensor](), [memory[p] for p in layout.parameters if p in memory]
    if len(pieces) < len(layout.parameters):
        return None, []
    start = 0
    for buffer, count in zip(like, layout.counts, strict=True):
        vector = consecutive(pieces[start : start + count])
        if vector is None or vector.dtype != layout.dtype:
            return None, []
        sums.append(vector.view(buffer.shape))
        start += count
    return sums, pieces
