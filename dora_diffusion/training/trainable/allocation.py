"""Rank allocation in a run: which triplets of which layers stay, decided as it trains (AdaLoRA)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.inject import layer_adapters
from dora_diffusion.adapters.layers import LayerAdapter
from dora_diffusion.adapters.parametrizations import SingularParametrization
from dora_diffusion.config import TrainConfig
from dora_diffusion.numerics.allocation import (
    BudgetSchedule,
    Sensitivity,
    kept_triplets,
    orthogonality_gradients,
    triplet_importance,
)


class RankAllocation:
    """Switches off the triplets that matter least, over all layers of all components.

    As PEFT does, it looks at weights after the optimizer's step and at that step's gradients,
    clipped, and adds the term that keeps triplets orthogonal to these. The losses that are reported
    are without that term.

    Args:
        adapters: Those that train; each must have a `SingularParametrization`.
        schedule: How many triplets they may have.
        orthogonality_weight: Of the term.
    """

    def __init__(
        self,
        adapters: Iterable[LayerAdapter],
        schedule: BudgetSchedule,
        orthogonality_weight: float,
    ) -> None:
        self.schedule = schedule
        self.orthogonality_weight = orthogonality_weight
        self._adapters = list(adapters)
        self._diagonals = [
            cast(SingularParametrization, adapter.parametrization).diagonal
            for adapter in self._adapters
        ]
        self._parameters: list[nn.Parameter] = [
            *self._diagonals,
            *(adapter.down for adapter in self._adapters),
            *(adapter.up for adapter in self._adapters),
        ]
        self._sensitivity = Sensitivity.of(self._parameters)
        self._kept: list[Tensor] | None = None

    @torch.no_grad()
    def add_orthogonality(self, loss_scale: float = 1.0) -> None:
        """Add the term's gradients to those of a step.

        Args:
            loss_scale: What the others are multiplied by, as fp16 needs it.
        """
        for parameter, grad in self._orthogonality(loss_scale * self.orthogonality_weight):
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

    @torch.no_grad()
    def make_orthogonal(self, rate: float) -> None:
        """Apply a gradient step of each factor's own term beside the optimizer's step.

        For Prodigy, as decoupled weight decay is: it finds its step size by the gradients that it
        sees, and those of the term are far larger than the loss's as long as the triplets are near
        to 0.

        Args:
            rate: Size of the step, as the optimizer has it.
        """
        factors = 2 * len(self._adapters)
        for parameter, grad in self._orthogonality(rate * self.orthogonality_weight * factors):
            parameter.sub_(grad)

    def _orthogonality(self, weight: float) -> list[tuple[nn.Parameter, Tensor]]:
        """Each factor with its gradient of the term, of this weight; none for a weight of 0."""
        if not weight:
            return []
        downs = [adapter.down for adapter in self._adapters]
        ups = [adapter.up for adapter in self._adapters]
        rows = [d.detach().flatten(1) for d in downs] + [u.detach().flatten(1).t() for u in ups]
        made = orthogonality_gradients(rows, weight)
        count = len(downs)
        shaped = [grad.view_as(down) for grad, down in zip(made, downs, strict=False)]
        shaped += [g.t().reshape(up.shape) for g, up in zip(made[count:], ups, strict=True)]
        return list(zip([*downs, *ups], shaped, strict=True))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the allocation after an optimizer step, while its gradients are there.

        Args:
            step: Its number, counted from 1.
        """
        parameters = self._parameters
        if self._kept is None:
            if step < self.schedule.last:
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                self._sensitivity.update([p.detach() for p in parameters], gradients)
            # The last choice is made up for, where its step was skipped.
            if step < self.schedule.last and not self.schedule.chooses(step):
                return
            kept = kept_triplets(self.importance(), self.schedule.budget(step))
            if step >= self.schedule.last:
                self._kept = kept
        else:
            kept = self._kept
        for diagonal, mask in zip(self._diagonals, kept, strict=True):
            diagonal.masked_fill_(~mask, 0)

    def importance(self) -> list[Tensor]:
        """Return the importance of each layer's triplets, ``(r,)``."""
        scores, count = self._sensitivity.scores(), len(self._adapters)
        parts = (scores[i * count : (i + 1) * count] for i in range(3))
        return [triplet_importance(*layer) for layer in zip(*parts, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that steps change, on the CPU."""
        kept = self._kept
        return {
            "mean": [tensor.cpu() for tensor in self._sensitivity.mean],
            "uncertainty": [tensor.cpu() for tensor in self._sensitivity.uncertainty],
            "kept": None if kept is None else [mask.cpu() for mask in kept],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in ("mean", "uncertainty"):
            for own, saved in zip(getattr(self._sensitivity, name), state[name], strict=True):
                own.copy_(saved)
        kept = state["kept"]
        device = self._diagonals[0].device
        self._kept = None if kept is None else [mask.to(device) for mask in kept]


def build_allocation(trained: Mapping[str, nn.Module], config: TrainConfig) -> RankAllocation:
    """The rank allocation that a run asks for."""
    adapters = [adapter for model in trained.values() for adapter in layer_adapters(model)]
    start = sum(adapter.down.shape[0] for adapter in adapters)
    target_rank = config.target_rank or max(1, round(2 * config.rank / 3))
    assert config.max_train_steps is not None
    schedule = BudgetSchedule(
        start,
        round(start * target_rank / config.rank),
        config.max_train_steps,
        *config.allocation_phases,
        config.allocation_interval,
    )
    return RankAllocation(adapters, schedule, config.orthogonality_weight)
