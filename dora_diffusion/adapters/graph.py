"""Factors of many layers through autograd's graph.

Factors that cannot lie in `buffers` have a node of the graph between them and the parameters. Each
layer passes the gradients of its factors to the node, which computes the gradients of all
parameters at once: after each backward pass, if the graph has edges to the parameters; otherwise at
the end of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_diffusion.adapters.flat import join
from dora_diffusion.adapters.layout import B, Rows
from dora_diffusion.adapters.pack import pack_rows, pieces_of
from dora_diffusion.adapters.plan import Collected, Plan
from dora_diffusion.numerics.dora import Factors, direction_of


class Graph:
    """Factors of a plan, with a graph to its parameters.

    Args:
        plan: The plan.
        has_edges: If True, each backward pass adds to the parameters' ``grad``. If False, backward
            passes add to sums, which `collect` returns.

    Attributes:
        ran_without_gradients: Indices of layers that were called without gradients.
    """

    def __init__(self, plan: Plan, *, has_edges: bool = True) -> None:
        self.plan, self.has_edges = plan, has_edges
        self._layout, self._sums, self._used = plan.layout, list[Tensor](), set[int]()
        self.ran_without_gradients = set[int]()

    def factors(self, dtype: torch.dtype, rows: Rows = 0) -> list[Factors]:
        """Return the layers' factors in a dtype, for a batch whose rows use these adapters."""
        layout, count = self._layout, len(self._layout.sites)
        # The first call of a layer may run without gradients, as in checkpointing.
        with torch.inference_mode(False), torch.enable_grad():
            start = layout.parameters if self.has_edges else [layout.anchor]
            flat: tuple[Tensor, ...] = _Prepare.apply(self, dtype, rows, *start)  # type: ignore[no-untyped-call]
        fields: list[Any] = [flat[i : i + count] for i in range(0, len(flat), count)]
        fields += [[None] * count] * (4 - len(fields))  # LoRA has no gains and shifts.
        factors = []
        for index, (down, up, gain, shift, bias) in enumerate(
            zip(*fields, layout.biases, strict=True)
        ):
            direct = self._direct(index, rows, dtype)
            shift = None if bias is None else shift
            factors.append(Factors(down, up, gain, shift, bias, layout.axis, *direct))
        return factors

    def _direct(self, index: int, rows: Rows, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
        """Return whether a layer is direct, and its `direction_of` if one adapter is for all rows.

        The layer itself computes the direction of a sharded weight, when it is whole.
        """
        is_direct, site = index in self.plan.direct, self._layout.sites[index]
        if not is_direct or site.shard or not isinstance(rows, int):
            return is_direct, None
        return True, direction_of(site.weight, site.adapters[rows], dtype)

    def prepared(self, dtype: torch.dtype, rows: Rows) -> list[Tensor]:
        """Return A, B, gain and shift of all layers, one field after the other."""
        plan, layout = self.plan, self._layout
        vectors = [plan.down.to(dtype)]
        if plan.scales is None:
            vectors.append(plan.up.to(dtype))
        else:
            vectors.append(torch.empty_like(plan.up, dtype=dtype))
            layout.scale_rows(plan.up, plan.scales, out=vectors[B])
        if plan.gain is not None:
            vectors.append(plan.gain)
            if layout.bias is not None:
                vectors.append(((1 - plan.gain) * layout.bias).to(dtype))
        if layout.count == 1:
            return layout.views(vectors)
        return pack_rows(layout, rows).gather(vectors)

    def backward(self, rows: Rows, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the parameters from those of the fields of `prepared`.

        Without edges to the parameters they are added to the sums, and None is returned.
        """
        sums, used = self._sums_of(rows, grads)
        if self.has_edges:
            return self.plan.gradients(Collected(sums, self._pieces(sums), used))
        if self._used:
            torch._foreach_add_(self._sums, sums)
        else:
            self._sums = sums
        self._used |= used
        return [None]

    def collect(self, others: Collected) -> Collected:
        """Return the gradients of a step, with the gradients of layers outside of the graph."""
        if not self._used:
            return others
        if others.used:
            torch._foreach_add_(self._sums, others.sums)
        return Collected(self._sums, self._pieces(self._sums), self._used | others.used)

    def _sums_of(self, rows: Rows, grads: Sequence[Tensor | None]) -> tuple[list[Tensor], set[int]]:
        """Return the sums of a pass (`Collected.sums`), and the indices of its layers."""
        layout, count = self._layout, len(self._layout.sites)
        adapters = len(rows) if isinstance(rows, tuple) else 1
        part = layout if layout.count == 1 else pack_rows(layout, rows)
        used = {index for index, grad in enumerate(grads[:count]) if grad is not None}
        sums = layout.new_vectors(adapters, zero=len(used) < count)
        targets = zip(part.views(sums), grads[: 2 * count], strict=True)
        if pairs := [(target, grad) for target, grad in targets if grad is not None]:
            torch._foreach_copy_([target for target, _ in pairs], [grad for _, grad in pairs])
        if gains := grads[2 * count : 3 * count]:
            # Zeros for layers without a gradient, so that all passes return the same vectors.
            sums.append(join(layout.with_zeros(gains, adapters)))
        return sums if layout.count == 1 else pack_rows(layout, rows).add_up(sums), used

    def _pieces(self, sums: Sequence[Tensor]) -> list[Tensor]:
        layout = self._layout
        return layout.views(sums) if layout.count == 1 else pieces_of(layout, sums)


class _Prepare(torch.autograd.Function):
    """Autograd function from all A, B and m of a plan to the factors of its layers.

    It saves no tensors for backward, so several backward passes can run (gradient accumulation).
    Layers that were not called get no gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, graph: Graph, dtype: torch.dtype, rows: Rows, *parameters: Tensor
    ) -> tuple[Any, ...]:
        ctx.graph, ctx.rows = graph, rows
        ctx.set_materialize_grads(False)
        tensors = graph.prepared(dtype, rows)
        ctx.mark_non_differentiable(*tensors[3 * len(graph.plan.layout.sites) :])  # The shifts.
        return tuple(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.graph.backward(ctx.rows, grads)
