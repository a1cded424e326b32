"""AdaLoRA (arXiv:2303.10512) in a training step: orthogonality term and rank allocation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.layers import LayerAdapter
from dora_diffusion.adapters.parametrizations import SingularParametrization
from dora_diffusion.numerics.allocation import (
    BudgetSchedule,
    Sensitivity,
    kept_triplets,
    orthogonality_gradients,
    triplet_importance,
)
from dora_diffusion.training.hooks.hook import Hook, Record

if TYPE_CHECKING:
    from dora_diffusion.training.step import Step


class Allocation(Hook):
    """Reallocates ranks between layers.

    Args:
        step: Step of a run with AdaLoRA.
    """

    name = "allocation"

    def __init__(self, step: Step) -> None:
        config, adapters = step.config, step.adapters.trained()
        start = sum(len(adapter.down) for adapter in adapters)
        target_rank = config.target_rank or max(1, round(2 * config.rank / 3))
        target = round(start * target_rank / config.rank)
        phases, steps = config.allocation_phases, config.max_train_steps or 0
        schedule = BudgetSchedule(start, target, steps, *phases, config.allocation_interval)
        self.ranks = RankAllocation(adapters, schedule, config.orthogonality_weight)
        self._parameters, self._scaler = step.parameters, step.accelerator.scaler
        # Prodigy estimates its step size from gradients. The term would distort the estimate.
        self._is_decoupled = "d" in step.optimizer.param_groups[0]
        self._rate, self._scale = 0.0, 1.0

    def gradients(self, number: int) -> None:
        if not self._is_decoupled:
            self.ranks.add_orthogonality(self._loss_scale())

    def clipped(self, record: Record) -> None:
        self._parameters.share_gradients()
        self._rate = max(record.get("effective_lr", {"": 0.0}).values())
        self._scale = self._loss_scale()

    def moved(self, number: int) -> None:
        # The scaler lowers its scale after an fp16 overflow, for which it skips the step.
        if self._loss_scale() < self._scale:
            return
        if self._is_decoupled:
            self.ranks.make_orthogonal(self._rate)
        self.ranks.after_step(number)

    def state_dict(self) -> Any:
        return self.ranks.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.ranks.load_state_dict(state)

    def _loss_scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())


class RankAllocation:
    """Prunes the least important triplets over all layers of all components.

    As in PEFT, the importance depends on the weights after the optimizer's step and on the clipped
    gradients of that step, which include the orthogonality term. Reported losses do not include the
    term.

    Args:
        adapters: Trained adapters, each with a `SingularParametrization`.
        schedule: Total number of triplets by step.
        orthogonality_weight: Weight of the orthogonality term.
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
        """Add the gradients of the orthogonality term.

        Args:
            loss_scale: Scale of all gradients (fp16).
        """
        for parameter, grad in self._orthogonality(loss_scale * self.orthogonality_weight):
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

    @torch.no_grad()
    def make_orthogonal(self, rate: float) -> None:
        """Apply a gradient step on the orthogonality term of each factor (decoupled, for Prodigy).

        Prodigy estimates its step size from the gradients. As long as the triplets are close to 0,
        the gradients of the term are far larger than the gradients of the loss.

        Args:
            rate: Step size of the optimizer.
        """
        factors = 2 * len(self._adapters)
        for parameter, grad in self._orthogonality(rate * self.orthogonality_weight * factors):
            parameter.sub_(grad)

    def _orthogonality(self, weight: float) -> list[tuple[nn.Parameter, Tensor]]:
        """Return each factor with its gradient of the weighted term; empty if the weight is 0."""
        if not weight:
            return []
        downs = [adapter.down for adapter in self._adapters]
        ups = [adapter.up for adapter in self._adapters]
        rows = [d.detach().flatten(1) for d in downs] + [u.detach().flatten(1).t() for u in ups]
        gradients = orthogonality_gradients(rows, weight)
        count = len(downs)
        shaped = [grad.view_as(down) for grad, down in zip(gradients, downs, strict=False)]
        shaped += [g.t().reshape(up.shape) for g, up in zip(gradients[count:], ups, strict=True)]
        return list(zip([*downs, *ups], shaped, strict=True))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the allocation after an optimizer step, before gradients are reset.

        Args:
            step: Number of the step, counted from 1.
        """
        parameters = self._parameters
        if self._kept is None:
            if step < self.schedule.last:
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                self._sensitivity.update([p.detach() for p in parameters], gradients)
            # If the step of the final selection was skipped, the next step makes the selection.
            if step < self.schedule.last and not self.schedule.chooses(step):
                return
            masks = kept_triplets(self.importance(), self.schedule.budget(step))
            if step >= self.schedule.last:
                self._kept = masks
        else:
            masks = self._kept
        for diagonal, mask in zip(self._diagonals, masks, strict=True):
            diagonal.masked_fill_(~mask, 0)

    def importance(self) -> list[Tensor]:
        """Return the importance of the triplets of each layer, ``(r,)``."""
        scores, count = self._sensitivity.scores(), len(self._adapters)
        thirds = (scores[i * count : (i + 1) * count] for i in range(3))
        return [triplet_importance(*layer) for layer in zip(*thirds, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return sensitivity and selection, on the CPU."""
        masks = self._kept
        return {
            "mean": [tensor.cpu() for tensor in self._sensitivity.mean],
            "uncertainty": [tensor.cpu() for tensor in self._sensitivity.uncertainty],
            "kept": None if masks is None else [mask.cpu() for mask in masks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        for name in ("mean", "uncertainty"):
            for tensor, saved in zip(getattr(self._sensitivity, name), state[name], strict=True):
                tensor.copy_(saved)
        masks = state["kept"]
        device = self._diagonals[0].device
        self._kept = None if masks is None else [mask.to(device) for mask in masks]
