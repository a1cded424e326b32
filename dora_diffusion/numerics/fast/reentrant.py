"""One layer's way back to its parameters, where a backward pass runs inside of another.

Reentrant gradient checkpointing runs a block without gradients, and once more within the backward
pass, where it starts a backward pass of its own. The node of `plan` would be entered by each of
these, and reach the parameters of all blocks every time. That is work for nothing, and tells
`DistributedDataParallel` that gradients are complete which are not. So a layer that is called there
has a node that reaches its own parameters alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from dora_diffusion.numerics.fast.gain import Factors
    from dora_diffusion.numerics.fast.plan import Plan


def in_backward() -> bool:
    """Whether a backward pass runs in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def own_factors(plan: Plan, number: int, factors: Factors) -> Factors:
    """The same factors, whose gradients go to the parameters of one layer of a plan."""
    weights, magnitude = plan.layers[number].weights, plan.layers[number].magnitude
    made: tuple[Any, ...] = _Own.apply(plan, number, factors, weights.down, weights.up, magnitude)  # type: ignore[no-untyped-call]
    down, up, sums, shift_sums = made
    return factors._replace(down=down, up=up, sums=sums, shift_sums=shift_sums)


class _Own(torch.autograd.Function):
    """One layer's part of what `plan._Prepare` is for all of them."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, number: int, factors: Factors, *parameters: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.plan, ctx.number, ctx.dtypes = plan, number, [p.dtype for p in parameters]
        made = factors.down, factors.up, factors.sums, factors.shift_sums
        return tuple(None if tensor is None else tensor.detach() for tensor in made)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, down: Tensor, up: Tensor, sums: Tensor, shift_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        plan, number = ctx.plan, ctx.number
        weights = plan.layers[number].weights
        scaled = up.to(plan.layout.wide) * weights.scale
        if weights.norm_axis == "output":
            scaled *= plan.part(plan.gain, number).view(-1, *[1] * (up.ndim - 1))
        if shift_sums is not None:
            sums = sums - plan.part(plan.bias, number) * shift_sums
        magnitude = sums / plan.part(plan.divisor(), number)
        made = zip((down, scaled, magnitude), ctx.dtypes, strict=True)
        return None, None, None, *(part.to(dtype) for part, dtype in made)
