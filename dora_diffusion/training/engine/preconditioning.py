"""Riemannian preconditioning of low-rank factors: steps that do not depend on how B A is divided.

Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models",
arXiv:2402.02347: the gradient of A is multiplied by ``(B' B + d I)^-1``, that of B by
``(A A' + d I)^-1``, before the optimizer sees them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dora_diffusion.adapters.layers import LayerAdapter
from dora_diffusion.adapters.parametrizations import PrincipalParametrization


def preconditioned(
    down: Tensor, up: Tensor, down_grad: Tensor, up_grad: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """Preconditioned gradients of n layers' A ``(n, r, in)`` and B ``(n, out, r)``.

    Args:
        down: A.
        up: B.
        down_grad: The gradient of A.
        up_grad: The gradient of B.
        damping: d.
    """
    damped = damping * torch.eye(down.shape[1], dtype=down.dtype, device=down.device)
    grams = [torch.baddbmm(damped, up.mT, up), torch.baddbmm(damped, down, down.mT)]
    # Without a check for errors, which would wait for a GPU: damped, they can be inverted.
    of_up, of_down = torch.linalg.inv_ex(torch.cat(grams)).inverse.chunk(2)
    return torch.bmm(of_up, down_grad), torch.bmm(up_grad, of_down)


class Preconditioner:
    """Preconditioner of the gradients of adapters, all layers of one shape together.

    Args:
        adapters: Those that train. Of a PiSSA, A and B are the weight's leading part with what
            trains of it.
        damping: d.
    """

    def __init__(self, adapters: Iterable[LayerAdapter], damping: float) -> None:
        shapes: dict[tuple[torch.Size, torch.Size], list[LayerAdapter]] = {}
        for adapter in adapters:
            shapes.setdefault((adapter.down.shape, adapter.up.shape), []).append(adapter)
        self._shapes = list(shapes.values())
        self._damping = damping

    @torch.no_grad()
    def __call__(self) -> None:
        """Precondition the gradients that the parameters of the adapters have."""
        for alike in self._shapes:
            layers = [adapter for adapter in alike if adapter.down.grad is not None]
            if not layers:
                continue
            factors = zip(*map(_factors, layers), strict=True)
            grads = list(zip(*((own.down.grad, own.up.grad) for own in layers), strict=True))
            down, up, *both = (torch.stack(part).flatten(2) for part in (*factors, *grads))
            made = preconditioned(down, up, both[0], both[1], self._damping)
            for into, gradient in zip(grads, made, strict=True):
                shaped = gradient.view(len(layers), *into[0].shape)
                torch._foreach_copy_(into, shaped.unbind())


def _factors(adapter: LayerAdapter) -> tuple[Tensor, Tensor]:
    """A and B."""
    start = adapter.parametrization
    if isinstance(start, PrincipalParametrization):
        return start.start_down + adapter.down, start.start_up + adapter.up
    return adapter.down, adapter.up
