"""Parametrizations: modules that compute an adapter's A and B from other trained tensors.

A `LayerAdapter` trains ``down`` and ``up``. Without a parametrization these are A and B. The
formula of `numerics.dora` uses A and B only, so norms, merges and files do not depend on the
parametrization.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dora_diffusion.config import AdapterConfig
from dora_diffusion.numerics.low_rank import low_rank
from dora_diffusion.numerics.precision import upcast
from dora_diffusion.numerics.projections import Projections, scaled_rows

# Initial standard deviation of P and Q, as in PEFT.
_SVD_DEVIATION = 0.02
# Initial d of VeRA, as in PEFT.
_D_START = 0.1


class Parametrization(nn.Module):
    """Module that computes A and B of one layer from ``down`` and ``up``."""

    def start(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return initial ``down`` and ``up``, with an update of exactly 0.

        Args:
            generator: Generator of the random tensors. None uses the global one.
        """
        raise NotImplementedError

    def forward(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return A ``(r, in, *k)`` and B ``(out, r, ...)``, differentiable."""
        raise NotImplementedError

    def used(self) -> Tensor | None:
        """Return a mask ``(r,)``, bool, of the ranks to save in a file; None: all."""
        return None


class PrincipalParametrization(Parametrization):
    """PiSSA (arXiv:2404.02948): trains the leading singular triplets of the weight.

    The paper initializes A and B from the leading singular triplets and subtracts these from the
    weight. Relative to the whole weight this is the update ``B A - B0 A0`` of rank 2r. The trained
    parameters are the changes of A0 and B0: a fresh adapter is the base, and weight decay pulls
    towards the base, not towards a weight without its leading triplets.

    Args:
        weight: The layer's weight, ``(out, in, *k)``.
        rank: r.
        scale: s of ``s B A``.
    """

    start_down: Tensor
    start_up: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        # Compute on the CPU, so that the start is the same on every device.
        layer, share = low_rank(upcast(weight).cpu(), rank), scale**0.5
        self.register_buffer("start_down", (layer.down / share).to(weight.device))
        self.register_buffer("start_up", (layer.up / share).to(weight.device))

    def start(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return zeros: no change of A0 and B0."""
        return torch.zeros_like(self.start_down), torch.zeros_like(self.start_up)

    def forward(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors of rank 2r of ``(B0 + b)(A0 + a) - B0 A0 = b (A0 + a) + B0 a``.

        The right side has no difference of large products to round, and is 0 if a and b are.
        """
        return torch.cat([self.start_down + down, down]), torch.cat([up, self.start_up], dim=1)


class ProjectedParametrization(Parametrization):
    """VeRA (arXiv:2310.11454): ``delta = diag(b) B diag(d) A``; only the vectors are trained.

    ``down`` is d, ``(r,)``, and ``up`` is b, ``(out,)``. A and B are random, frozen, and shared by
    all layers. With a magnitude this is the DoRA paper's DVoRA.

    Args:
        projections: A and B.
        weight: The layer's weight, ``(out, in, *k)``.
    """

    def __init__(self, projections: Projections, weight: Tensor) -> None:
        super().__init__()
        self.projections = projections
        self.weight_shape = tuple(weight.shape)
        self._device = weight.device

    def start(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return 0.1 for d and 0 for b."""
        down = torch.full((self.projections.rank,), _D_START, device=self._device)
        return down, torch.zeros(self.weight_shape[0], device=self._device)

    def forward(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors of rank r."""
        frozen_down, frozen_up = self.projections.factors(self.weight_shape, down.device)
        return scaled_rows(down, frozen_down), scaled_rows(up, frozen_up)


class SingularParametrization(Parametrization):
    """AdaLoRA (arXiv:2303.10512): ``delta = s P diag(l) Q``. An l of 0 switches a triplet off.

    ``down`` is Q, ``(r, in, *k)``, and ``up`` is P, ``(out, r, ...)``. They are initially random,
    and l is 0. Training selects the triplets (`training.features.adalora`).

    Attributes:
        diagonal: l, ``(r,)``.

    Args:
        weight: The layer's weight, ``(out, in, *k)``.
        rank: r.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.diagonal = nn.Parameter(torch.zeros(rank, device=weight.device))
        self.weight_shape = tuple(weight.shape)

    def start(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return Q and P from a normal distribution."""
        rank, (out, *inputs) = len(self.diagonal), self.weight_shape
        source = torch.device("cpu") if generator is None else generator.device
        down = torch.randn(rank, *inputs, generator=generator, device=source)
        shape = (out, rank, *[1] * (len(inputs) - 1))
        up = torch.randn(shape, generator=generator, device=source)
        device = self.diagonal.device
        return (_SVD_DEVIATION * down).to(device), (_SVD_DEVIATION * up).to(device)

    def forward(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``diag(l) Q`` and P."""
        return scaled_rows(self.diagonal, down), up

    def used(self) -> Tensor:
        """Return a mask of the triplets that are not switched off, at least one."""
        is_used = self.diagonal.detach() != 0
        if not is_used.any():
            is_used[0] = True
        return is_used


def build_parametrization(
    config: AdapterConfig,
    weight: Tensor,
    rank: int,
    alpha: float,
    projections: Projections | None,
) -> Parametrization:
    """Build the parametrization of a layer.

    Args:
        config: Settings with a parametrization, or with ``init: pissa``.
        weight: The layer's weight.
        rank: r.
        alpha: Alpha.
        projections: VeRA's random projections.
    """
    if projections is not None:
        return ProjectedParametrization(projections, weight)
    if config.parametrization == "adalora":
        return SingularParametrization(weight, rank)
    return PrincipalParametrization(weight, rank, alpha / rank)
