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
    made: tuple[Tensor, ...] = _Own.apply(
        plan, number, factors, weights.down, weights.up, magnitude
    )  # type: ignore[no-untyped-call]
    down, up, sums = made
    return factors._replace(down=down, up=up, sums=sums)


class _Own(torch.autograd.Function):
    """One layer's part of what `plan._Prepare` is for all of them."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, number: int, factors: Factors, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.plan, ctx.number, ctx.dtypes = plan, number, [p.dtype for p in parameters]
        return factors.down.detach(), factors.up.detach(), factors.sums.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, down: Tensor, up: Tensor, sums: Tensor) -> tuple[Tensor | None, ...]:
        plan, number = ctx.plan, ctx.number
        weights = plan.layers[number].weights
        scaled = up.to(plan.wide) * weights.scale
        if weights.norm_axis == "output":
            scaled *= plan.part(plan.gain, number).view(-1, *[1] * (up.ndim - 1))
        total = sums[0]
        if sums.shape[0] == 2:
            total = total - plan.part(plan.bias, number) * sums[1]
        magnitude = total / plan.part(plan.divisor(), number)
        made = zip((down, scaled, magnitude), ctx.dtypes, strict=True)
        return None, None, None, *(part.to(dtype) for part, dtype in made)
